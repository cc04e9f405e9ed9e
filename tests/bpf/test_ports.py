"""Who serves a port when there are several guests, and what becomes of flows when that changes.

container ── SYN to 127.0.0.1:8080 ──► router ──► guest 2, 3, 4, ...: each gets a copy
          ◄─ the first SYN-ACK ───────        ◄── whoever serves it
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytestmark = pytest.mark.bpf

TCP, UDP = (socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM)
LOCAL = ("127.0.0.1", 8080)


def serve(stack: contextlib.ExitStack, pod: Any, where: Any, address: str = "0.0.0.0") -> socket.socket:
    server = stack.enter_context(pod.socket(where, *TCP))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, 8080))
    server.listen()
    return server


def dial(pod: Any, where: Any = None, port: int = 0, timeout_s: float = 0.9) -> socket.socket:
    """Connected, or ConnectionRefusedError; below a SYN's retransmission, so that nothing is found by luck."""
    client = pod.socket(where, *TCP)
    try:
        client.settimeout(timeout_s)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if port:
            client.bind(("0.0.0.0", port))
        client.connect(("169.254.77.1", 8080) if where else LOCAL)
    except BaseException:
        client.close()
        raise
    return client


def owners(pod: Any) -> dict[tuple[str, int, int], int]:
    return {(row.protocol, row.family, row.number): row.guest for row in pod.table.ports(pod.id)}


def flows(pod: Any, port: int = 8080) -> list[Any]:
    """Without what the guests sent to be seen."""
    return [flow for flow in pod.table.flows(pod.id) if flow.dialled.port == port]


@pytest.mark.parametrize("serving", [2, 6, 9])
def test_one_of_eight(make_pod: Callable[..., Any], serving: int) -> None:
    pod = make_pod(guests=8, ipv6=False)
    with contextlib.ExitStack() as stack:
        server = serve(stack, pod, pod.guests[serving - 2])
        for client_at in (None, pod.guests[0], pod.guests[-1]):
            with dial(pod, client_at) as client, server.accept()[0] as accepted:
                client.send(b"ping")
                assert accepted.recv(4) == b"ping"
        assert owners(pod)["tcp", 4, 8080] == serving
        assert all(not row.declared for row in pod.table.ports(pod.id))


def test_all_of_eight_serve(make_pod: Callable[..., Any]) -> None:
    pod = make_pod(guests=8, ipv6=False)
    with contextlib.ExitStack() as stack:
        servers = {serve(stack, pod, guest): guest for guest in pod.guests}
        with dial(pod) as client:
            client.send(b"ping")
            time.sleep(0.1)
            (winner,) = select.select(servers, [], [], 0)[0]
            assert owners(pod)["tcp", 4, 8080] == servers[winner].index
            with winner.accept()[0] as accepted:
                assert accepted.recv(4) == b"ping"
        for _ in range(5):  # and now it is known: nobody else is asked
            with dial(pod), winner.accept()[0]:
                pass
        assert select.select(servers, [], [], 0)[0] == []


def test_owner_that_refuses_is_forgotten(make_pod: Callable[..., Any]) -> None:
    pod = make_pod(guests=3, ipv6=False)
    with contextlib.ExitStack() as stack:
        with serve(stack, pod, pod.guests[1]) as server, dial(pod), server.accept()[0]:
            pass
        server = serve(stack, pod, pod.guests[2])
        with pytest.raises(ConnectionRefusedError):
            dial(pod)
        assert ("tcp", 4, 8080) not in owners(pod)
        with dial(pod), server.accept()[0]:
            assert owners(pod)["tcp", 4, 8080] == 4


def test_declared_port(make_pod: Callable[..., Any]) -> None:
    pod = make_pod(guests=3, ports={3: [("tcp", 8080)]}, ipv6=False)
    with contextlib.ExitStack() as stack:
        serve(stack, pod, pod.guests[0])
        for _ in range(2):  # its owner does not serve it, and stays its owner
            with pytest.raises(ConnectionRefusedError):
                dial(pod)
        server = serve(stack, pod, pod.guests[1])
        with dial(pod), server.accept()[0]:
            pass
    (first, second) = pod.table.ports(pod.id)
    assert (first.family, second.family, first.guest, first.declared) == (4, 6, 3, True)


def test_port_declared_twice(make_pod: Callable[..., Any]) -> None:
    import router

    pod = make_pod(guests=1, ports={2: [("udp", 53)]}, ipv6=False)
    row = pod.guests[0].row
    second = router.GuestRow(
        index=3, ifindex=999, mac=row.mac, ipv4=row.ipv4, ipv6=row.ipv6, ports=(("tcp", 53), ("udp", 53))
    )
    with pytest.raises(router.RouterError, match="53/udp is declared by guest 2"):
        pod.table.add_guest(pod.id, second)
    assert [guest.index for guest in pod.table.guests(pod.id)] == [2]


def test_guest_that_leaves(make_pod: Callable[..., Any]) -> None:
    pod = make_pod(guests=2, ipv6=False)
    with contextlib.ExitStack() as stack:
        server = serve(stack, pod, pod.guests[0])
        client = stack.enter_context(dial(pod))
        stack.enter_context(server.accept()[0])
        assert [flow.server.guest for flow in flows(pod)] == [2]
        client.send(b"x")
        pod.table.remove_guest(pod.id, pod.guests[0].row.ifindex)
        pod.table.remove_guest(pod.id, pod.guests[0].row.ifindex)
        assert flows(pod) == []
        assert owners(pod) == {}
        with pytest.raises(ConnectionRefusedError):
            dial(pod)


