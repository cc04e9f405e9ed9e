"""Whatever a stranger does to a pod's links, the supervisor mends it: within a second, and open connections go on.

The guest is played by a namespace, and the supervisor by its task alone, in the test's own nursery.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio

from launcher import net, pod, state
from launcher.healing import heal

from .conftest import PLAN, PlayedPod, ip, played_pod

pytestmark = pytest.mark.net

SECOND = 1.0  # what is promised
TAP = "uktap2"
NO_TAP = 0
CALM_S = 0.3  # no message within: nothing more is being mended


@dataclass
class Heard:
    """What the supervisor says, in order."""

    lines: list[str] = field(default_factory=list)
    said: trio.Event = field(default_factory=trio.Event)

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.said.set()
        self.said = trio.Event()

    async def until(self, words: str) -> None:
        """Until a line holds the words. Raises trio.TooSlowError after a second."""
        with trio.fail_after(SECOND):
            while not any(words in line for line in self.lines):
                await self.said.wait()


def membership(played: PlayedPod, index: int = 2, tap_fd: int = NO_TAP) -> pod.Membership:
    """`tap_fd`: left out for a veth, which is no TAP."""
    tap = f"uktap{index}"
    return pod.Membership(
        record=played.record,
        guest="test",
        index=index,
        tap=tap,
        tap_fd=tap_fd,
        _lock=contextlib.ExitStack(),
        ifindex=net.link_indexes(played.netns)[tap],
    )


@contextlib.asynccontextmanager
async def supervised(*members: pod.Membership) -> AsyncIterator[Heard]:
    """Their supervisors at work; they have looked once, and found nothing to mend, on entry."""
    heard = Heard()
    async with trio.open_nursery() as nursery:
        with pod.open_router() as table:
            for member in members:
                await trio.to_thread.run_sync(member.attach, table.program_fd)
                nursery.start_soon(heal, member, heard.say)
        await settled(heard)
        assert not heard.lines
        yield heard
        nursery.cancel_scope.cancel()


async def settled(heard: Heard) -> None:
    while True:
        with trio.move_on_after(CALM_S) as scope:
            await heard.said.wait()
        if scope.cancelled_caught:
            return


@pytest.fixture(scope="module")
def played() -> Iterator[PlayedPod]:
    with played_pod(1, name="healing") as made:
        yield made


def run(played: PlayedPod, command: str) -> None:
    subprocess.run(["nsenter", f"--net={played.netns}", "sh", "-ec", command], check=True)


# --- every deed ---

DEEDS = {
    "bridge-down": ("ip link set ukbr0 down", "bridge ukbr0 was set down"),
    "bridge-removed": ("ip link del ukbr0", "bridge ukbr0 was removed"),
    "bridge-renamed": ("ip link set ukbr0 name other", "bridge ukbr0 was renamed to other"),
    "bridge-mac": ("ip link set ukbr0 address 02:00:00:00:00:99", "was given the MAC address 02:00:00:00:00:99"),
    "bridge-ipv4": ("ip addr del 169.254.77.1/24 dev ukbr0", "address 169.254.77.1/24 was removed"),
    "bridge-ipv6": ("ip addr del fd00:77::1/64 dev ukbr0", "address fd00:77::1/64 was removed"),
    "bridge-flush": ("ip addr flush dev ukbr0", "address fd00:77::1/64 was removed"),
    "bridge-readdressed": (
        "ip addr flush dev ukbr0; ip addr add 10.7.7.1/24 dev ukbr0",
        "address 169.254.77.1/24 was removed",
    ),
    "bridge-route": ("ip route del 169.254.77.0/24", "the route of 169.254.77.1/24 was removed"),
    "bridge-route6": ("ip -6 route del fd00:77::/64", "the route of fd00:77::1/64 was removed"),
    "bridge-ipv6-off": ("sysctl -qw net.ipv6.conf.ukbr0.disable_ipv6=1", "disable_ipv6 was set to 1"),
    "bridge-accept-ra": ("sysctl -qw net.ipv6.conf.ukbr0.accept_ra=2", "accept_ra was set to 2"),
    "all-ipv6-off": ("sysctl -qw net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.lo.disable_ipv6 was set to 1"),
    "tap-down": (f"ip link set {TAP} down", f"TAP {TAP} was set down"),
    "tap-renamed": (f"ip link set {TAP} name tap0", f"TAP {TAP} was renamed to tap0"),
    "tap-nomaster": (f"ip link set {TAP} nomaster", f"TAP {TAP} was taken off its bridge"),
    "tap-other-master": (
        f"ip link add br9 type bridge; ip link set {TAP} master br9; ip link del br9",
        f"TAP {TAP} was taken off its bridge",
    ),
    "tap-qdisc": (f"tc qdisc del dev {TAP} clsact", f"TAP {TAP}: the router was removed"),
    "tap-filter": (f"tc filter del dev {TAP} ingress", f"TAP {TAP}: the router was removed"),
    "tap-sysctl": (f"sysctl -qw net.ipv6.conf.{TAP}.disable_ipv6=0", "disable_ipv6 was set to 0"),
    "tap-alias": (f"ip link set {TAP} alias mine", f"TAP {TAP} was given another alias"),
    "lo-down": ("ip link set lo down", "lo was set down"),
    "lo-ipv4": ("ip addr del 127.0.0.1/8 dev lo", "lo: address 127.0.0.1/8 was removed"),
    "lo-ipv6": ("ip addr del ::1/128 dev lo", "lo: address ::1/128 was removed"),
    "lo-flush": ("ip addr flush dev lo", "lo: address 127.0.0.1/8 was removed"),
    "lo-qdisc": ("tc qdisc del dev lo clsact", "lo: the router was removed"),
    "lo-filter": ("tc filter del dev lo egress", "lo: the router was removed"),
    "lo-route-localnet": ("sysctl -qw net.ipv4.conf.lo.route_localnet=0", "route_localnet was set to 0"),
    "lo-accept-local": ("sysctl -qw net.ipv4.conf.lo.accept_local=0", "accept_local was set to 0"),
    "everything": (
        f"ip link del ukbr0; ip link set lo down; tc qdisc del dev {TAP} clsact; ip addr flush dev lo",
        f"TAP {TAP}: the router was removed",
    ),
}


@pytest.mark.parametrize("deed", DEEDS)
async def test_a_strangers_deed_is_mended(deed: str, played: PlayedPod) -> None:
    command, message = DEEDS[deed]
    member = membership(played)
    index = played.record.bridge
    async with supervised(member) as heard:
        with connections(played) as open_ones:
            await trio.to_thread.run_sync(run, played, command)
            await heard.until(message)
            await settled(heard)
            assert all(line.startswith("mended: ") for line in heard.lines), heard.lines
            assert net.link_indexes(played.netns) == {"lo": 1, net.BRIDGE: index, TAP: member.ifindex}
            for connection in open_ones:
                await trio.to_thread.run_sync(talk, *connection)
        await trio.to_thread.run_sync(everything_works, played)


# --- what works ---


@contextlib.contextmanager
def connections(played: PlayedPod) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Open TCP connections: container to guest and guest to container, over IPv4 and IPv6; each has moved data."""
    with contextlib.ExitStack() as stack:
        made = []
        for version in (4, 6):
            for server_in_guest in (True, False):
                pair = connect(played, version, server_in_guest)
                made.append(tuple(stack.enter_context(end) for end in pair))
        for pair in made:
            talk(*pair)
        yield made


