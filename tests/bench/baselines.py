"""What the router is compared with, each in a pod-like namespace of its own without the router.

DNAT          nftables rewrites 127.0.0.1 to the guest's address, conntrack takes it back
proxy         socat copies between a socket on 127.0.0.1 and one to the guest
clone-to-all  the known research method, small: every packet that leaves `lo` is cloned to every workload; no flow
              is kept and no L4 check sum mended. It works because a veth's peer believes partial check sums.
              IPv4 only, and every guest sees everybody's packets; so ours carries only the ports of the bench.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher import net, state
from launcher.model import AddressPlan
from router import program

PLAN = AddressPlan()
NFT = """
table inet bench {
    chain out { type nat hook output priority -100; ip daddr 127.0.0.1 tcp dport 20000-29999 dnat ip to %s; }
    chain post { type nat hook postrouting priority 100; ip saddr 127.0.0.1 oifname "ukbr0" masquerade; }
}
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
    return port >= 20000 && port < 30000;
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A namespace with a bridge and guests, played by namespaces; no router."""

    netns: Path
    guests: tuple[Path, ...]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def lab(name: str, guests: int) -> Iterator[Lab]:
    """Made of the same parts as a pod."""
    with contextlib.ExitStack() as stack:

        def namespace(suffix: str) -> Path:
            path = state.NETNS_DIR / f"ukb-{os.getpid()}-{name}-{suffix}"
            net.create_netns(path)
            stack.callback(net.delete_netns, path)
            return path

        pod = namespace("pod")
        net.make_bridge(pod, PLAN, name)
        net.write_sysctls(pod, net.LOOPBACK_SYSCTLS)
        played = []
        for index in range(2, 2 + guests):
            guest = namespace(str(index))
            tap = f"uktap{index}"
            ip("link", "add", tap, "netns", pod.name, "type", "veth", "peer", "name", "eth0", "netns", guest.name)
            ip("-n", pod.name, "link", "set", tap, "master", net.BRIDGE, "up")
            ip("-n", guest.name, "link", "set", "lo", "up")
            ip("-n", guest.name, "link", "set", "eth0", "address", PLAN.guest_mac(index).hex(":"), "up")
            ip("-n", guest.name, "addr", "add", str(PLAN.guest_ipv4(index)), "dev", "eth0")
            ip("-n", guest.name, "addr", "add", str(PLAN.guest_ipv6(index)), "dev", "eth0", "nodad")
            played.append(guest)
        yield Lab(netns=pod, guests=tuple(played))


@contextlib.contextmanager
def dnat(guests: int) -> Iterator[Lab]:
    with lab("dnat", guests) as made:
        net.write_sysctls(made.netns, {"net/ipv4/conf/all/route_localnet": "1"})
        rules = NFT % PLAN.guest_ipv4(2).ip
        command = ["nsenter", f"--net={made.netns}", "nft", "-f", "-"]
        subprocess.run(command, input=rules, text=True, check=True)
        yield made


@contextlib.contextmanager
def proxy(port: int, guest_port: int) -> Iterator[Lab]:
    with lab("proxy", 1) as made:
        listen = f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,nodelay"
        connect = f"TCP:{PLAN.guest_ipv4(2).ip}:{guest_port},nodelay"
        process = subprocess.Popen(
            ["nsenter", f"--net={made.netns}", "socat", "-d", "-d", listen, connect], stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "listening" in line:
                    break
            yield made
        finally:
            process.terminate()
            process.communicate()


@contextlib.contextmanager
def clone_to_all(guests: int) -> Iterator[Lab]:
    with lab("clone", guests) as made, tempfile.TemporaryDirectory() as tree:
        program.make_kernel_tree(Path(tree))
        os.environ["BCC_KERNEL_SOURCE"] = tree
        import bcc

        indexes = net.link_indexes(made.netns)
        taps = ",".join(str(indexes[f"uktap{index}"]) for index in range(2, 2 + guests))
        text = CLONE_TO_ALL.replace("TAPS", taps).replace("BRIDGE", hex(int(PLAN.ipv4.ip)))
        module = bcc.BPF(text=text, cflags=["-Wno-macro-redefined"])
        try:
            for link, hook, name in (
                ("lo", "egress", "to_guests"),
                *((f"uktap{n}", "ingress", "to_lo") for n in range(2, 2 + guests)),
            ):
                function = module.load_func(name, bcc.BPF.SCHED_CLS)
                net.attach_program(made.netns, indexes[link], hook, function.fd)
            yield made
        finally:
            module.cleanup()
