"""Whatever a stranger does to a pod's links, the supervisor mends it: within a second, and open connections go on.

The guest is played by a namespace, and the supervisor by its task alone, in the test's own nursery.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
import trio

from launcher import healing, net, pod, state
from launcher.healing import OFTEN, heal

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
        mtu=1500,
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
                await trio.to_thread.run_sync(member.attach, table)
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
    "uplink-filter": ("tc filter del dev eth0 ingress", "uplink eth0: the router was removed"),
    "uplink-qdisc": ("tc qdisc del dev eth0 clsact", "uplink eth0: the router was removed"),
    "lo-route-localnet": ("sysctl -qw net.ipv4.conf.lo.route_localnet=0", "route_localnet was set to 0"),
    "lo-accept-local": ("sysctl -qw net.ipv4.conf.lo.accept_local=0", "accept_local was set to 0"),
    # What comes while something else is being mended may be mended along with it, without a line of its own.
    "everything": (
        f"ip link del ukbr0; ip link set lo down; tc qdisc del dev {TAP} clsact; ip addr flush dev lo",
        "bridge ukbr0 was removed",
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
            links = {name: found for name, found in net.link_indexes(played.netns).items() if name != "eth0"}
            assert links == {"lo": 1, net.BRIDGE: index, TAP: member.ifindex}
            for connection in open_ones:
                await trio.to_thread.run_sync(talk, *connection)
        await trio.to_thread.run_sync(everything_works, played)


@pytest.fixture
def pod_of_three() -> Iterator[PlayedPod]:
    with played_pod(3, name="healing-3") as made:
        yield made


async def test_a_bridge_is_mended_by_one_of_several_supervisors(pod_of_three: PlayedPod) -> None:
    members = [membership(pod_of_three, guest.index) for guest in pod_of_three.guests]
    async with supervised(*members) as heard:
        await trio.to_thread.run_sync(run, pod_of_three, "ip link del ukbr0")
        for member in members:
            await heard.until(f"TAP {member.tap} was taken off its bridge")
        await settled(heard)
        for what in ("bridge ukbr0 was removed", *(f"TAP {member.tap} was taken off its bridge" for member in members)):
            assert heard.lines.count(f"mended: {what}") == 1, heard.lines
        assert all(line.startswith("mended: ") for line in heard.lines), heard.lines
    await trio.to_thread.run_sync(everything_works, pod_of_three)


async def test_what_strangers_add_is_left_alone(played: PlayedPod) -> None:
    theirs = "ip addr add 10.9.9.1/24 dev ukbr0; ip link add theirs type bridge; ip route add 10.8.0.0/16 via 10.9.9.2"
    async with supervised(membership(played)) as heard:
        run(played, f"ip link set ukbr0 down; ip link set ukbr0 up; {theirs}; tc qdisc add dev theirs clsact")
        await settled(heard)
        run(played, "ip addr show ukbr0 | grep -q 10.9.9.1; ip route | grep -q 10.8.0.0; tc qdisc | grep -q theirs")
        run(played, "ip link del theirs; ip addr del 10.9.9.1/24 dev ukbr0")


async def test_a_sysctl_written_through_another_proc(played: PlayedPod, monkeypatch: pytest.MonkeyPatch) -> None:
    """No event tells of it: it is found when the supervisor looks again."""
    monkeypatch.setattr(healing, "RECHECK_S", 0.2)
    async with supervised(membership(played)) as heard:
        run(played, "unshare --mount --pid --fork --mount-proc sysctl -qw net.ipv4.conf.lo.route_localnet=0")
        await heard.until("mended: lo: net.ipv4.conf.lo.route_localnet was set to 0")


# --- what cannot be mended is said ---


PASS_ALL = "bpf bytecode '1,6 0 0 4294967295'"  # classic BPF: return -1, which is a match


async def test_another_program_before_the_router(played: PlayedPod) -> None:
    async with supervised(membership(played)) as heard:
        run(played, f"tc filter add dev {TAP} ingress pref 1 {PASS_ALL}")
        await heard.until(f"cannot mend: TAP {TAP}: another program was put before the router")
        remedy = heard.lines[-1].rpartition("to take it off: ")[2]
        run(played, "ip link set ukbr0 down")
        await heard.until("mended: bridge ukbr0 was set down")
        assert sum("another program" in line for line in heard.lines) == 1
        run(played, f"tc filter show dev {TAP} ingress | grep -q 'pref 1 '")  # it is theirs
        run(played, remedy)
        await settled(heard)
        run(played, f"tc filter add dev {TAP} ingress pref 7 {PASS_ALL}")
        await heard.until("pref 7")
        run(played, f"tc filter del dev {TAP} ingress pref 7")


async def test_a_name_that_was_taken(played: PlayedPod) -> None:
    async with supervised(membership(played)) as heard:
        with state.pod_lock(played.record.name):  # while another one works on the pod, nobody mends
            run(played, "ip link set ukbr0 name gone; ip link add ukbr0 type bridge")
        await heard.until("cannot mend: bridge ukbr0 was renamed to gone (cannot make bridge ukbr0: File exists)")
        run(played, "ip link del ukbr0; ip link set gone down")
        await heard.until("mended: bridge ukbr0 was renamed to gone")
    everything_works(played)


async def test_a_stranger_who_never_stops(played: PlayedPod) -> None:
    async with supervised(membership(played)) as heard:
        for number in range(OFTEN):
            run(played, f"ip link set ukbr0 name again{number}")
            await heard.until(f"renamed to again{number}")
        await heard.until("again and again")
        run(played, "ip link set ukbr0 name once-more")
        await settled(heard)
        assert sum(line.startswith("mended: bridge") for line in heard.lines) == OFTEN
        assert sum("again and again" in line for line in heard.lines) == 1
    run(played, "ip link set once-more name ukbr0")


# --- TAPs ---


@pytest.fixture
def member() -> Iterator[pod.Membership]:
    """A guest's place with a TAP of the kernel's, which this process reads and writes as a VMM does."""
    with pod.joining("healing-tap", "guest") as member:
        member.connect(())
        yield member


def ask_bridge(member: pod.Membership, header: int) -> bytes:
    """ARP by the guest for the bridge's address; returns the MAC address in the answer."""
    nic = member.nic
    request = struct.pack(
        "!6s6sHHHBBH6s4s6s4s",
        *(b"\xff" * 6, nic.mac, 0x0806),
        *(1, 0x0800, 6, 4, 1),
        *(nic.mac, nic.ipv4.ip.packed, bytes(6), nic.gateway_ipv4.packed),
    )
    for _ in range(10):  # a link that has just been set up may lose what is sent at once
        os.write(member.tap_fd, bytes(header) + request)
        while select.select([member.tap_fd], [], [], SECOND / 10)[0]:
            frame = os.read(member.tap_fd, 2048)[header:]
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\x00\x02":
                return frame[22:28]
    raise AssertionError("no answer")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ip link del uktap2", "TAP uktap2 was removed"),
        ("ip link set uktap2 netns /run/netns/ukt-elsewhere", "TAP uktap2 was removed"),
        # What goes while something else is being mended may be mended along with it, without a line of its own.
        ("ip link del uktap2; ip link del ukbr0", ""),
    ],
    ids=["removed", "moved", "removed-with-the-bridge"],
)
async def test_a_tap_comes_back_to_the_file_that_reads_it(command: str, message: str, member: pod.Membership) -> None:
    header, checksums_and_tso = 12, 0x1 | 0x2 | 0x4
    heard = Heard()
    with elsewhere():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(heal, member, heard.say)
            assert ask_bridge(member, 10) == PLAN.mac
            # As a VMM does when its guest's driver has started: the supervisor takes note.
            fcntl.ioctl(member.tap_fd, 0x400454D8, struct.pack("i", header))
            fcntl.ioctl(member.tap_fd, 0x400454D0, checksums_and_tso)
            await settled(heard)
            assert ask_bridge(member, header) == PLAN.mac
            await trio.to_thread.run_sync(subprocess.run, ["nsenter", f"--net={member.netns}", "sh", "-ec", command])
            await heard.until(f"mended: {message}")
            await settled(heard)
            assert all(line.startswith("mended: ") for line in heard.lines), heard.lines
            assert net.link_indexes(member.netns)[member.tap] == member.ifindex
            assert net.tap_offload(member.netns, member.tap_fd, member.tap) == net.TapOffload(
                header=header, flags=checksums_and_tso
            )
            assert ask_bridge(member, header) == PLAN.mac
            nursery.cancel_scope.cancel()


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    ip("netns", "add", "ukt-elsewhere")
    try:
        yield
    finally:
        ip("netns", "del", "ukt-elsewhere")


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
