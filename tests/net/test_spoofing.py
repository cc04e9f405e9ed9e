"""A guest that lies: frames in another's name, or to where no guest may speak. Each is dropped, counted under its
reason, and arrives nowhere: not at the bridge, not in the other guests, not on `lo`, not in another pod.

    guest 2 ── AF_PACKET ──► uktap2 ─ router ─╳    sniffed: ukbr0, lo, eth0 of guests 3 and 4, ukbr0 of another pod

Frames that do pass, as they should, prove that the sniffers see, and when the router is done with what was sent before.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import truediv
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, LLC, STP, Dot1AD, Dot1Q, Dot3, Ether
from scapy.packet import Packet, Raw

from launcher import net
from launcher.model import format_mac

from .conftest import PLAN, PlayedPod, played_pod

pytestmark = pytest.mark.net

ETH_P_ALL = 3
TIMEOUT_S = 5

LIAR, OTHER = 2, 3
MAC, OTHER_MAC, BRIDGE_MAC = format_mac(PLAN.guest_mac(LIAR)), format_mac(PLAN.guest_mac(OTHER)), format_mac(PLAN.mac)
IP4, OTHER_IP4, BRIDGE_IP4 = str(PLAN.guest_ipv4(LIAR).ip), str(PLAN.guest_ipv4(OTHER).ip), str(PLAN.ipv4.ip)
IP6, OTHER_IP6, BRIDGE_IP6 = str(PLAN.guest_ipv6(LIAR).ip), str(PLAN.guest_ipv6(OTHER).ip), str(PLAN.ipv6.ip)
BROADCAST, ALL_NODES_MAC, ALL_NODES = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01", "ff02::1"
LINK_LOCAL = "fe80::ff:fe00:7702"
OTHER_LINK_LOCAL = "fe80::ff:fe00:7703"
LIE = b"a lie that must not arrive"


def frame(*, source: str = MAC, to: str = BRIDGE_MAC) -> Ether:
    return Ether(src=source, dst=to)


def arp(*, to: str = BROADCAST, **fields: object) -> Packet:
    return frame(to=to) / ARP(**{"op": "who-has", "hwsrc": MAC, "psrc": IP4, "pdst": BRIDGE_IP4, **fields})


def nd(message: Packet, *, source: str = IP6, hop_limit: int = 255) -> Packet:
    return frame(to=ALL_NODES_MAC) / IPv6(src=source, dst=ALL_NODES, hlim=hop_limit) / message


def datagram(*, source: str = IP4, target: str = BRIDGE_IP4, to: str = BRIDGE_MAC, mac: str = MAC) -> Packet:
    kind = IPv6 if ":" in target else IP
    return frame(source=mac, to=to) / kind(src=source, dst=target) / UDP(sport=4000, dport=4001) / Raw(LIE)


def behind(headers: Packet, message: Packet) -> Packet:
    return frame(to=ALL_NODES_MAC) / IPv6(src=LINK_LOCAL, dst=ALL_NODES, hlim=255) / headers / message


RA = ICMPv6ND_RA(routerlifetime=1800) / ICMPv6NDOptPrefixInfo(prefix="2001:db8::", prefixlen=64)
REDIRECT = ICMPv6ND_Redirect(tgt=IP6, dst="2001:db8::1") / ICMPv6NDOptDstLLAddr(lladdr=MAC)

LIES: dict[str, tuple[Packet, str]] = {
    # another's MAC address
    "mac-of-another": (datagram(mac=OTHER_MAC), "SPOOFED_MAC"),
    "mac-of-the-bridge": (datagram(mac=BRIDGE_MAC, to=OTHER_MAC, target=OTHER_IP4), "SPOOFED_MAC"),
    "mac-of-nobody": (datagram(mac="02:00:00:00:77:fe"), "SPOOFED_MAC"),
    "mac-multicast": (datagram(mac="01:00:5e:00:00:01"), "SPOOFED_MAC"),
    "mac-zero": (datagram(mac="00:00:00:00:00:00"), "SPOOFED_MAC"),
    "mac-of-another-ipv6": (datagram(mac=OTHER_MAC, source=IP6, target=BRIDGE_IP6), "SPOOFED_MAC"),
    # another's IPv4 address
    "ipv4-of-another": (datagram(source=OTHER_IP4), "SPOOFED_IPV4"),
    "ipv4-of-another-to-a-third": (
        datagram(source=OTHER_IP4, target="169.254.77.4", to="02:00:00:00:77:04"),
        "SPOOFED_IPV4",
    ),
    "ipv4-of-the-bridge": (datagram(source=BRIDGE_IP4, target=OTHER_IP4, to=OTHER_MAC), "SPOOFED_IPV4"),
    "ipv4-loopback": (datagram(source="127.0.0.1"), "SPOOFED_IPV4"),
    "ipv4-of-the-world": (datagram(source="192.0.2.1"), "SPOOFED_IPV4"),
    "ipv4-none": (datagram(source="0.0.0.0", target="255.255.255.255", to=BROADCAST), "SPOOFED_IPV4"),
    "ipv4-multicast": (datagram(source="224.0.0.1"), "SPOOFED_IPV4"),
    "ipv4-segment-of-another": (
        frame() / IP(src=OTHER_IP4, dst=BRIDGE_IP4) / TCP(sport=4000, dport=4001, flags="R") / Raw(LIE),
        "SPOOFED_IPV4",
    ),
    "ipv4-icmp-of-another": (frame() / IP(src=OTHER_IP4, dst=BRIDGE_IP4) / ICMP() / Raw(LIE), "SPOOFED_IPV4"),
    "ipv4-fragment-of-another": (
        frame() / IP(src=OTHER_IP4, dst=BRIDGE_IP4, frag=100, proto=17) / Raw(LIE),
        "SPOOFED_IPV4",
    ),
    # another's IPv6 address
    "ipv6-of-another": (datagram(source=OTHER_IP6, target=BRIDGE_IP6), "SPOOFED_IPV6"),
    "ipv6-of-the-bridge": (datagram(source=BRIDGE_IP6, target=OTHER_IP6, to=OTHER_MAC), "SPOOFED_IPV6"),
    "ipv6-loopback": (datagram(source="::1", target=BRIDGE_IP6), "SPOOFED_IPV6"),
    "ipv6-mapped": (datagram(source=f"::ffff:{OTHER_IP4}", target=BRIDGE_IP6), "SPOOFED_IPV6"),
    "ipv6-mapped-own": (datagram(source=f"::ffff:{IP4}", target=BRIDGE_IP6), "SPOOFED_IPV6"),
    "ipv6-of-the-world": (datagram(source="2001:db8::1", target=BRIDGE_IP6), "SPOOFED_IPV6"),
    "ipv6-multicast": (datagram(source="ff02::1", target=BRIDGE_IP6), "SPOOFED_IPV6"),
    "ipv6-ping-of-another": (
        frame() / IPv6(src=OTHER_IP6, dst=BRIDGE_IP6) / ICMPv6EchoRequest(data=LIE),
        "SPOOFED_IPV6",
    ),
    # ARP
    "arp-reply-for-another": (arp(op="is-at", psrc=OTHER_IP4), "SPOOFED_ARP"),
    "arp-reply-for-the-bridge": (arp(op="is-at", psrc=BRIDGE_IP4, to=OTHER_MAC), "SPOOFED_ARP"),
    "arp-request-of-another": (arp(psrc=OTHER_IP4), "SPOOFED_ARP"),
    "arp-gratuitous-for-another": (arp(psrc=OTHER_IP4, pdst=OTHER_IP4), "SPOOFED_ARP"),
    "arp-gratuitous-for-the-bridge": (arp(op="is-at", psrc=BRIDGE_IP4, pdst=BRIDGE_IP4), "SPOOFED_ARP"),
    "arp-with-anothers-mac": (arp(hwsrc=OTHER_MAC), "SPOOFED_ARP"),
    "arp-gratuitous-with-anothers-mac": (arp(op="is-at", hwsrc=OTHER_MAC, pdst=IP4), "SPOOFED_ARP"),
    "arp-for-another-hardware": (arp(hwtype=6), "SPOOFED_ARP"),
    "arp-in-anothers-frame": (
        Ether(src=OTHER_MAC, dst=BROADCAST) / ARP(hwsrc=OTHER_MAC, psrc=OTHER_IP4),
        "SPOOFED_MAC",
    ),
    "rarp": (Ether(src=MAC, dst=BROADCAST, type=0x8035) / ARP(op=3, hwsrc=MAC, psrc=OTHER_IP4), "ETHERTYPE"),
    # neighbour discovery
    "na-for-another": (nd(ICMPv6ND_NA(tgt=OTHER_IP6) / ICMPv6NDOptDstLLAddr(lladdr=MAC)), "SPOOFED_ND"),
    "na-for-the-bridge": (nd(ICMPv6ND_NA(tgt=BRIDGE_IP6, R=0) / ICMPv6NDOptDstLLAddr(lladdr=MAC)), "SPOOFED_ND"),
    "na-for-another-from-link-local": (
        nd(ICMPv6ND_NA(tgt=OTHER_IP6) / ICMPv6NDOptDstLLAddr(lladdr=MAC), source=LINK_LOCAL),
        "SPOOFED_ND",
    ),
    "na-of-another": (nd(ICMPv6ND_NA(tgt=OTHER_IP6), source=OTHER_IP6), "SPOOFED_IPV6"),
    "ns-of-another": (
        nd(ICMPv6ND_NS(tgt=BRIDGE_IP6) / ICMPv6NDOptSrcLLAddr(lladdr=MAC), source=OTHER_IP6),
        "SPOOFED_IPV6",
    ),
    "router-advertisement": (nd(RA, source=LINK_LOCAL), "ROUTER_ND"),
    "router-advertisement-own-address": (nd(RA), "ROUTER_ND"),
    "redirect": (nd(REDIRECT, source=LINK_LOCAL), "ROUTER_ND"),
    # addresses that are nobody's business
    "to-loopback": (datagram(target="127.0.0.1"), "MARTIAN"),
    "to-all-of-127": (datagram(target="127.7.7.7"), "MARTIAN"),
    "to-loopback-syn": (frame() / IP(src=IP4, dst="127.0.0.1") / TCP(dport=4001, flags="S") / Raw(LIE), "MARTIAN"),
    "to-loopback-ping": (frame() / IP(src=IP4, dst="127.0.0.1") / ICMP() / Raw(LIE), "MARTIAN"),
    "to-loopback-of-another": (datagram(target="127.0.0.1", to=OTHER_MAC), "MARTIAN"),
    "to-loopback-ipv6": (datagram(source=IP6, target="::1"), "MARTIAN"),
    "to-loopback-ipv6-from-link-local": (datagram(source=LINK_LOCAL, target="::1"), "MARTIAN"),
    "to-mapped": (datagram(source=IP6, target="::ffff:127.0.0.1"), "MARTIAN"),
    "to-mapped-another": (datagram(source=IP6, target=f"::ffff:{OTHER_IP4}"), "MARTIAN"),
    # other frames
    "vlan": (Ether(src=MAC, dst=BRIDGE_MAC) / Dot1Q(vlan=7) / datagram()[IP], "VLAN"),
    "vlan-priority": (Ether(src=MAC, dst=BRIDGE_MAC) / Dot1Q(vlan=0, prio=7) / datagram()[IP], "VLAN"),
    "vlan-of-another": (
        Ether(src=MAC, dst=BRIDGE_MAC) / Dot1Q(vlan=1) / datagram(source=OTHER_IP4)[IP],
        "VLAN",
    ),
    "vlan-service": (Ether(src=MAC, dst=BRIDGE_MAC, type=0x88A8) / Dot1AD(vlan=7) / datagram()[IP], "VLAN"),
    "vlan-double": (Ether(src=MAC, dst=BRIDGE_MAC) / Dot1Q(vlan=7) / Dot1Q(vlan=8) / datagram()[IP], "VLAN"),
    "spanning-tree": (Dot3(src=MAC, dst="01:80:c2:00:00:00") / LLC() / STP(), "RESERVED_GROUP"),
    "pause": (Ether(src=MAC, dst="01:80:c2:00:00:01", type=0x8808) / Raw(LIE), "RESERVED_GROUP"),
    "lldp": (Ether(src=MAC, dst="01:80:c2:00:00:0e", type=0x88CC) / Raw(LIE), "RESERVED_GROUP"),
    "lldp-to-a-neighbour": (Ether(src=MAC, dst=OTHER_MAC, type=0x88CC) / Raw(LIE), "ETHERTYPE"),
    "mpls": (Ether(src=MAC, dst=OTHER_MAC, type=0x8847) / Raw(LIE), "ETHERTYPE"),
    "pppoe": (Ether(src=MAC, dst=OTHER_MAC, type=0x8864) / Raw(LIE), "ETHERTYPE"),
    "802.3": (Dot3(src=MAC, dst=OTHER_MAC) / LLC() / Raw(LIE), "ETHERTYPE"),
    "own-protocol": (Ether(src=MAC, dst=OTHER_MAC, type=0x88B5) / Raw(LIE), "ETHERTYPE"),
    # cut short
    "arp-cut-short": (Ether(src=MAC, dst=BROADCAST, type=0x0806) / Raw(bytes(arp())[14:30]), "MALFORMED"),
    "ipv4-cut-short": (Ether(src=MAC, dst=BRIDGE_MAC, type=0x0800) / Raw(bytes(datagram())[14:30]), "MALFORMED"),
    "ipv6-cut-short": (Ether(src=MAC, dst=BRIDGE_MAC, type=0x86DD) / Raw(bytes(nd(RA))[14:40]), "MALFORMED"),
    "ipv4-lengths-that-contradict": (frame() / IP(src=IP4, dst=BRIDGE_IP4, len=9000) / UDP() / Raw(LIE), "MALFORMED"),
    "ipv4-header-too-short": (frame() / IP(src=IP4, dst=BRIDGE_IP4, ihl=4) / UDP() / Raw(LIE), "MALFORMED"),
    "ipv4-in-ipv6s-place": (Ether(src=MAC, dst=BRIDGE_MAC, type=0x86DD) / datagram()[IP], "MALFORMED"),
    # neighbour discovery, once more: what a word says about others beside its target and its source
    "dad-for-another": (nd(ICMPv6ND_NS(tgt=OTHER_IP6), source="::"), "SPOOFED_ND"),
    "dad-for-the-bridge": (nd(ICMPv6ND_NS(tgt=BRIDGE_IP6), source="::"), "SPOOFED_ND"),
    "na-with-anothers-mac": (nd(ICMPv6ND_NA(tgt=IP6) / ICMPv6NDOptDstLLAddr(lladdr=OTHER_MAC)), "SPOOFED_ND"),
    "ns-with-anothers-mac": (nd(ICMPv6ND_NS(tgt=BRIDGE_IP6) / ICMPv6NDOptSrcLLAddr(lladdr=OTHER_MAC)), "SPOOFED_ND"),
    "na-for-anothers-link-local": (
        nd(ICMPv6ND_NA(tgt=OTHER_LINK_LOCAL) / ICMPv6NDOptDstLLAddr(lladdr=MAC), source=LINK_LOCAL),
        "SPOOFED_ND",
    ),
    "link-local-of-another": (datagram(source=OTHER_LINK_LOCAL, target=BRIDGE_IP6), "SPOOFED_IPV6"),
    # the same behind extension headers, RFC 6980 and RFC 7113
    "ra-behind-hop-by-hop": (behind(IPv6ExtHdrHopByHop(), RA), "SPOOFED_ND"),
    "ra-behind-destination-options": (behind(IPv6ExtHdrDestOpt(), RA), "SPOOFED_ND"),
    "ra-behind-two": (behind(IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(), RA), "SPOOFED_ND"),
    "ra-in-one-fragment": (behind(IPv6ExtHdrFragment(), RA), "SPOOFED_ND"),
    "ra-in-a-first-fragment": (behind(IPv6ExtHdrFragment(m=1), RA), "SPOOFED_ND"),
    "ra-behind-eight": (behind(reduce(truediv, [IPv6ExtHdrDestOpt()] * 8), RA), "SPOOFED_ND EXTENSION"),
    "fragment-that-hides-what-follows": (
        behind(IPv6ExtHdrFragment(m=1) / IPv6ExtHdrDestOpt(nh=58), Raw(b"")),
        "SPOOFED_ND EXTENSION FRAGMENT MALFORMED",
    ),
    "na-for-another-behind-hop-by-hop": (
        behind(IPv6ExtHdrHopByHop(), ICMPv6ND_NA(tgt=OTHER_IP6) / ICMPv6NDOptDstLLAddr(lladdr=MAC)),
        "SPOOFED_ND",
    ),
    "na-for-another-in-one-fragment": (
        behind(IPv6ExtHdrFragment(), ICMPv6ND_NA(tgt=OTHER_IP6) / ICMPv6NDOptDstLLAddr(lladdr=MAC)),
        "SPOOFED_ND",
    ),
    # IPv4's words of a router
    "icmp-redirect": (
        frame(to=OTHER_MAC)
        / IP(src=IP4, dst=OTHER_IP4)
        / ICMP(type=5, code=1, gw=IP4)
        / datagram(source=OTHER_IP4)[IP],
        "ROUTER_ND",
    ),
    "icmp-router-advertisement": (
        frame(to=BROADCAST) / IP(src=IP4, dst="224.0.0.1") / ICMP(type=9) / Raw(bytes(8) + LIE),
        "ROUTER_ND",
    ),
}


@dataclass(frozen=True, slots=True)
class Sniffer:
    where: str
    sock: socket.socket

    def frames(self) -> Iterator[bytes]:
        """What has come since the last time."""
        while select.select([self.sock], [], [], 0)[0]:
            yield self.sock.recv(65536)

    def until(self, tail: bytes) -> list[bytes]:
        """All frames before the first one that ends so."""
        found: list[bytes] = []
        while select.select([self.sock], [], [], TIMEOUT_S)[0]:
            data = self.sock.recv(65536)
            if data.endswith(tail):
                return found
            found.append(data)
        raise AssertionError(f"{self.where}: the true frame has not come")


def packet_socket(netns: Path, interface: str) -> socket.socket:
    sock = net.in_netns(netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
    sock.bind((interface, ETH_P_ALL))  # by index, in the socket's namespace
    return sock


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    pod: PlayedPod
    liar: socket.socket
    near: tuple[Sniffer, ...]  # where a true frame of the liar's arrives
    far: tuple[Sniffer, ...]  # where nothing of the liar's is to arrive

    def dropped(self) -> dict[str, int]:
        totals = ("REDIRECTED", "PASSED")
        counters = self.pod.table.counters(self.pod.record.id)
        return {reason.name: count for reason, count in counters.items() if reason.name not in totals}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        pod = stack.enter_context(played_pod(3, name="spoofing"))
        other = stack.enter_context(played_pod(1, name="spoofing-other"))

        def sniff(netns: Path, interface: str) -> Sniffer:
            return Sniffer(f"{interface} of {netns.name}", stack.enter_context(packet_socket(netns, interface)))

        yield Stage(
            pod=pod,
            liar=stack.enter_context(packet_socket(pod.guests[0].netns, "eth0")),
            near=(sniff(pod.netns, net.BRIDGE), *(sniff(guest.netns, "eth0") for guest in pod.guests[1:])),
            far=(
                sniff(pod.netns, "lo"),
                sniff(other.netns, net.BRIDGE),
                sniff(other.netns, "lo"),
                sniff(other.guests[0].netns, "eth0"),
            ),
        )


truths = itertools.count(100)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_dropped_and_counted(lie: str, stage: Stage) -> None:
    packet, reasons = LIES[lie]
    data = bytes(packet)
    before = stage.dropped()
    seen = tell(stage, data)
    assert not [where for where, got in seen.items() if any(is_of(data, other) for other in got)]
    counted = {name: count - before.get(name, 0) for name, count in stage.dropped().items()}
    assert [(name, count) for name, count in counted.items() if count] in [[(reason, 1)] for reason in reasons.split()]


def tell(stage: Stage, *frames: bytes) -> dict[str, list[bytes]]:
    """Send the frames, then a true one; returns what has been seen where, before the true one came."""
    truth = bytes(arp(pdst=f"169.254.77.{next(truths)}"))
    for data in (*frames, truth):
        stage.liar.send(data)
    return {
        **{sniffer.where: sniffer.until(truth[-20:]) for sniffer in stage.near},
        **{sniffer.where: list(sniffer.frames()) for sniffer in stage.far},
    }


def is_of(sent: bytes, seen: bytes) -> bool:
    """Is this what was sent? Its MAC addresses, IP addresses and ports may have been rewritten on the way."""
    return LIE in seen if LIE in sent else seen[14:] == sent[14:]


@pytest.mark.parametrize("version", [4, 6])
def test_the_truth_arrives(version: int, stage: Stage) -> None:
    """Or the sniffers would prove nothing."""
    addresses = (IP4, OTHER_IP4) if version == 4 else (IP6, OTHER_IP6)
    true = bytes(datagram(source=addresses[0], target=addresses[1], to=OTHER_MAC))
    before = stage.dropped()
    seen = tell(stage, true)
    assert [where for where, got in seen.items() if any(is_of(true, other) for other in got)] == [stage.near[1].where]
    assert stage.dropped() == before


@pytest.mark.parametrize("name", ["arp", "arp-probe", "na", "ns", "dad"])
def test_true_words_about_oneself_pass(name: str, stage: Stage) -> None:
    words = {
        "arp": arp(op="is-at", pdst=IP4),
        "arp-probe": arp(psrc="0.0.0.0", pdst=IP4),
        "na": nd(ICMPv6ND_NA(tgt=IP6) / ICMPv6NDOptDstLLAddr(lladdr=MAC)),
        "ns": nd(ICMPv6ND_NS(tgt=OTHER_IP6) / ICMPv6NDOptSrcLLAddr(lladdr=MAC)),
        "dad": nd(ICMPv6ND_NS(tgt=IP6), source="::"),
    }
    true = bytes(words[name])
    seen = tell(stage, true)
    for sniffer in stage.near:
        assert any(is_of(true, other) for other in seen[sniffer.where]), sniffer.where


@pytest.mark.parametrize("address", ["169.254.78.2", "10.0.0.2", "fd00:78::2"])
def test_nothing_gets_to_another_pod(address: str, stage: Stage) -> None:
    """A guest's own address, the bridge's MAC address: the pod's stack gets it, and forwards nothing."""
    data = bytes(datagram(source=IP4 if "." in address else IP6, target=address))
    seen = tell(stage, data)
    assert not [where for where, got in seen.items() if "other" in where and got]


def test_lies_about_the_same_addresses_in_another_pod(stage: Stage) -> None:
    """All pods have one address plan: what is true in one is not heard in another."""
    seen = tell(stage, bytes(datagram()), bytes(arp()))
    assert not [where for where, got in seen.items() if "other" in where and got]
