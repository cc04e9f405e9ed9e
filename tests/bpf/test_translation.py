"""IPv6 callers of guests that have IPv4 alone, and the other way round; fragments; what comes in by the uplink."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

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
    SYNACK,
    TAP2,
    TAP3,
    TCP,
    UDP,
    UPLINK,
    ZERO_MAC,
    Hooks,
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
    segment,
)

pytestmark = pytest.mark.bpf

KIND = {4: 0x0800, 6: 0x86DD}
OTHER = {4: 6, 6: 4}


@pytest.fixture
def single(hooks: Hooks, family: int) -> Hooks:
    """Guest 2 speaks this family alone."""
    hooks.table.add_guest(POD, guest_row(2, seen_ipv4=family == 4, seen_ipv6=family == 6))
    return hooks


# --- the other IP version ---


@both_families
@both_protocols
def test_container_calls_by_the_family_that_the_guest_lacks(single: Hooks, family: int, proto: int) -> None:
    here = LOCALHOST[OTHER[family]]
    verdict, frame = single.send(LO, packet(here, 40000, here, 80, proto=proto, data=b"odd"))
    out = parse(frame)
    assert verdict == REDIRECT
    assert (out.source, out.target, out.ports) == (BRIDGE[family], GUEST2[family], (40000, 80))
    assert (out.source_mac, out.target_mac) == (BRIDGE_MAC, MAC2)
    assert out.payload.endswith(b"odd")

    answer = packet(GUEST2[family], 80, BRIDGE[family], 40000, proto=proto, flags=SYNACK, mac=MAC2, data=b"even")
    verdict, frame = single.send(TAP2, answer)
    back = parse(frame)
    assert verdict == REDIRECT
    assert (back.source, back.target, back.ports) == (here, here, (80, 40000))
    assert (back.source_mac, back.target_mac) == (ZERO_MAC, ZERO_MAC)
    assert back.payload.endswith(b"even")

    verdict, frame = single.send(LO, packet(here, 40000, here, 80, proto=proto, flags=ACK, data=b"more"))
    assert (verdict, parse(frame).target) == (REDIRECT, GUEST2[family])
    (flow,) = single.table.flows(POD)
    assert (str(flow.dialled.address), str(flow.server.address)) == (here, GUEST2[family])
    (port,) = single.table.ports(POD)
    assert (port.number, port.family, port.guest) == (80, OTHER[family], 2)


@both_families
@both_protocols
def test_guest_reaches_a_server_on_the_loopback_address_of_the_family_that_it_lacks(
    single: Hooks, family: int, proto: int
) -> None:
    here = LOCALHOST[OTHER[family]]
    kind = (
        (socket.AF_INET if family == 6 else socket.AF_INET6),
        (socket.SOCK_STREAM if proto == TCP else socket.SOCK_DGRAM),
    )
    with single.in_thread(lambda: socket.socket(*kind)) as server:
        server.bind((here, 8080))
        if proto == TCP:
            server.listen()
        sent = packet(GUEST2[family], 40000, BRIDGE[family], 8080, proto=proto, mac=MAC2)
        verdict, frame = single.send(TAP2, sent)
    out = parse(frame)
    assert verdict == REDIRECT
    assert (out.source, out.target, out.target_mac) == (here, here, ZERO_MAC)
    verdict, frame = single.send(LO, packet(here, 8080, here, out.ports[0], proto=proto, flags=SYNACK))
    back = parse(frame)
    assert verdict == REDIRECT
    assert (back.source, back.target, back.ports) == (BRIDGE[family], GUEST2[family], (8080, 40000))


@both_families
def test_a_refusal_crosses_too(single: Hooks, family: int) -> None:
    here, other = LOCALHOST[OTHER[family]], OTHER[family]
    sent = packet(here, 40000, here, 53, proto=UDP, data=b"query")
    _, seen = single.send(LO, sent)
    verdict, frame = single.send(TAP2, error_about(seen, (3, 3) if family == 4 else (1, 4)))
    out = parse(frame)
    assert (verdict, out.source, out.target, out.proto) == (REDIRECT, here, here, ICMP[other])
    assert tuple(out.payload[:2]) == ((3, 3) if other == 4 else (1, 4))
    assert parse_headers(eth(out.payload[8:], KIND[other])) == parse_headers(sent)


@both_families
def test_an_error_that_the_other_version_lacks(single: Hooks, family: int) -> None:
    here = LOCALHOST[OTHER[family]]
    _, seen = single.send(LO, packet(here, 40000, here, 53, proto=UDP, data=b"query"))
    assert single.send(TAP2, error_about(seen, (12, 0) if family == 4 else (4, 0)))[0] == DROP
    assert single.dropped() == {"UNTRANSLATABLE"}


@pytest.mark.parametrize("family", [4])
def test_padding_of_a_short_frame_is_not_its_payload(single: Hooks) -> None:
    """Ethernet frames have 60 bytes at least."""
    verdict, frame = single.send(LO, packet("::1", 40000, "::1", 53, proto=UDP))
    assert verdict == REDIRECT
    answer = packet(GUEST2[4], 53, BRIDGE[4], 40000, proto=UDP, mac=MAC2, data=b"odd")
    verdict, frame = single.send(TAP2, answer.ljust(60, b"\xff"))
    assert (verdict, parse(frame).payload[8:]) == (REDIRECT, b"odd")


@pytest.mark.parametrize("family", [4])
def test_an_answer_without_a_checksum_cannot_become_ipv6(single: Hooks) -> None:
    single.send(LO, packet("::1", 40000, "::1", 53, proto=UDP))
    assert single.send(TAP2, packet(GUEST2[4], 53, BRIDGE[4], 40000, proto=UDP, mac=MAC2, bare=True))[0] == DROP
    assert single.dropped() == {"NO_CHECKSUM"}


@pytest.mark.parametrize("family", [4])
def test_options_are_not_translated(single: Hooks) -> None:
    single.send(LO, packet("::1", 40000, "::1", 80))
    answer = packet(GUEST2[4], 80, BRIDGE[4], 40000, flags=SYNACK, mac=MAC2, options=b"\x01\x01\x01\x01")
    assert single.send(TAP2, answer)[0] == DROP
    assert single.dropped() == {"EXTENSION"}


@both_families
def test_the_guest_in_the_callers_family_is_asked_in_it(hooks: Hooks, family: int) -> None:
    """Guest 2 speaks both, guest 3 one: each is spoken to in the caller's family if it can."""
    hooks.table.add_guest(POD, guest_row(3, seen_ipv4=family == 4, seen_ipv6=family == 6, ports=(("tcp", 90),)))
    here = LOCALHOST[OTHER[family]]
    _, frame = hooks.send(LO, packet(here, 40000, here, 90))
    assert parse(frame).target == GUEST3[family]
    assert parse(frame).target_mac == MAC3


