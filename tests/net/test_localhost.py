"""The promise: everything in a pod reaches everything else on localhost.

{container→guest, guest→container, guest→guest, guest→self} × {TCP, UDP} × {IPv4, IPv6} × {server bound to loopback,
to any} × {1, 3 guests}, on real kernels. A server inside a guest that is bound to the guest's own loopback is out of
reach by design, so for servers in guests "loopback" is the guest's own address.
"""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import net

from .conftest import PLAN, PlayedPod, played_pod

pytestmark = pytest.mark.net

TIMEOUT_S = 5
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
ANY = {4: "0.0.0.0", 6: "::"}
BRIDGE = {4: str(PLAN.ipv4.ip), 6: str(PLAN.ipv6.ip)}
BULK = bytes(range(256)) * 4096  # 1 MiB: segmentation offload on the way

ports = itertools.count(20000)


@dataclass(frozen=True)
class Case:
    client: str  # container, or a guest's index
    server: str
    protocol: str
    version: int
    bound: str  # loopback or any
    guests: int

    def __str__(self) -> str:
        return f"{self.client}-{self.server}-{self.protocol}{self.version}-{self.bound}-{self.guests}guests"


def cases() -> Iterator[Case]:
    for guests, protocol, version, bound in itertools.product((1, 3), KINDS, FAMILIES, ("loopback", "any")):
        ways = [("container", "2"), ("2", "container"), ("2", "2")]
        if guests > 1:
            ways += [("container", "4"), ("2", "4"), ("4", "3")]
        for client, server in ways:
            yield Case(client, server, protocol, version, bound, guests)


def place(pod: PlayedPod, who: str) -> Path:
    return pod.netns if who == "container" else pod.guests[int(who) - 2].netns


def localhost(who: str, version: int) -> str:
    return LOOPBACK[version] if who == "container" else BRIDGE[version]


def own_address(pod: PlayedPod, who: str, version: int) -> str:
    nic = pod.guests[int(who) - 2].nic
    return str(nic.ipv4.ip if version == 4 else nic.ipv6.ip)


