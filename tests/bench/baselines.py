"""What the router is compared with, each in a pod-like namespace of its own without the router.

bridge        topology.lab as it is: the client dials the server's own address, nothing is translated
DNAT          nftables rewrites 127.0.0.1 to the guest's address, conntrack takes it back. IPv4 only: the kernel has no
              route_localnet for IPv6, a ::1 that was rewritten never arrives (tried: the connection times out).
              From guest to container it would need a server that is not bound to loopback, or a second such rule.
proxy         socat copies between a socket on the loopback address and one to the guest
clone-to-all  the known research method, small: what leaves `lo` is cloned to every workload, what comes back goes into
              `lo`; no flow is kept, no L4 check sum mended. Its limits here: TCP over IPv4, container to guest; only
              the ports of the bench; and it works because a veth believes partial check sums (a guest's NIC without
              checksum offload would drop every packet) while the refusals of the guests that do not serve the port
              have full ones, which the copying breaks: so they are dropped, and a port that nobody serves hangs.
tc-mirred     what Kata Containers and urunc do: all that comes in on the pod's eth0 is redirected to the TAP, and all
              from the TAP to eth0, by two u32 filters. The guest takes the pod's own address, so the caller must be
              outside: a container in the pod cannot reach the guest at all, on localhost or otherwise.
tc-mirred, localhost
              the same between `lo` and the TAP, with the addresses rewritten by pedit and csum. It serves a range of
              ports of ONE guest, container to guest, and no more: filters keep no flow, so that the guest's answers
              are told from its requests by the port alone; a container's own server on such a port is out of reach;
              a port that nobody serves is refused, but ICMP errors keep the wrong addresses inside; IPv6 and UDP would
              need the same filters again; fragments and IP options are not understood (u32 reads ports at a fixed
              place); csum recomputes what a checksum offload would do, and leaves GSO packets' checksums wrong, which
              a veth or vnet_hdr's receiver does not look at. It needs act_pedit, act_csum and act_skbedit (Debian's
              kernels have them: tried with 6.1); where the kernel has none, the row stays empty.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher import net
from launcher.model import format_mac
from router import compile

from ..net.conftest import played_pod
from .topology import FIRST_GUEST, PLAN, Lab, ip, lab, namespace
from .traffic import Unmeasurable, Way, inside, serving

PORTS = range(20000, 30000)
_ports = itertools.cycle(PORTS)
GUEST4, GUEST6 = str(PLAN.guest_ipv4(FIRST_GUEST).ip), str(PLAN.guest_ipv6(FIRST_GUEST).ip)
BRIDGE4, BRIDGE6 = str(PLAN.ipv4.ip), str(PLAN.ipv6.ip)
PROXY_PORTS = {4: 30004, 6: 30006}
PROXIED_PORT = 30001

NFT = f"""
table ip bench {{
    chain out {{
        type nat hook output priority -100;
        ip daddr 127.0.0.1 meta l4proto {{ tcp, udp }} th dport {PORTS.start}-{PORTS.stop - 1} dnat to {GUEST4};
    }}
    chain post {{
        type nat hook postrouting priority 100;
        ip saddr 127.0.0.1 oifname "{net.BRIDGE}" masquerade;
    }}
}}
"""

CLONE_TO_ALL = """
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
static __always_inline int address(struct __sk_buff *skb, u32 at, u32 value)
{
    u32 old;
    if (bpf_skb_load_bytes(skb, at, &old, 4))
        return -1;
    bpf_l3_csum_replace(skb, 24, old, value, 4);
    return bpf_skb_store_bytes(skb, at, &value, 4, 0);
}
static __always_inline int ours(struct __sk_buff *skb)
{
    u8 protocol;
    u16 ports[2];
    if (skb->protocol != __builtin_bswap16(0x0800) || bpf_skb_load_bytes(skb, 23, &protocol, 1) || protocol != 6)
        return 0;
    if (bpf_skb_load_bytes(skb, 34, ports, 4))
        return 0;
    u16 port = __builtin_bswap16(ports[skb->ifindex == 1]);
    return port >= FIRST_PORT && port < LAST_PORT;
}
int to_guests(struct __sk_buff *skb)
{
    u8 macs[12] = {2, 0, 0, 0, 0x77, 0, 2, 0, 0, 0, 0x77, 1};
    if (!ours(skb))
        return TC_ACT_OK;
    u32 taps[] = {TAPS};
    address(skb, 26, __builtin_bswap32(BRIDGE));
#pragma unroll
    for (int i = 0; i < sizeof(taps) / 4; i++) {
        macs[5] = i + 2;
        address(skb, 30, __builtin_bswap32(BRIDGE + i + 1));
        bpf_skb_store_bytes(skb, 0, macs, 12, 0);
        bpf_clone_redirect(skb, taps[i], 0);
    }
    return TC_ACT_STOLEN; /* not SHOT: the sender would take it for congestion */
}
int to_lo(struct __sk_buff *skb)
{
    u8 macs[12] = {};
    u32 destination;
    if (!ours(skb) || bpf_skb_load_bytes(skb, 30, &destination, 4) || destination != __builtin_bswap32(BRIDGE))
        return TC_ACT_OK;
    address(skb, 26, __builtin_bswap32(0x7f000001));
    address(skb, 30, __builtin_bswap32(0x7f000001));
    bpf_skb_store_bytes(skb, 0, macs, 12, 0);
    return bpf_redirect(1, BPF_F_INGRESS);
}
"""


@contextlib.contextmanager
def dnat(guests: int) -> Iterator[Lab]:
    with lab("dnat", guests) as made:
        net.write_sysctls(made.netns, {"net/ipv4/conf/all/route_localnet": "1"})
        subprocess.run(inside(made.netns, "nft", "-f", "-"), input=NFT, text=True, check=True)
        yield made


@contextlib.contextmanager
def proxy() -> Iterator[Lab]:
    """A proxy on each of PROXY_PORTS, to the guest's PROXIED_PORT."""
    with lab("proxy", 1) as made, contextlib.ExitStack() as stack:
        guest = {4: f"TCP4:{GUEST4}", 6: f"TCP6:[{GUEST6}]"}
        loopback = {4: "127.0.0.1", 6: "[::1]"}
        for family, port in PROXY_PORTS.items():
            listen = f"TCP{family}-LISTEN:{port},bind={loopback[family]},fork,reuseaddr,nodelay"
            connect = f"{guest[family]}:{PROXIED_PORT},nodelay"
            # Warnings and notices, of which one says that it listens.
            command = inside(made.netns, "socat", "-d", "-d", listen, connect)
            stack.enter_context(serving(command, "listening"))
        yield made


