"""Guests that speak one IP version alone, as OSv does: callers of the other are served all the same."""

from __future__ import annotations

import errno
import itertools
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from launcher import net

from .conftest import PlayedPod, played_pod

pytestmark = pytest.mark.net

TIMEOUT_S = 5
BULK = bytes(range(256)) * 20_000  # 5 MB: many GSO packets both ways
ports = itertools.count(9000)


@pytest.fixture(scope="module")
def osv_like() -> Iterator[PlayedPod]:
    """Guest 2 has IPv4 alone."""
    with played_pod(1, ipv6=False, name="nettest-v4") as pod:
        yield pod


def open_in(netns: Path, family: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = net.in_netns(netns, partial(socket.socket, socket.AF_INET if family == 4 else socket.AF_INET6, kind))
    sock.settimeout(TIMEOUT_S)
    return sock


def echo_all(server: socket.socket, seen: list[str]) -> None:
    connection, peer = server.accept()
    seen.append(peer[0])
    with connection:
        connection.settimeout(TIMEOUT_S)
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def exchange(client: socket.socket, address: tuple[str, int]) -> bytes:
    """Send BULK while reading what comes back."""
    client.connect(address)
    sender = threading.Thread(target=lambda: (client.sendall(BULK), client.shutdown(socket.SHUT_WR)))
    sender.start()
    received = b"".join(iter(partial(client.recv, 1 << 16), b""))
    sender.join()
    return received


def test_a_caller_on_ipv6_is_served_over_ipv4(osv_like: PlayedPod) -> None:
    port, seen = next(ports), list[str]()
    with open_in(osv_like.guests[0].netns, 4) as server, open_in(osv_like.netns, 6) as client:
        server.bind(("0.0.0.0", port))
        server.listen()
        served = threading.Thread(target=echo_all, args=(server, seen))
        served.start()
        assert exchange(client, ("::1", port)) == BULK
        served.join()
    assert seen == ["169.254.77.1"]


def test_a_guest_on_ipv4_reaches_a_server_on_ipv6_loopback(osv_like: PlayedPod) -> None:
    port, seen = next(ports), list[str]()
    with open_in(osv_like.netns, 6) as server, open_in(osv_like.guests[0].netns, 4) as client:
        server.bind(("::1", port))
        server.listen()
        served = threading.Thread(target=echo_all, args=(server, seen))
        served.start()
        assert exchange(client, ("169.254.77.1", port)) == BULK
        served.join()
    assert seen == ["::1"]


def test_datagrams_and_their_refusal(osv_like: PlayedPod) -> None:
    port = next(ports)
    with open_in(osv_like.netns, 6, socket.SOCK_DGRAM) as client:
        client.connect(("::1", port))
        with open_in(osv_like.guests[0].netns, 4, socket.SOCK_DGRAM) as server:
            server.bind(("0.0.0.0", port))
            client.send(b"question")
            question, peer = server.recvfrom(100)
            server.sendto(b"answer", peer)
            assert (question, client.recv(100)) == (b"question", b"answer")
        client.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)


def test_a_closed_port_is_refused_at_once(osv_like: PlayedPod) -> None:
    with open_in(osv_like.netns, 6) as client:
        assert client.connect_ex(("::1", next(ports))) == errno.ECONNREFUSED


def test_asked_together_with_one_that_speaks_both() -> None:
    """Two guests are asked, each in the IP version that it has; the one that serves the port gets the caller."""
    from .conftest import played_guest

    with played_pod(1, name="nettest-mixed") as pod, played_guest(pod.record, pod.table, 3, ipv6=False) as v4_alone:
        for guest, family, bind in ((pod.guests[0], 6, "::"), (v4_alone, 4, "0.0.0.0")):
            port = next(ports)
            with open_in(guest.netns, family) as server, open_in(pod.netns, 6) as client:
                server.bind((bind, port))
                server.listen()
                client.connect(("::1", port))
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"hello")
                    assert client.recv(10) == b"hello"