def test_container_that_starts_listening_takes_over(make_pod: Callable[..., Any]) -> None:
    pod = make_pod(guests=1, ipv6=False)
    reset = struct.pack("ii", 1, 0)  # close with a RST, so that the 4-tuple is free at once
    with contextlib.ExitStack() as stack:
        guest = serve(stack, pod, pod.guests[0])
        with dial(pod, port=40404) as client, guest.accept()[0]:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        with serve(stack, pod, None, "127.0.0.1") as container:
            with dial(pod, port=40404) as client, container.accept()[0]:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            with dial(pod, pod.guests[0], port=40404), container.accept()[0] as accepted:
                assert accepted.getpeername()[0] == "127.0.0.1"
        # ... and gives it back
        with dial(pod, port=40404), guest.accept()[0]:
            pass


def test_same_source_port_from_everywhere(make_pod: Callable[..., Any]) -> None:
    """Three clients that all use port 40404, to one guest: it must not take them for one."""
    pod = make_pod(guests=3, ipv6=False)
    with contextlib.ExitStack() as stack:
        server = serve(stack, pod, pod.guests[0])
        peers = []
        for client_at in (None, *pod.guests):
            stack.enter_context(dial(pod, client_at, port=40404))
            accepted, peer = server.accept()
            stack.enter_context(accepted)
            peers.append(peer)
        assert {address for address, _ in peers} == {"169.254.77.1"}
        assert len({port for _, port in peers}) == 4
        assert peers[0][1] == 40404


def test_many_connections_to_a_container(make_pod: Callable[..., Any]) -> None:
    """More than there are source ports to choose from: those of closed connections are used again."""
    pod = make_pod(guests=1, ipv6=False)
    with contextlib.ExitStack() as stack:
        server = serve(stack, pod, None, "127.0.0.1")
        reset = struct.pack("ii", 1, 0)
        for _ in range(5000):
            with dial(pod, pod.guests[0], timeout_s=3) as client, server.accept()[0]:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        assert len(pod.table.flows(pod.id)) <= 4536 + 10


def test_a_guest_that_has_said_nothing_refuses_at_once(make_pod: Callable[..., Any]) -> None:
    """It may be booting: nobody is sent to it, in either family."""
    pod = make_pod(guests=1)
    (row,) = pod.table.guests(pod.id)
    assert (row.seen_ipv4, row.seen_ipv6) == (True, True)
    pod.table.add_guest(pod.id, replace(row, seen_ipv4=False, seen_ipv6=False))
    for family, here in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with pod.socket(None, family, socket.SOCK_STREAM) as client, pytest.raises(ConnectionRefusedError):
            client.connect((here, 8080))


def test_datagrams_are_learned_by_the_first_reply(make_pod: Callable[..., Any]) -> None:
    pod = make_pod(guests=3, ipv6=False)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(pod.socket(guest, *UDP)) for guest in pod.guests]
        client = stack.enter_context(pod.socket(None, *UDP))
        for server in servers[1:]:  # guest 2 refuses
            server.bind(("0.0.0.0", 5353))
        client.connect(("127.0.0.1", 5353))
        client.send(b"?")
        questions = [server.recvfrom(10) for server in servers[1:]]
        assert [flow.state for flow in flows(pod, 5353)] == ["asking", "asking"]
        for server, (_, peer) in zip(servers[:0:-1], questions[::-1], strict=True):
            server.sendto(b"from " + server.getsockname()[0].encode(), peer)
        client.settimeout(0.3)
        client.recv(100)
        with pytest.raises(TimeoutError):
            client.recv(100)
        assert owners(pod) == {("udp", 4, 5353): 4}
        client.send(b"!")
        assert servers[2].recv(10) == b"!"
        (flow,) = flows(pod, 5353)
        assert (flow.state, flow.server.guest, flow.packets_sent, flow.packets_received) == ("open", 4, 2, 1)
        assert {reason.name for reason in pod.table.counters(pod.id)} >= {"LATE_ANSWER", "REFUSED_BY_SOME"}


def test_flows_tell_who_talks_to_whom(make_pod: Callable[..., Any]) -> None:
    pod = make_pod(guests=2, ipv6=False)
    with contextlib.ExitStack() as stack:
        server = serve(stack, pod, None, "127.0.0.1")
        client = stack.enter_context(dial(pod, pod.guests[1]))
        accepted = stack.enter_context(server.accept()[0])
        client.send(b"x" * 1000)
        assert len(accepted.recv(2000)) == 1000
        (flow,) = flows(pod)
        assert flow.protocol == "tcp"
        assert flow.state == "open"
        assert (flow.opener.guest, str(flow.opener.address)) == (3, "169.254.77.3")
        assert (str(flow.dialled.address), flow.dialled.port) == ("169.254.77.1", 8080)
        assert (flow.server.guest, str(flow.server.address)) == (None, "127.0.0.1")
        assert (str(flow.seen_as.address), flow.seen_as.port) == accepted.getpeername()
        assert flow.bytes_sent > 1000
        assert flow.packets_received >= 2
        assert flow.idle_s < 5
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        assert flows(pod)[0].state == "closing"
        accepted.close()
        assert client.recv(1) == b""
        time.sleep(0.05)
        assert flows(pod)[0].state == "closed"
