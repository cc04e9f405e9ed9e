"""The program on made-up packets: what comes out, where it goes, and that every checksum is right (packets.py)."""

from __future__ import annotations

import errno
import select
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import router

from .packets import (
    ACK,
    BRIDGE,
    BRIDGE_MAC,
    DROP,
    GUEST2,
    GUEST3,
    ICMP,
    LO,
    LOCALHOST,
    MAC2,
    MAC3,
    PASS,
    POD,
    REDIRECT,
    RST,
    SYN,
    SYNACK,
    TAP2,
    TAP3,
    TCP,
    UDP,
    ZERO_MAC,
    Hooks,
    Parsed,
    both_families,
    both_protocols,
    checksum,
    eth,
    guest_row,
    ip,
    packet,
    parse,
    parse_headers,
    pseudo,
)  # fmt: skip

pytestmark = pytest.mark.bpf

# --- forward and reverse ---


@both_families
@both_protocols
def test_container_to_guest(hooks: Hooks, family: int, proto: int) -> None:
    """127.0.0.1:40000 -> 127.0.0.1:80 leaves as bridge:40000 -> guest:80, and the answer comes back."""
    here, bridge, guest = LOCALHOST[family], BRIDGE[family], GUEST2[family]
    verdict, frame = hooks.send(LO, packet(here, 40000, here, 80, proto=proto, data=b"odd"))
    out = parse(frame)
    assert verdict == REDIRECT
    assert (out.source, out.target, out.ports) == (bridge, guest, (40000, 80))
    assert (out.source_mac, out.target_mac) == (BRIDGE_MAC, MAC2)

    verdict, frame = hooks.send(TAP2, packet(guest, 80, bridge, 40000, proto=proto, flags=SYNACK, mac=MAC2))
    back = parse(frame)
    assert verdict == REDIRECT
    assert (back.source, back.target, back.ports) == (here, here, (80, 40000))
    assert (back.source_mac, back.target_mac) == (ZERO_MAC, ZERO_MAC)

    verdict, frame = hooks.send(LO, packet(here, 40000, here, 80, proto=proto, flags=ACK, data=b"more"))
    assert verdict == REDIRECT
    assert parse(frame).target == guest


@both_families
@both_protocols
@pytest.mark.parametrize("bound", ["loopback", "any"])
def test_guest_to_container(hooks: Hooks, bound: str, family: int, proto: int) -> None:
    """guest:40000 -> bridge:8080 arrives as 127.0.0.1:x -> 127.0.0.1:8080."""
    here, bridge, guest = LOCALHOST[family], BRIDGE[family], GUEST2[family]
    kind = (
        (socket.AF_INET if family == 4 else socket.AF_INET6),
        (socket.SOCK_STREAM if proto == TCP else socket.SOCK_DGRAM),
    )
    with hooks.in_thread(lambda: socket.socket(*kind)) as server:
        server.bind((here if bound == "loopback" else "", 8080))
        if proto == TCP:
            server.listen()
        verdict, frame = hooks.send(TAP2, packet(guest, 40000, bridge, 8080, proto=proto, mac=MAC2))
    out = parse(frame)
    assert verdict == REDIRECT
    assert (out.source, out.target, out.target_mac) == (here, here, ZERO_MAC)
    port, to = out.ports
    assert port >= 61000
    assert to == 8080

    verdict, frame = hooks.send(LO, packet(here, 8080, here, port, proto=proto, flags=SYNACK))
    back = parse(frame)
    assert verdict == REDIRECT
    assert (back.source, back.target, back.ports) == (bridge, guest, (8080, 40000))
    assert (back.source_mac, back.target_mac) == (BRIDGE_MAC, MAC2)


@both_families
@both_protocols
def test_hairpin(hooks: Hooks, family: int, proto: int) -> None:
    """A guest that dials localhost, and serves the port itself."""
    bridge, guest = BRIDGE[family], GUEST2[family]
    verdict, frame = hooks.send(TAP2, packet(guest, 40000, bridge, 80, proto=proto, mac=MAC2))
    out = parse(frame)
    assert verdict == REDIRECT
    assert (out.source, out.target, out.ports, out.target_mac) == (bridge, guest, (40000, 80), MAC2)
    verdict, frame = hooks.send(TAP2, packet(guest, 80, bridge, 40000, proto=proto, flags=SYNACK, mac=MAC2))
    back = parse(frame)
    assert verdict == REDIRECT
    assert (back.source, back.target, back.ports, back.target_mac) == (bridge, guest, (80, 40000), MAC2)


