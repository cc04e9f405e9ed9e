"""What the router is compared with, each in a pod-like namespace of its own without the router.

bridge        topology.lab as it is: the client dials the guest's own address, nothing is translated
DNAT          nftables rewrites 127.0.0.1 to the guest's address, conntrack takes it back. IPv4 only: the kernel has no
              route_localnet for IPv6, a ::1 that was rewritten never arrives (tried: the connection times out).
              From guest to container it would need a server that is not bound to loopback, or a second such rule.
proxy         socat copies between a socket on the loopback address and one to the guest
clone-to-all  the known research method, small: what leaves `lo` is cloned to every workload, what comes back goes into
              `lo`; no flow is kept, no L4 check sum mended. Its limits here: TCP over IPv4, container to guest; only
              the ports of the bench; and it works because a veth believes partial check sums (a guest's NIC without
              checksum offload would drop every packet) while the refusals of the guests that do not serve the port
              have full ones, which the copying breaks: so they are dropped, and a port that nobody serves hangs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher import net
from router import compile

from .topology import FIRST_GUEST, PLAN, Lab, lab
from .traffic import inside, serving

PORTS = range(20000, 30000)
PROXY_PORTS = {4: 30004, 6: 30006}
PROXIED_PORT = 30001

NFT = f"""
table ip bench {{
    chain out {{
        type nat hook output priority -100;
        ip daddr 127.0.0.1 tcp dport {PORTS.start}-{PORTS.stop - 1} dnat to {PLAN.guest_ipv4(FIRST_GUEST).ip};
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
        guest = {4: f"TCP4:{PLAN.guest_ipv4(FIRST_GUEST).ip}", 6: f"TCP6:[{PLAN.guest_ipv6(FIRST_GUEST).ip}]"}
        loopback = {4: "127.0.0.1", 6: "[::1]"}
        for family, port in PROXY_PORTS.items():
            listen = f"TCP{family}-LISTEN:{port},bind={loopback[family]},fork,reuseaddr,nodelay"
            connect = f"{guest[family]}:{PROXIED_PORT},nodelay"
            # Warnings and notices, of which one says that it listens; nobody reads what follows, and it is little.
            command = inside(made.netns, "socat", "-d", "-d", listen, connect)
            stack.enter_context(serving(command, "listening"))
        yield made


@contextlib.contextmanager
def clone_to_all(guests: int) -> Iterator[Lab]:
    with lab("clone", guests) as made, tempfile.TemporaryDirectory() as tree:
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