def open_in(netns: Path, version: int, protocol: str) -> socket.socket:
    sock = net.in_netns(netns, lambda: socket.socket(FAMILIES[version], KINDS[protocol]))
    sock.settimeout(TIMEOUT_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_localhost(case: Case, make_pod: Callable[[int], PlayedPod]) -> None:
    pod = make_pod(case.guests)
    port = next(ports)
    if case.bound == "any":
        bind = ANY[case.version]
    elif case.server == "container":
        bind = LOOPBACK[case.version]
    else:
        bind = own_address(pod, case.server, case.version)
    with (
        open_in(place(pod, case.server), case.version, case.protocol) as server,
        open_in(place(pod, case.client), case.version, case.protocol) as client,
    ):
        server.bind((bind, port))
        target = (localhost(case.client, case.version), port)
        peer = talk_tcp(server, client, target) if case.protocol == "tcp" else talk_udp(server, client, target)
    # Servers in containers take a guest for a local client; guests know localhost as the bridge.
    assert peer == localhost(case.server, case.version)


def talk_tcp(server: socket.socket, client: socket.socket, target: tuple[str, int]) -> str:
    """Data both ways; returns who the server takes the client for."""
    server.listen()
    client.connect(target)
    accepted, peer = server.accept()
    with accepted:
        accepted.settimeout(TIMEOUT_S)
        assert client.getpeername()[:2] == target
        for sender, receiver in ((client, accepted), (accepted, client)):
            send_bulk(sender, receiver)
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
    assert client.recv(1) == b""
    return str(peer[0])


def send_bulk(sender: socket.socket, receiver: socket.socket) -> None:
    received = bytearray()
    position = 0
    while len(received) < len(BULK):
        if position < len(BULK):
            position += sender.send(BULK[position : position + (64 << 10)])
        while len(received) < position:
            received += receiver.recv(1 << 20)
    assert received == BULK


def talk_udp(server: socket.socket, client: socket.socket, target: tuple[str, int]) -> str:
    client.connect(target)
    peers = set()
    for payload in (b"one", b"x" * 1400, b""):
        client.send(payload)
        data, peer = server.recvfrom(2048)
        assert data == payload
        server.sendto(payload.upper(), peer)
        assert client.recv(2048) == payload.upper()
        peers.add(peer)
    assert len(peers) == 1  # one flow, not three
    return str(peers.pop()[0])


WAYS = [("container", 4), ("container", 6), ("2", 4), ("2", 6)]


@pytest.mark.parametrize(
    ("client", "version", "guests"),
    [(*way, guests) for way in WAYS for guests in (0, 1, 3) if guests or way[0] == "container"],
)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_nobody_listens_is_refused_at_once(
    client: str, version: int, protocol: str, guests: int, make_pod: Callable[[int], PlayedPod]
) -> None:
    pod = make_pod(guests)
    with open_in(place(pod, client), version, protocol) as sock:
        sock.settimeout(2)
        target = (localhost(client, version), next(ports))
        with pytest.raises(ConnectionRefusedError):
            ask(sock, target)


def ask(sock: socket.socket, target: tuple[str, int]) -> bytes:
    sock.connect(target)
    sock.send(b"anybody?")
    return sock.recv(1)


@pytest.mark.parametrize("version", [4, 6])
def test_containers_among_themselves_are_left_alone(version: int, make_pod: Callable[[int], PlayedPod]) -> None:
    pod = make_pod(3)
    port = next(ports)
    with open_in(pod.netns, version, "tcp") as server, open_in(pod.netns, version, "tcp") as client:
        server.bind((LOOPBACK[version], port))
        assert talk_tcp(server, client, (LOOPBACK[version], port)) == LOOPBACK[version]
    assert not [flow for flow in pod.table.flows(pod.record.id) if flow.dialled.port == port]


def test_a_container_that_listens_is_preferred_to_a_guest(make_pod: Callable[[int], PlayedPod]) -> None:
    pod = make_pod(1)
    port = next(ports)
    with open_in(pod.guests[0].netns, 4, "tcp") as in_guest, open_in(pod.netns, 4, "tcp") as in_container:
        in_guest.bind((ANY[4], port))
        with open_in(pod.netns, 4, "tcp") as first:
            assert talk_tcp(in_guest, first, (LOOPBACK[4], port)) == BRIDGE[4]
        in_container.bind((LOOPBACK[4], port))
        with open_in(pod.netns, 4, "tcp") as second:
            assert talk_tcp(in_container, second, (LOOPBACK[4], port)) == LOOPBACK[4]


def test_eight_guests_each_serve_a_port() -> None:
    with played_pod(8, name="nettest-8") as pod:
        for guest, version in itertools.product(pod.guests, (4, 6)):
            port = next(ports)
            with open_in(guest.netns, version, "tcp") as server, open_in(pod.netns, version, "tcp") as client:
                server.bind((ANY[version], port))
                assert talk_tcp(server, client, (LOOPBACK[version], port)) == BRIDGE[version]


def test_flows_of_one_pod_are_unknown_to_another(make_pod: Callable[[int], PlayedPod]) -> None:
    one, other = make_pod(1), make_pod(3)
    port = next(ports)
    with open_in(one.guests[0].netns, 4, "tcp") as server, open_in(one.netns, 4, "tcp") as client:
        server.bind((ANY[4], port))
        server.listen()
        client.connect((LOOPBACK[4], port))
        assert any(flow.dialled.port == port for flow in one.table.flows(one.record.id))
        assert not any(flow.dialled.port == port for flow in other.table.flows(other.record.id))
        with open_in(other.netns, 4, "tcp") as stranger:
            assert stranger.connect_ex((LOOPBACK[4], port)) == errno.ECONNREFUSED


@pytest.mark.parametrize("version", [4, 6])
def test_a_datagram_too_large_for_a_guest_is_an_error_to_its_sender(version: int) -> None:
    with played_pod(1, name="nettest-mtu") as pod:
        port, largest = next(ports), 1500 - (28 if version == 4 else 48)
        with open_in(pod.guests[0].netns, version, "udp") as server, open_in(pod.netns, version, "udp") as client:
            server.bind((ANY[version], port))
            client.connect((LOOPBACK[version], port))
            client.send(b"x" * largest)
            assert len(server.recv(2000)) == largest
            client.send(b"x" * (largest + 1))
            with pytest.raises(OSError, match="Message too long"):
                client.recv(1)
            client.send(b"again")
            assert server.recv(2000) == b"again"
        counted = {reason.name: count for reason, count in pod.table.counters(pod.record.id).items()}
        assert counted["TOO_BIG"] == 1
        # The pod's own loopback is as wide as before.
        with open_in(pod.netns, version, "udp") as server, open_in(pod.netns, version, "udp") as client:
            server.bind((LOOPBACK[version], port))
            client.connect((LOOPBACK[version], port))
            option = (socket.IPPROTO_IP, 14) if version == 4 else (socket.IPPROTO_IPV6, 24)  # IP_MTU, IPV6_MTU
            assert client.getsockopt(*option) >= 65535