def test_hairpin_from_the_port_to_itself(hooks: Hooks) -> None:
    """Port 80 dials port 80: the two directions must not share a key."""
    verdict, frame = hooks.send(TAP2, packet(GUEST2[4], 80, BRIDGE[4], 80, mac=MAC2))
    sport, dport = parse(frame).ports
    assert verdict == REDIRECT
    assert sport != 80
    assert dport == 80


@both_families
def test_datagram_without_checksum_stays_without(hooks: Hooks, family: int) -> None:
    here = LOCALHOST[family]
    verdict, frame = hooks.send(LO, packet(here, 40000, here, 53, proto=UDP, bare=True, data=b"x"))
    assert verdict == REDIRECT
    assert parse(frame).payload[6:8] == b"\0\0"


def test_ip_options(hooks: Hooks) -> None:
    verdict, frame = hooks.send(LO, packet("127.0.0.1", 40000, "127.0.0.1", 80, options=b"\x01" * 8))
    assert verdict == REDIRECT
    assert parse(frame).target == GUEST2[4]


@pytest.mark.parametrize("flags", [ACK, SYNACK, RST, 0])
def test_unknown_segment_is_left_to_the_stack(hooks: Hooks, flags: int) -> None:
    frame = packet("127.0.0.1", 40000, "127.0.0.1", 80, flags=flags)
    assert hooks.send(LO, frame) == (PASS, frame)
    frame = packet(GUEST2[4], 40000, BRIDGE[4], 80, flags=flags, mac=MAC2)
    assert hooks.send(TAP2, frame) == (PASS, frame)


def test_other_addresses_are_left_alone(hooks: Hooks) -> None:
    for target in ("127.0.0.2", "10.1.2.3", GUEST2[4]):
        frame = packet("127.0.0.1", 40000, target, 80)
        assert hooks.send(LO, frame) == (PASS, frame)
    for target in ("10.1.2.3", GUEST3[4]):
        frame = packet(GUEST2[4], 40000, target, 80, mac=MAC2)
        assert hooks.send(TAP2, frame) == (PASS, frame)


# --- errors ---


def assert_quotes(error: Parsed, sent: bytes) -> None:
    """The ICMP error is about that packet: addresses, protocol, length, ports."""
    quoted, original = parse_headers(eth(error.payload[8:], struct.unpack_from("!H", sent, 12)[0])), parse_headers(sent)
    assert quoted == original


@both_families
@pytest.mark.parametrize("direction", ["from guest", "from container"])
def test_port_unreachable(hooks: Hooks, direction: str, family: int) -> None:
    """The error comes back as one about the packet that the sender sent."""
    here, bridge, guest = LOCALHOST[family], BRIDGE[family], GUEST2[family]
    head = struct.pack("!BBHI", *((3, 3) if family == 4 else (1, 4)), 0, 0)
    if direction == "from guest":
        first = packet(here, 40000, here, 53, proto=UDP, data=b"query")
        from_hook, to_hook, source, target, mac = LO, TAP2, guest, bridge, MAC2
    else:
        first = packet(guest, 40000, bridge, 53, proto=UDP, data=b"query", mac=MAC2)
        from_hook, to_hook, source, target, mac = TAP2, LO, here, here, ZERO_MAC
        server = hooks.in_thread(
            lambda: socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        )
        server.bind((here, 53))
    _, seen = hooks.send(from_hook, first)
    if direction == "from container":
        server.close()
    body = head + seen[14:]
    covered = body if family == 4 else pseudo(source, target, 58, len(body)) + body
    body = body[:2] + struct.pack("!H", checksum(covered)) + body[4:]
    error = eth(ip(source, target, ICMP[family], body), 0x0800 if family == 4 else 0x86DD, mac, ZERO_MAC)
    parse(error)
    verdict, frame = hooks.send(to_hook, error)
    out = parse(frame)
    assert verdict == REDIRECT
    expected = (here, here) if direction == "from guest" else (bridge, guest)
    assert (out.source, out.target) == expected
    assert_quotes(out, first)


