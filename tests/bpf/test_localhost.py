"""A pod's localhost on real kernel stacks: who reaches whom, and as whom."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.bpf

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
BRIDGE = {4: "169.254.77.1", 6: "fd00:77::1"}
ANY = {4: "0.0.0.0", 6: "::"}


def guest_address(family: int, index: int) -> str:
    return f"169.254.77.{index}" if family == 4 else f"fd00:77::{index:x}"


PATHS = ["container-guest", "guest-container", "guest-guest", "guest-self"]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("bound", ["loopback", "any"])
@pytest.mark.parametrize(
    ("path", "guests"),
    [(path, guests) for path in PATHS for guests in (1, 3) if (path, guests) != ("guest-guest", 1)],
)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_matrix(make_pod: Callable[..., Any], kind: str, path: str, guests: int, bound: str, family: int) -> None:
    pod = make_pod(guests=guests)
    first, last = pod.guests[0], pod.guests[-1]
    client_at, server_at = {
        "container-guest": (None, last),
        "guest-container": (first, None),
        "guest-guest": (first, last),
        "guest-self": (first, first),
    }[path]
    if server_at:
        address = guest_address(family, server_at.index) if bound == "loopback" else ANY[family]
    else:
        address = LOOPBACK[family] if bound == "loopback" else ANY[family]
    target = BRIDGE[family] if client_at else LOOPBACK[family]
    seen_as = BRIDGE[family] if server_at else LOOPBACK[family]
    exchange = tcp_exchange if kind == "tcp" else udp_exchange
    peer = exchange(pod, client_at, server_at, FAMILIES[family], address, target)
    assert peer == seen_as
    drops = {reason.name for reason in pod.table.counters(pod.id)} - {"REDIRECTED", "PASSED", "REFUSED_BY_SOME"}
    assert not drops


def tcp_exchange(pod: Any, client_at: Any, server_at: Any, family: Any, address: str, target: str) -> str:
    """Returns the client's address as the server sees it."""
    with (
        pod.socket(server_at, family, socket.SOCK_STREAM) as server,
        pod.socket(client_at, family, socket.SOCK_STREAM) as client,
    ):
        server.bind((address, 8080))
        server.listen()
        client.connect((target, 8080))
        accepted, peer = server.accept()
        with accepted:
            accepted.settimeout(3)
            for sender, receiver in ((client, accepted), (accepted, client)):
                data = bytes(range(256)) * 800
                sender.sendall(data)
                got = b""
                while len(got) < len(data):
                    got += receiver.recv(1 << 20)
                assert got == data
            client.shutdown(socket.SHUT_WR)
            assert accepted.recv(1) == b""
        assert client.recv(1) == b""
        return str(peer[0])


def udp_exchange(pod: Any, client_at: Any, server_at: Any, family: Any, address: str, target: str) -> str:
    with (
        pod.socket(server_at, family, socket.SOCK_DGRAM) as server,
        pod.socket(client_at, family, socket.SOCK_DGRAM) as client,
    ):
        server.bind((address, 5353))
        client.connect((target, 5353))
        for size in (0, 1, 1400):
            client.send(b"q" * size)
            data, peer = server.recvfrom(2000)
            assert data == b"q" * size
            server.sendto(b"a" * size, peer)
            assert client.recv(2000) == b"a" * size
        return str(peer[0])


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("client", "guests"), [("container", 0), ("container", 1), ("container", 3), ("guest", 1), ("guest", 3)]
)
def test_nobody_listens(make_pod: Callable[..., Any], client: str, guests: int, family: int) -> None:
    pod = make_pod(guests=guests)
    where, target = (pod.guests[0], BRIDGE) if client == "guest" else (None, LOOPBACK)
    with pod.socket(where, FAMILIES[family], socket.SOCK_STREAM) as tcp:
        tcp.settimeout(0.8)  # below a SYN's retransmission
        with pytest.raises(ConnectionRefusedError):
            tcp.connect((target[family], 8080))
    with pod.socket(where, FAMILIES[family], socket.SOCK_DGRAM) as udp:
        udp.connect((target[family], 8080))
        udp.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            udp.recv(1)


@pytest.mark.parametrize("family", [4, 6])
def test_datagram_larger_than_a_guest_takes(make_pod: Callable[..., Any], family: int) -> None:
    pod = make_pod()
    with (
        pod.socket(pod.guests[0], FAMILIES[family], socket.SOCK_DGRAM) as server,
        pod.socket(None, FAMILIES[family], socket.SOCK_DGRAM) as client,
    ):
        server.bind((ANY[family], 5353))
        client.connect((LOOPBACK[family], 5353))
        largest = 1500 - (28 if family == 4 else 48)
        client.send(b"x" * largest)
        assert len(server.recv(2000)) == largest
        client.send(b"x" * (largest + 1))
        with pytest.raises(OSError, match="Message too long"):
            client.recv(1)
        client.send(b"again")
        assert server.recv(2000) == b"again"
        dropped = {reason.name: count for reason, count in pod.table.counters(pod.id).items()}
        assert dropped["TOO_BIG"] == 1
    # The pod's own loopback is as wide as before.
    with (
        pod.socket(None, FAMILIES[family], socket.SOCK_DGRAM) as server,
        pod.socket(None, FAMILIES[family], socket.SOCK_DGRAM) as client,
    ):
        server.bind((LOOPBACK[family], 5454))
        client.connect((LOOPBACK[family], 5454))
        option = (socket.IPPROTO_IP, 14) if family == 4 else (socket.IPPROTO_IPV6, 24)  # IP_MTU, IPV6_MTU
        assert client.getsockopt(*option) >= 65535