# --- fragments ---


def error_about(seen: bytes, what: tuple[int, int]) -> bytes:
    """The ICMP error by which guest 2's stack answers a packet that it got."""
    family = seen[14] >> 4
    body = struct.pack("!BBHI", *what, 0, 0) + seen[14:]
    covered = body if family == 4 else pseudo(GUEST2[6], BRIDGE[6], 58, len(body)) + body
    body = body[:2] + struct.pack("!H", checksum(covered)) + body[4:]
    return eth(ip(GUEST2[family], BRIDGE[family], ICMP[family], body), KIND[family], MAC2, BRIDGE_MAC)


def in_fragments(source: str, target: str, proto: int, payload: bytes, identification: int) -> Iterator[bytes]:
    """Two of them, 800 bytes and the rest."""
    for at, more in ((0, True), (800, False)):
        part = payload[at : 800 if more else None]
        if ":" in source:
            head = struct.pack("!BBHI", proto, 0, at | more, identification)
            yield eth(ip(source, target, 44, head + part), KIND[6], MAC2, BRIDGE_MAC)
        else:
            whole = ip(source, target, proto, part, fragment=at // 8 | (0x2000 if more else 0))
            yield eth(whole, KIND[4], MAC2, BRIDGE_MAC)


def put_together(frames: list[bytes]) -> tuple[str, str, bytes]:
    """(source, target, payload); asserts that they belong together."""
    payload, seen = b"", set()
    for frame in frames:
        if frame[14] >> 4 == 4:
            assert checksum(frame[14:34]) == 0, "IPv4 header checksum"
            identification, data = frame[18:20], frame[34:]
        else:
            identification, data = frame[58:62], frame[62:]
        source, target = (frame[26:30], frame[30:34]) if frame[14] >> 4 == 4 else (frame[22:38], frame[38:54])
        seen.add((source, target, identification))
        payload += data
    assert len(seen) == 1, "addresses or identifications differ"
    source, target, identification = seen.pop()
    assert identification not in (b"\0\7", b"\0\0\0\7"), "the sender's own identification went through"
    kind = IPv4Address if len(source) == 4 else IPv6Address
    return str(kind(source)), str(kind(target)), payload


@both_families
def test_fragments_to_a_container(hooks: Hooks, family: int) -> None:
    here, guest, bridge = LOCALHOST[family], GUEST2[family], BRIDGE[family]
    datagram = segment(guest, 40000, bridge, 8080, proto=UDP, data=bytes(range(200)) * 6)
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with hooks.in_thread(lambda: socket.socket(kind, socket.SOCK_DGRAM)) as server:
        server.bind((here, 8080))
        sent = [hooks.send(TAP2, frame) for frame in in_fragments(guest, bridge, UDP, datagram, 7)]
    assert [verdict for verdict, _ in sent] == [REDIRECT, REDIRECT]
    source, target, payload = put_together([frame for _, frame in sent])
    assert (source, target) == (here, here)
    assert parse(eth(ip(source, target, UDP, payload), KIND[family])).payload[8:] == datagram[8:]
    assert hooks.dropped() == set()


@both_families
def test_fragments_to_a_guest(hooks: Hooks, family: int) -> None:
    hooks.table.add_guest(POD, guest_row(3, seen_ipv4=True, seen_ipv6=True, ports=(("udp", 53),)))
    guest, bridge = GUEST2[family], BRIDGE[family]
    datagram = segment(guest, 40000, bridge, 53, proto=UDP, data=bytes(1200))
    sent = [hooks.send(TAP2, frame) for frame in in_fragments(guest, bridge, UDP, datagram, 7)]
    assert [verdict for verdict, _ in sent] == [REDIRECT, REDIRECT]
    assert put_together([frame for _, frame in sent])[:2] == (bridge, GUEST3[family])
    assert all(frame[:6] == MAC3 for _, frame in sent)


@both_families
def test_fragments_that_the_pods_stack_gets_go_to_it_whole(hooks: Hooks, family: int) -> None:
    guest, bridge = GUEST2[family], BRIDGE[family]
    hooks.table.add_guest(POD, guest_row(2, seen_ipv4=True, seen_ipv6=True, ports=(("udp", 9),)))
    hooks.table.add_guest(POD, guest_row(3, ports=(("udp", 53),)))  # it is not up: nobody else is asked
    datagram = segment(guest, 40000, bridge, 53, proto=UDP, data=bytes(1200))
    frames = list(in_fragments(guest, bridge, UDP, datagram, 7))
    assert [hooks.send(TAP2, frame) for frame in frames] == [(PASS, frame) for frame in frames]


# --- from outside ---

OUTSIDE = {4: "192.0.2.9", 6: "2001:db8::9"}
PODS_OWN = {4: "192.0.2.2", 6: "2001:db8::2"}
ROUTER_MAC, ETH0_MAC = bytes((6, 0, 0, 0, 0, 1)), bytes((6, 0, 0, 0, 0, 2))


def uplink_row(*, translates: bool = False) -> router.UplinkRow:
    ipv4, ipv6 = IPv4Address(PODS_OWN[4]), IPv6Address(PODS_OWN[6])
    return router.UplinkRow(ifindex=UPLINK, ipv4=ipv4, ipv6=ipv6, translates=translates)


@pytest.fixture
def uplinked(hooks: Hooks) -> Hooks:
    hooks.table.set_uplink(
        POD, router.UplinkRow(ifindex=UPLINK, ipv4=IPv4Address(PODS_OWN[4]), ipv6=IPv6Address(PODS_OWN[6]))
    )
    return hooks


def from_outside(source: str, sport: int, target: str, dport: int, proto: int = TCP, **rest: int) -> bytes:
    return ETH0_MAC + packet(source, sport, target, dport, proto=proto, mac=ROUTER_MAC, **rest)[6:]


@both_families
@both_protocols
def test_from_outside_to_a_guest(uplinked: Hooks, family: int, proto: int) -> None:
    """The guest sees who it is, and its answers go back to the neighbour that the question came from."""
    outside, own, guest = OUTSIDE[family], PODS_OWN[family], GUEST2[family]
    verdict, frame = uplinked.send(UPLINK, from_outside(outside, 5000, own, 80, proto))
    out = parse(frame)
    assert verdict == REDIRECT
    assert (out.source, out.target, out.ports) == (outside, guest, (5000, 80))
    assert (out.source_mac, out.target_mac) == (BRIDGE_MAC, MAC2)
    verdict, frame = uplinked.send(TAP2, packet(guest, 80, outside, 5000, proto=proto, flags=SYNACK, mac=MAC2))
    back = parse(frame)
    assert verdict == REDIRECT
    assert (back.source, back.target, back.ports) == (own, outside, (80, 5000))
    assert (back.source_mac, back.target_mac) == (ETH0_MAC, ROUTER_MAC)


@both_families
def test_from_outside_by_the_family_that_the_guest_lacks(uplinked: Hooks, family: int) -> None:
    uplinked.table.add_guest(POD, guest_row(2, seen_ipv4=family == 4, seen_ipv6=family == 6))
    other = OTHER[family]
    verdict, frame = uplinked.send(UPLINK, from_outside(OUTSIDE[other], 5000, PODS_OWN[other], 80))
    out = parse(frame)
    assert (verdict, out.source, out.target) == (REDIRECT, BRIDGE[family], GUEST2[family])
    answer = packet(GUEST2[family], 80, BRIDGE[family], out.ports[0], flags=SYNACK, mac=MAC2)
    verdict, frame = uplinked.send(TAP2, answer)
    back = parse(frame)
    assert (verdict, back.source, back.target) == (REDIRECT, PODS_OWN[other], OUTSIDE[other])


@both_families
def test_an_answer_to_a_guests_own_question_is_no_question(uplinked: Hooks, family: int) -> None:
    """Where the pod's namespace translates guests it comes to the pod's address: a datagram needs a known port."""
    uplinked.table.set_uplink(POD, uplink_row(translates=True))
    uplinked.table.add_guest(POD, guest_row(2, seen_ipv4=True, seen_ipv6=True, ports=(("udp", 53),)))
    answer = from_outside(OUTSIDE[family], 53, PODS_OWN[family], 40000, UDP)
    assert uplinked.send(UPLINK, answer) == (PASS, answer)
    question = from_outside(OUTSIDE[family], 5000, PODS_OWN[family], 53, UDP)
    assert uplinked.send(UPLINK, question)[0] == REDIRECT
    assert uplinked.send(UPLINK, from_outside(OUTSIDE[family], 5000, PODS_OWN[family], 80, TCP))[0] == REDIRECT


@both_families
def test_outside_reaches_neither_loopback_nor_the_bridge(uplinked: Hooks, family: int) -> None:
    """A container's server on any address is the pod's stack's business; one on loopback is nobody's outside."""
    for target in (LOCALHOST[family], BRIDGE[family], GUEST2[family]):
        frame = from_outside(OUTSIDE[family], 5000, target, 80)
        assert uplinked.send(UPLINK, frame) == (PASS, frame)
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with uplinked.in_thread(lambda: socket.socket(kind, socket.SOCK_STREAM)) as server:
        server.bind((LOCALHOST[family], 8080))
        server.listen()
        uplinked.table.add_guest(POD, guest_row(2, seen_ipv4=True, seen_ipv6=True, ports=(("tcp", 9),)))
        _, frame = uplinked.send(UPLINK, from_outside(OUTSIDE[family], 5000, PODS_OWN[family], 8080))
    assert parse(frame).target == GUEST2[family]  # it is the only guest: who else?


@both_families
def test_the_pods_own_address_is_a_name_for_localhost_inside(uplinked: Hooks, family: int) -> None:
    own = PODS_OWN[family]
    verdict, frame = uplinked.send(LO, packet(own, 40000, own, 80))
    out = parse(frame)
    assert (verdict, out.source, out.target) == (REDIRECT, BRIDGE[family], GUEST2[family])
    verdict, frame = uplinked.send(TAP2, packet(GUEST2[family], 80, BRIDGE[family], 40000, flags=SYNACK, mac=MAC2))
    back = parse(frame)
    assert (verdict, back.source, back.target) == (REDIRECT, own, own)


@both_families
def test_an_error_from_a_router_outside(uplinked: Hooks, family: int) -> None:
    """Whoever is on the way may say that a packet was too big; the guest hears it about what it sent."""
    outside, own, guest = OUTSIDE[family], PODS_OWN[family], GUEST2[family]
    uplinked.send(UPLINK, from_outside(outside, 5000, own, 53, UDP))
    answer = packet(guest, 53, outside, 5000, proto=UDP, data=bytes(1300), mac=MAC2)
    _, sent = uplinked.send(TAP2, answer)
    somebody = "198.51.100.1" if family == 4 else "2001:db8:1::1"
    body = struct.pack("!BBHI", *((3, 4) if family == 4 else (2, 0)), 0, 1280) + sent[14:74]
    covered = body if family == 4 else pseudo(somebody, own, 58, len(body)) + body
    body = body[:2] + struct.pack("!H", checksum(covered)) + body[4:]
    error = eth(ip(somebody, own, ICMP[family], body), KIND[family], ROUTER_MAC, ETH0_MAC)
    verdict, frame = uplinked.send(UPLINK, error)
    out = parse(frame)
    assert (verdict, out.target, out.target_mac) == (REDIRECT, guest, MAC2)
    assert struct.unpack_from("!I", out.payload, 4)[0] == 1280
    assert parse_headers(eth(out.payload[8:], KIND[family]))[:3] == (guest, outside, UDP)


@both_families
def test_a_guests_datagram_too_big_for_another_guest(hooks: Hooks, family: int) -> None:
    """The sender is told, but not to make its packets smaller for everybody."""
    hooks.table.add_guest(POD, guest_row(2, seen_ipv4=True, seen_ipv6=True, mtu=2800))
    hooks.table.add_guest(POD, guest_row(3, seen_ipv4=True, seen_ipv6=True, ports=(("udp", 53),)))
    sent = packet(GUEST2[family], 40000, BRIDGE[family], 53, proto=UDP, data=bytes(2400), mac=MAC2)
    verdict, frame = hooks.send(TAP2, sent)
    out = parse(frame)
    assert (verdict, out.target, out.target_mac) == (REDIRECT, GUEST2[family], MAC2)
    assert struct.unpack_from("!I", out.payload, 4)[0] == 2800
    assert hooks.dropped() == {"TOO_BIG"}
    assert hooks.send(TAP3, packet(GUEST3[family], 1, BRIDGE[family], 53, proto=UDP, mac=MAC3))[0] == REDIRECT