@both_families
def test_path_mtu_from_a_guest_is_dropped(hooks: Hooks, family: int) -> None:
    here, bridge, guest = LOCALHOST[family], BRIDGE[family], GUEST2[family]
    _, seen = hooks.send(LO, packet(here, 40000, here, 80))
    body = struct.pack("!BBHI", *((3, 4) if family == 4 else (2, 0)), 0, 576) + seen[14:]
    frame = eth(ip(guest, bridge, ICMP[family], body), 0x0800 if family == 4 else 0x86DD, MAC2, BRIDGE_MAC)
    assert hooks.send(TAP2, frame)[0] == DROP
    assert hooks.dropped() == {"PATH_MTU"}


@both_families
def test_datagram_too_big_becomes_its_own_answer(hooks: Hooks, family: int) -> None:
    here = LOCALHOST[family]
    sent = packet(here, 40000, here, 53, proto=UDP, data=b"x" * 3000)
    verdict, frame = hooks.send(LO, sent)
    out = parse(frame)
    assert verdict == REDIRECT
    assert hooks.dropped() == {"TOO_BIG"}
    assert (out.source, out.target, out.proto) == (here, here, ICMP[family])
    assert tuple(out.payload[:2]) == ((3, 4) if family == 4 else (2, 0))
    assert_quotes(out, sent)


# --- what a guest may send ---


def arp(mac: bytes, address: str, *, source: bytes = MAC2, operation: int = 1) -> bytes:
    body = struct.pack(
        "!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation, mac, IPv4Address(address).packed, bytes(6), bytes(4)
    )
    return eth(body, 0x0806, source, b"\xff" * 6)


def neighbour(kind: int, source: str, target: str, mac: bytes = MAC2, *, behind: int | None = None) -> bytes:
    """`behind`: hidden behind an extension header of this kind."""
    body = struct.pack("!BBHI16s", kind, 0, 0, 0, IPv6Address(target).packed)
    if behind is not None:
        body = struct.pack("!BB6x", 58, 0) + body
    return eth(ip(source, "ff02::1", 58 if behind is None else behind, body), 0x86DD, mac, b"\x33\x33\0\0\0\1")


def plain(source: str, target: str, mac: bytes = MAC2) -> bytes:
    return packet(source, 1000, target, 2000, mac=mac, flags=ACK)