@contextlib.contextmanager
def clone_to_all(guests: int) -> Iterator[Lab]:
    with lab(f"clone{guests}", guests) as made, tempfile.TemporaryDirectory() as tree:
        indexes = net.link_indexes(made.netns)
        names = [f"uktap{index}" for index in range(FIRST_GUEST, FIRST_GUEST + guests)]
        text = CLONE_TO_ALL
        for word, value in {
            "TAPS": ",".join(str(indexes[name]) for name in names),
            "BRIDGE": hex(int(PLAN.ipv4.ip)),
            "FIRST_PORT": str(PORTS.start),
            "LAST_PORT": str(PORTS.stop),
        }.items():
            text = text.replace(word, value)
        compile.make_kernel_tree(Path(tree))
        os.environ["BCC_KERNEL_SOURCE"] = tree  # read when bcc compiles; whoever compiles next sets its own
        import bcc

        module = bcc.BPF(text=text, cflags=compile.CFLAGS)
        try:
            hooks = [("lo", "egress", "to_guests"), *((name, "ingress", "to_lo") for name in names)]
            for link, hook, function in hooks:
                fd = module.load_func(function, bcc.BPF.SCHED_CLS).fd
                net.attach_program(made.netns, indexes[link], hook, fd)
            yield made
        finally:
            module.cleanup()


def tc(netns: Path, words: str) -> None:
    """Raises Unmeasurable if this kernel cannot do it."""
    done = subprocess.run(["tc", "-n", netns.name, *words.split()], capture_output=True, text=True, check=False)
    if "action module" in done.stderr:
        raise Unmeasurable("this kernel lacks act_pedit, act_csum or act_skbedit")
    if done.returncode != 0:
        raise Unmeasurable(f"tc: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def mirred() -> Iterator[tuple[Path, Lab]]:
    """As Kata and urunc do it; the namespace of the caller, outside, and the pod."""
    with lab("mirred", 1) as made, namespace("mirred-out") as outside:
        tap = f"uktap{FIRST_GUEST}"
        ip("-n", made.netns.name, "link", "delete", net.BRIDGE)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            made.netns.name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            outside.name,
        )
        ip("-n", made.netns.name, "link", "set", "eth0", "up")
        ip("-n", outside.name, "link", "set", "eth0", "up")
        ip("-n", outside.name, "addr", "add", str(PLAN.ipv4), "dev", "eth0")
        for link, other in (("eth0", tap), (tap, "eth0")):
            tc(made.netns, f"qdisc add dev {link} clsact")
            tc(made.netns, f"filter add dev {link} ingress protocol all u32 match u32 0 0 "
                           f"action mirred egress redirect dev {other}")  # fmt: skip
        yield outside, made