def connect(played: PlayedPod, version: int, server_in_guest: bool) -> tuple[socket.socket, socket.socket]:
    guest = played.guests[0]
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    loopback, any_address = ("127.0.0.1", "0.0.0.0") if version == 4 else ("::1", "::")
    bridge = str(PLAN.ipv4.ip if version == 4 else PLAN.ipv6.ip)
    places = (guest.netns, played.netns) if server_in_guest else (played.netns, guest.netns)
    bind, dial = (any_address, loopback) if server_in_guest else (loopback, bridge)
    with net.in_netns(places[0], lambda: socket.create_server((bind, 0), family=family)) as server:
        client = net.in_netns(places[1], lambda: socket.socket(family, socket.SOCK_STREAM))
        for sock in (server, client):
            sock.settimeout(5)
        client.connect((dial, server.getsockname()[1]))
        accepted, _ = server.accept()
        accepted.settimeout(5)
        return client, accepted


def talk(one: socket.socket, other: socket.socket) -> None:
    """256 KiB each way."""
    chunk = bytes(range(256)) * 64
    for sender, receiver in ((one, other), (other, one)):
        for _ in range(16):
            sender.sendall(chunk)
            assert receive_exactly(receiver, len(chunk)) == chunk


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        received = sock.recv(count - len(data))
        assert received, "the connection has ended"
        data += received
    return data


def everything_works(played: PlayedPod) -> None:
    """New connections, every way; and the router is where it was, once."""
    for version in (4, 6):
        for server_in_guest in (True, False):
            pair = connect(played, version, server_in_guest)
            with pair[0], pair[1]:
                talk(*pair)
    for device, hook in (("lo", "egress"), (TAP, "ingress")):
        shown = subprocess.run(
            ["nsenter", f"--net={played.netns}", "tc", "filter", "show", "dev", device, hook],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert shown.count("direct-action") == 1, shown