ALLOWED = {
    "ARP": arp(MAC2, GUEST2[4]),
    "ARP probe": arp(MAC2, "0.0.0.0"),
    "NS": neighbour(135, GUEST2[6], BRIDGE[6]),
    "DAD": neighbour(135, "::", GUEST2[6]),
    "NA": neighbour(136, GUEST2[6], GUEST2[6]),
    "NA for its link-local address": neighbour(136, "fe80::2", "fe80::2"),
    "to another guest": plain(GUEST2[4], GUEST3[4]),
    "link-local": plain("fe80::2", "fe80::3"),
    "MLD report": eth(
        ip("fe80::2", "ff02::16", 0, bytes.fromhex("3a000502000001008f00") + bytes(18)), 0x86DD, MAC2, b"33\0\0\0\x16"
    ),
    "echo in fragments": eth(ip(GUEST2[4], BRIDGE[4], 1, bytes(40), fragment=0x0005), 0x0800, MAC2, BRIDGE_MAC),
}
FORBIDDEN = {
    "SPOOFED_MAC": [plain(GUEST2[4], GUEST3[4], MAC3), arp(MAC2, GUEST2[4], source=MAC3)],
    "SPOOFED_IPV4": [plain(GUEST3[4], BRIDGE[4]), plain(BRIDGE[4], GUEST3[4]), plain("0.0.0.0", "255.255.255.255")],
    "SPOOFED_IPV6": [plain(GUEST3[6], BRIDGE[6]), plain("2001:db8::1", BRIDGE[6]), plain("::1", GUEST3[6])],
    "SPOOFED_ARP": [arp(MAC2, GUEST3[4]), arp(MAC3, GUEST2[4]), arp(MAC2, BRIDGE[4], operation=2)],
    "SPOOFED_ND": [
        neighbour(136, GUEST2[6], GUEST3[6]),
        neighbour(136, "fe80::2", BRIDGE[6]),
        neighbour(136, GUEST2[6], GUEST2[6], behind=60),
        neighbour(134, "fe80::2", "::", behind=0),
        neighbour(136, GUEST2[6], GUEST2[6], behind=44),
    ],
    "ROUTER_ND": [neighbour(134, "fe80::2", "::"), neighbour(137, "fe80::2", GUEST3[6])],
    "MARTIAN": [plain(GUEST2[4], "127.0.0.1"), plain(GUEST2[6], "::1"), plain(GUEST2[6], "::ffff:127.0.0.1")],
    "RESERVED_GROUP": [eth(bytes(50), 0x0069, MAC2, bytes.fromhex("0180c2000000"))],
    "VLAN": [eth(b"\0\1" + plain(GUEST2[4], GUEST3[4])[12:], 0x8100, MAC2, MAC3)],
    "ETHERTYPE": [eth(bytes(50), 0x88B5, MAC2, MAC3)],
    "MALFORMED": [plain(GUEST2[4], GUEST3[4])[:40], eth(b"\x41" + bytes(40), 0x0800, MAC2, MAC3)],
    "FRAGMENT": [
        eth(ip(GUEST2[4], BRIDGE[4], UDP, bytes(40), fragment=0x0005), 0x0800, MAC2, BRIDGE_MAC),
        eth(ip(GUEST2[6], BRIDGE[6], 44, b"\x11\0\0\x28\0\0\0\7" + bytes(40)), 0x86DD, MAC2, BRIDGE_MAC),
    ],
    "EXTENSION": [
        *(
            eth(ip(GUEST2[6], BRIDGE[6], kind, bytes((59, 0)) + bytes(38)), 0x86DD, MAC2, BRIDGE_MAC)
            for kind in (0, 43, 60, 51)
        ),
        eth(ip(GUEST2[6], GUEST3[6], 0, bytes(80)), 0x86DD, MAC2, MAC3),  # more headers than anybody needs
    ],
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(hooks: Hooks, name: str) -> None:
    assert hooks.send(TAP2, ALLOWED[name]) == (PASS, ALLOWED[name])
    assert hooks.dropped() == set()


@pytest.mark.parametrize("reason", FORBIDDEN)
def test_forbidden(hooks: Hooks, reason: str) -> None:
    for frame in FORBIDDEN[reason]:
        assert hooks.send(TAP2, frame)[0] == DROP, frame.hex()
    counters = {found.name: count for found, count in hooks.table.counters(POD).items()}
    assert counters.pop("PASSED") == counters.pop("REDIRECTED") == 0
    assert counters == {reason: len(FORBIDDEN[reason])}


def test_every_reason_is_tried() -> None:
    elsewhere = {
        "UNKNOWN_GUEST", "TOO_BIG", "PATH_MTU",  # here
        "NO_CHECKSUM", "UNTRANSLATABLE",  # test_translation.py
        "REFUSED_BY_SOME", "LATE_ANSWER",  # test_ports.py
        "NO_PORT", "TABLE_FULL", "REWRITE_FAILED",  # what only a kernel out of resources does
    }  # fmt: skip
    assert {reason.name for reason in router.drop_reasons()} == set(FORBIDDEN) | elsewhere


def test_unknown_guest(hooks: Hooks) -> None:
    assert hooks.send(TAP3, plain(GUEST3[4], GUEST2[4], MAC3))[0] == DROP
    assert hooks.dropped() == {"UNKNOWN_GUEST"}


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("ARP", (True, False)), ("ARP probe", (False, False)), ("to another guest", (True, False)),
        ("NS", (False, True)), ("NA", (False, True)), ("DAD", (False, False)), ("link-local", (False, False)),
        ("NA for its link-local address", (False, False)),
    ],
)  # fmt: skip
def test_when_a_guest_is_seen(hooks: Hooks, name: str, seen: tuple[bool, bool]) -> None:
    hooks.table.add_guest(POD, guest_row(2))
    hooks.send(TAP2, ALLOWED[name])
    (row,) = hooks.table.guests(POD)
    assert (row.seen_ipv4, row.seen_ipv6) == seen