@contextlib.contextmanager
def mirred_localhost() -> Iterator[Lab]:
    with lab("mirlo", 1) as made:
        tap, mac = f"uktap{FIRST_GUEST}", format_mac(PLAN.guest_mac(FIRST_GUEST))
        tc(made.netns, "qdisc add dev lo clsact")
        tc(made.netns, f"qdisc add dev {tap} clsact")
        # u32 knows no ranges: 0x4000/0xc000 is 16384-32767, which PORTS lies in.
        tc(made.netns, "filter add dev lo egress protocol ip u32 match ip protocol 6 0xff "
                       "match ip dst 127.0.0.1/32 match ip dport 0x4000 0xc000 "
                       f"action pedit ex munge eth src set {format_mac(PLAN.mac)} munge eth dst set {mac} "
                       f"munge ip src set {BRIDGE4} munge ip dst set {GUEST4} pipe "
                       f"action csum ip4h and tcp pipe action mirred egress redirect dev {tap}")  # fmt: skip
        zero = "00:00:00:00:00:00"
        tc(made.netns, f"filter add dev {tap} ingress protocol ip u32 match ip protocol 6 0xff "
                       f"match ip src {GUEST4}/32 match ip dst {BRIDGE4}/32 match ip sport 0x4000 0xc000 "
                       f"action pedit ex munge eth src set {zero} munge eth dst set {zero} "
                       "munge ip src set 127.0.0.1 munge ip dst set 127.0.0.1 pipe "
                       "action csum ip4h and tcp pipe action skbedit ptype host pipe "
                       "action mirred ingress redirect dev lo")  # fmt: skip
        yield made


# --- all of them ---


def way(client: Path, server: Path, bind: str, dial: str) -> Callable[[], Way]:
    """A new port at every call."""
    return lambda: Way(client=client, server=server, bind=bind, dial=dial, port=next(_ports))


def bridge_of(name: str) -> str:
    """The bridge that an alternative is compared with: the one of its direction and family. Directions differ: what
    comes from a guest passes through a softirq more."""
    direction = "guest to container" if "guest to container" in name else "container to guest"
    return f"bridge, {direction}, {name[-4:]}"


def _unmeasurable(why: Unmeasurable) -> Callable[[], Way]:
    def make() -> Way:
        raise why

    return make


def ways(stack: contextlib.ExitStack) -> dict[str, Callable[[], Way]]:
    """Each alternative with one guest, its namespaces made and kept by the stack."""
    routed = stack.enter_context(played_pod(1, name="bench"))
    guest = routed.guests[0].netns
    plain = stack.enter_context(lab("plain", 1))
    nat = stack.enter_context(dnat(1))
    clone = stack.enter_context(clone_to_all(1))
    proxied = stack.enter_context(proxy())
    outside, mirrored = stack.enter_context(mirred())
    try:
        lo = stack.enter_context(mirred_localhost())
        mirred_lo = way(lo.netns, lo.guests[0], "0.0.0.0", "127.0.0.1")
    except Unmeasurable as exc:
        mirred_lo = _unmeasurable(exc)
    return {
        "bridge, container to guest, IPv4": way(plain.netns, plain.guests[0], GUEST4, GUEST4),
        "bridge, container to guest, IPv6": way(plain.netns, plain.guests[0], GUEST6, GUEST6),
        "bridge, guest to container, IPv4": way(plain.guests[0], plain.netns, BRIDGE4, BRIDGE4),
        "bridge, guest to container, IPv6": way(plain.guests[0], plain.netns, BRIDGE6, BRIDGE6),
        "router, container to guest, IPv4": way(routed.netns, guest, "0.0.0.0", "127.0.0.1"),
        "router, container to guest, IPv6": way(routed.netns, guest, "::", "::1"),
        "router, guest to container, IPv4": way(guest, routed.netns, "127.0.0.1", BRIDGE4),
        "router, guest to container, IPv6": way(guest, routed.netns, "::1", BRIDGE6),
        "nftables DNAT, IPv4": way(nat.netns, nat.guests[0], "0.0.0.0", "127.0.0.1"),
        "tc-mirred (Kata, urunc), IPv4": way(outside, mirrored.guests[0], GUEST4, GUEST4),
        "tc-mirred, localhost, IPv4": mirred_lo,
        "clone-to-all, IPv4": way(clone.netns, clone.guests[0], "0.0.0.0", "127.0.0.1"),
        "proxy (socat), IPv4": lambda: Way(
            client=proxied.netns,
            server=proxied.guests[0],
            bind=GUEST4,
            dial="127.0.0.1",
            port=PROXY_PORTS[4],
            listen_port=PROXIED_PORT,
        ),
    }