def test_whoever_watches_sees_each_drop(hooks: Hooks) -> None:
    with hooks.table.watch_drops(POD) as watch:
        assert watch.read() == []
        hooks.send(TAP2, plain(GUEST3[4], BRIDGE[4]))
        hooks.send(TAP2, arp(MAC2, GUEST3[4]))
        assert select.select([watch], [], [], 0)[0] == [watch]
        spoofed, foreign = watch.read()
        assert (spoofed.reason.name, spoofed.guest, spoofed.protocol) == ("SPOOFED_IPV4", 2, "tcp")
        assert (str(spoofed.source), spoofed.source_port) == (GUEST3[4], 1000)
        assert (str(spoofed.target), spoofed.target_port) == (BRIDGE[4], 2000)
        assert (foreign.reason.name, foreign.source, foreign.ethertype) == ("SPOOFED_ARP", None, 0x0806)
        for _ in range(10_000):  # more than the ring holds
            hooks.send(TAP2, plain(GUEST3[4], BRIDGE[4]))
        assert 3_000 < len(watch.read()) < 10_000
        with hooks.table.watch_drops(POD) as other:
            hooks.send(TAP2, plain(GUEST3[4], BRIDGE[4]))
            assert len(other.read()) == 1
            with pytest.raises(router.RouterError, match="somebody else"):
                watch.read()
    hooks.send(TAP2, plain(GUEST3[4], BRIDGE[4]))
    assert sum(hooks.table.counters(POD).values()) == 10_004


def test_pods_do_not_mix(hooks: Hooks) -> None:
    """A pod that the router does not know: `lo` is left alone, a TAP is shut."""
    hooks.table.remove_pod(POD)
    frame = packet("127.0.0.1", 40000, "127.0.0.1", 80)
    assert hooks.send(LO, frame) == (PASS, frame)
    assert hooks.send(TAP2, ALLOWED["ARP"])[0] == DROP


# --- whatever comes in ---

SEEDS = [frame for frames in FORBIDDEN.values() for frame in frames] + list(ALLOWED.values())
SEEDS += [
    packet(GUEST2[family], 40000, BRIDGE[family], port, proto=proto, flags=flags, mac=MAC2, data=b"data")
    for family in (4, 6)
    for proto in (TCP, UDP)
    for port in (80, 40000)
    for flags in (SYN, ACK)
]
mutations = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.sampled_from(SEEDS), changes=mutations, length=st.integers(14, 200), hook=st.sampled_from([TAP2, TAP3]))
def test_garbage(hooks: Hooks, seed: bytes, changes: list[tuple[int, int]], length: int, hook: int) -> None:
    """Whatever guests send: it passes unchanged, is dropped and counted, or goes where a flow of its own leads."""
    frame = bytearray((seed + bytes(length))[: max(14, min(len(seed), length))])
    for at, value in changes:
        frame[at % len(frame)] = value
    before = sum(hooks.table.counters(POD).values())
    try:
        verdict, out = hooks.send(hook, bytes(frame))
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        reject()  # a test run wants a whole IP header behind its EtherType
    after = sum(hooks.table.counters(POD).values())
    assert verdict in (PASS, DROP, REDIRECT)
    if verdict == PASS:
        assert out == bytes(frame)
    assert after == before + 1, "neither passed, redirected nor counted as dropped"
    if verdict == REDIRECT:
        version = out[14] >> 4
        addresses = (out[26:30], out[30:34]) if version == 4 else (out[22:38], out[38:54])
        ours = {ip_address(a).packed for a in (LOCALHOST[version], BRIDGE[version], GUEST2[version])}
        assert set(addresses) <= ours
        assert out[:6] in (ZERO_MAC, MAC2)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.sampled_from(SEEDS), changes=mutations)
def test_garbage_on_lo(hooks: Hooks, seed: bytes, changes: list[tuple[int, int]]) -> None:
    """What the pod's own stack would have to send: nothing of it is the program's end."""
    frame = bytearray(seed)
    for at, value in changes:
        frame[at % len(frame)] = value
    try:
        verdict, out = hooks.send(LO, bytes(frame))
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        reject()
    assert verdict in (PASS, DROP, REDIRECT)
    assert verdict != PASS or out == bytes(frame)
