"""Namespaces, links, filters and sysctls of a pod. The only importer of pyroute2, the only caller of setns(2)
and TUNSETIFF.

    pod's network namespace
    ┌──────────────────────────────────────────────┐
    │ containers ── lo ◄─ router (egress)          │
    │                                              │
    │            ukbr0  169.254.77.1 fd00:77::1    │
    │            │    │                            │
    │       uktap2    uktap3 ◄─ router (ingress)   │
    └────────────┼────┼────────────────────────────┘
              guest  guest

pyroute2 costs as much as all else of a launch, so it is imported where it is first used. Everything here is
synchronous and short. A thread that has entered a namespace is thrown away: trio's pooled threads never enter one.
Sources: setns(2), namespaces(7), Documentation/networking/tuntap.rst, tc-bpf(8).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import limits
from .errors import UklaunchError
from .model import AddressPlan, format_mac
from .state import NETNS_DIR, TAG
from .threads import in_a_new_thread
from .timeline import mark

if TYPE_CHECKING:
    from pyroute2 import IPRoute

T = TypeVar("T")
Interface = IPv4Interface | IPv6Interface
G = TypeVar("G", bound=tuple[IPv4Interface | IPv6Interface, ...])

BRIDGE = "ukbr0"
RATE_LINK = "ukrate"  # and the guest's index
LOOPBACK_IFINDEX = 1  # in every network namespace: include/net/net_namespace.h
ROUTER_FILTER = "uklaunch"
ROUTER_PREFERENCE = 0x756B  # tc's "pref", by which our filter is told from a stranger's
_RATE_HANDLE = ROUTER_PREFERENCE << 16  # the same for a qdisc
_RATE_PACKET = 1 << 16  # what GSO makes of TCP's segments

# Without these two, packets for 127/8 that the router injects into `lo` are martians (net/ipv4/route.c).
LOOPBACK_SYSCTLS = {
    "net/ipv4/conf/lo/route_localnet": "1",
    "net/ipv4/conf/lo/accept_local": "1",
}

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD, _TUNGETIFF, _TUNSETIFINDEX = 0x400454D0, 0x800454D2, 0x400454DA
_TUNGETVNETHDRSZ, _TUNSETVNETHDRSZ, _TUNGETDEVNETNS = 0x800454D7, 0x400454D8, 0x54E3
# TUN_F_* of include/uapi/linux/if_tun.h by the feature that drivers/net/tun.c sets for it
_TUN_F = {
    "tx-checksum-ip-generic": 0x01,
    "tx-tcp-segmentation": 0x02,
    "tx-tcp6-segmentation": 0x04,
    "tx-tcp-ecn-segmentation": 0x08,
    "tx-udp-segmentation": 0x20 | 0x40,
}
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
_IFF_UP = 0x1
_IFA_F_NODAD = 0x02
_RTMGRP_NEIGH = 4
_NUD_ANSWERED = 0x02 | 0x04 | 0x08  # REACHABLE, STALE, DELAY: include/uapi/linux/neighbour.h
_NUD_FAILED = 0x20
_RTM_F_FIB_MATCH = 0x2000  # tell the route itself, not what was made of it
_RT_TABLE_MAIN = 254
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

_REMEDIES = {
    errno.EPERM: "run uklaunch as root",
    errno.EACCES: "run uklaunch as root",
    errno.EEXIST: "a link of that name is there already: see ip link",
    errno.ENODEV: "load the kernel's module for it, see: uklaunch doctor",
    errno.EOPNOTSUPP: "this kernel lacks the feature, see: uklaunch doctor",
    errno.ENOENT: "this kernel lacks the feature, see: uklaunch doctor",
}


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Translate an errno, from a system call or from netlink, at the edge."""
    try:
        yield
    except OSError as exc:
        raise UklaunchError(f"cannot {what}: {exc.strerror or exc}", _REMEDIES.get(exc.errno or 0, "")) from exc
    except Exception as exc:
        code = getattr(exc, "code", None)  # pyroute2's NetlinkError is no OSError
        if not isinstance(code, int):
            raise
        raise UklaunchError(f"cannot {what}: {os.strerror(code)}", _REMEDIES.get(code, "")) from exc


# --- namespaces ---


def enter_netns(netns: Path) -> None:
    """Move the calling thread, and it alone, into the namespace. It cannot be relied on to get back."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(fd)


def in_netns(netns: Path, function: Callable[[], T]) -> T:
    """Run the function in a thread of its own inside the namespace; what it opens there can be used anywhere."""

    def body() -> T:
        enter_netns(netns)
        return function()

    return in_a_new_thread(body, "netns")


def check_netns(netns: Path) -> None:
    """Raises UklaunchError unless the path is a network namespace that we may enter."""
    with _explained(f"enter {netns} as a network namespace"):
        in_netns(netns, lambda: None)


def enter_pod(netns: Path) -> None:
    """Move this process into the namespace, for a command that is to run there."""
    with _explained(f"enter {netns}"):
        enter_netns(netns)


def create_netns(netns: Path) -> None:
    """Make a namespace that `ip netns`, podman and OCI runtimes can join by its path."""
    _ip_netns("add", netns)


def delete_netns(netns: Path) -> None:
    """Idempotent. Who is still inside keeps the namespace, without a name."""
    if netns.exists():
        _ip_netns("delete", netns)


def _ip_netns(verb: str, netns: Path) -> None:
    # ip(8) also makes /run/netns a shared mount, which other mount namespaces need to see the name.
    assert netns.parent == NETNS_DIR
    try:
        subprocess.run(["ip", "netns", verb, netns.name], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UklaunchError("the command ip is missing", "apt-get install iproute2") from None
    except subprocess.CalledProcessError as exc:
        why = exc.stderr.strip().splitlines()
        raise UklaunchError(
            f"cannot {verb} namespace {netns}: {why[-1] if why else exc}",
            "run uklaunch as root" if os.geteuid() else "",
        ) from exc


def write_sysctls(netns: Path, values: Mapping[str, str]) -> dict[str, str]:
    """Set what exists (a kernel may lack IPv6); returns what was there before."""

    def body() -> dict[str, str]:
        before = {}
        for name, value in values.items():
            path = Path("/proc/sys") / name  # /proc/sys/net shows the reading thread's namespace
            with contextlib.suppress(FileNotFoundError):
                before[name] = path.read_text().strip()
                if before[name] != value:
                    path.write_text(value)
        return before

    with _explained("set the pod's sysctls"):
        return in_netns(netns, body)


def read_sysctls(netns: Path, names: Iterable[str]) -> dict[str, str]:
    """Those that exist."""

    def body() -> dict[str, str]:
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = (Path("/proc/sys") / name).read_text().strip()
        return found

    with _explained("read the pod's sysctls"):
        return in_netns(netns, body)


def match_sysctls(netns: Path, pattern: str) -> dict[str, str]:
    """Those whose names match, such as `net/ipv6/conf/*/forwarding`; none if this kernel lacks them."""

    def body() -> dict[str, str]:
        root = Path("/proc/sys")
        return {str(path.relative_to(root)): path.read_text().strip() for path in sorted(root.glob(pattern))}

    with _explained("read sysctls"):
        return in_netns(netns, body)


# --- links ---


def _set_tap(fd: int, name: str) -> None:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))


def open_tap(netns: Path, name: str) -> int:
    """A new TAP in the namespace, with vnet_hdr; it lives until the last copy of the descriptor is closed."""

    def body() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            _set_tap(fd, name)
        except BaseException:
            os.close(fd)
            raise
        return fd

    try:
        return in_netns(netns, body)
    except FileNotFoundError:
        raise UklaunchError("/dev/net/tun is missing", "load it: modprobe tun") from None
    except OSError as exc:
        hint = {
            errno.EBUSY: "a link of that name is there already: see ip link",
            errno.EPERM: "run uklaunch as root",
            errno.EACCES: "run uklaunch as root",
        }.get(exc.errno or 0, "see: uklaunch doctor")
        raise UklaunchError(f"cannot make TAP {name}: {exc.strerror}", hint) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class TapOffload:
    """What a VMM has agreed upon with its guest: how long the header is before each frame, in bytes, and TUN_F_*."""

    header: int
    flags: int


def tap_offload(netns: Path, fd: int, name: str) -> TapOffload:
    """As it is now. Raises OSError if the TAP is gone."""
    from pyroute2.ethtool.ioctl import IoctlEthtool

    header = bytearray(4)
    fcntl.ioctl(fd, _TUNGETVNETHDRSZ, header)

    def body() -> int:
        ethtool = IoctlEthtool(name)
        try:
            features = ethtool.get_features()
        finally:
            ethtool.close()
        return sum(flag for feature, flag in _TUN_F.items() if feature in features and features.get_value(feature))

    return TapOffload(header=int.from_bytes(header, "little"), flags=in_netns(netns, body))


def restore_tap(netns: Path, fd: int, name: str, index: int, offload: TapOffload) -> None:
    """Make a TAP again that has been deleted, or fetch it back from another namespace; who reads `fd` reads on.

    A deleted TAP leaves its open file behind, detached, and a file that is detached can be attached anew
    (drivers/net/tun.c, tun_detach_all, tun_attach). Under the same index: so the router and all flows know it.
    """
    with _explained(f"make TAP {name} again"):
        try:
            current = fcntl.ioctl(fd, _TUNGETIFF, bytes(40))[:16].rstrip(b"\0").decode()
        except OSError as exc:
            if exc.errno != errno.EBADFD:
                raise
        else:
            _fetch_link(netns, fd, current)
            return
        fcntl.ioctl(fd, _TUNSETIFINDEX, struct.pack("I", index))
        _set_tap(fd, name)
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", offload.header))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, offload.flags)


def _fetch_link(netns: Path, tap_fd: int, name: str) -> None:
    there = fcntl.ioctl(tap_fd, _TUNGETDEVNETNS)
    here = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _iproute(Path(f"/proc/self/fd/{there}"), f"fetch {name} back") as ip:
            ip.link("set", index=int(ip.link_lookup(ifname=name)[0]), net_ns_fd=here)
    finally:
        os.close(there)
        os.close(here)


@contextlib.contextmanager
def _iproute(netns: Path, what: str) -> Iterator[IPRoute]:
    """pyroute2 on a socket of ours: its own way into a namespace forks the process."""
    from pyroute2 import IPRoute

    mark("pyroute2")
    with _explained(what), open_netlink(netns) as sock:
        ip = IPRoute(use_socket=sock)
        try:
            yield ip
        finally:
            ip.close()


def open_netlink(netns: Path, groups: int = 0) -> socket.socket:
    """A netlink socket in the namespace, subscribed to the multicast groups."""

    def body() -> socket.socket:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 0)
        if groups:
            sock.bind((0, groups))
        return sock

    return in_netns(netns, body)


def make_bridge(netns: Path, plan: AddressPlan, pod: str, index: int = 0) -> int:
    """The pod's bridge, up and with its addresses, and `lo` up. Returns the bridge's interface index.

    `index`: the bridge that was made once; it is made again under that index, or put right.
    """
    with _iproute(netns, f"make bridge {BRIDGE}") as ip:
        bridge = {
            "kind": "bridge",
            "address": format_mac(plan.mac),
            "br_mcast_snooping": 0,  # no querier here: neighbour discovery must reach every guest
        }
        link = _get_link(ip, index) if index else None
        if link is None:
            ip.link("add", ifname=BRIDGE, **({"index": index} if index else {}), **bridge)
            index = int(ip.link_lookup(ifname=BRIDGE)[0])
        else:
            _rename(ip, link, BRIDGE)
            ip.link("set", index=index, **bridge)
        write_sysctls(netns, bridge_sysctls())
        ip.link("set", index=index, ifalias=f"{TAG}:{pod}")
        ip.link("set", index=index, state="up")
        for address in (plan.ipv4, plan.ipv6):
            _add_address(ip, index, address)
        ip.link("set", index=LOOPBACK_IFINDEX, state="up")
    return index


def _get_link(ip: IPRoute, index: int) -> Any:
    """None if there is no such link, as there is none of index 0."""
    if not index:
        return None
    try:
        return ip.link("get", index=index)[0]
    except Exception as exc:
        if getattr(exc, "code", None) != errno.ENODEV:
            raise
        return None


def _rename(ip: IPRoute, link: Any, name: str) -> None:
    if link.get_attr("IFLA_IFNAME") == name:
        return
    try:
        ip.link("set", index=link["index"], ifname=name)
    except Exception as exc:
        if getattr(exc, "code", None) != errno.EBUSY:
            raise
        ip.link("set", index=link["index"], state="down")  # kernels before 6.2 rename no link that is up
        ip.link("set", index=link["index"], ifname=name)


def set_up_loopback(netns: Path, addresses: tuple[Interface, ...]) -> None:
    """`lo` as the kernel makes it. Idempotent."""
    with _iproute(netns, "set lo up") as ip:
        ip.link("set", index=LOOPBACK_IFINDEX, state="up")
        for address in addresses:
            _add_address(ip, LOOPBACK_IFINDEX, address)


def _add_address(ip: IPRoute, index: int, address: Interface) -> None:
    """Put the address on the link, with its routes; anew if it is there and its routes are not."""
    words = {"index": index, "address": str(address.ip), "prefixlen": address.network.prefixlen}
    if address.version == 6:
        words["flags"] = _IFA_F_NODAD  # duplicate address detection would hold it back for a second
    try:
        ip.addr("add", **words)
    except Exception as exc:
        code = getattr(exc, "code", None)
        if code == errno.EEXIST:
            if not _is_routed(ip, index, address):
                ip.addr("del", **words)
                ip.addr("add", **words)
        # IPv6 switched off on this host: the pod then has one localhost less, and works.
        elif address.version == 4 or code not in (errno.EACCES, errno.EOPNOTSUPP):
            raise


def _is_routed(ip: IPRoute, index: int, address: Interface) -> bool:
    """Are packets for the address ours, and do packets for its network leave by the link?"""
    wanted = {address.ip: LOOPBACK_IFINDEX}
    if address.network.num_addresses > 1:
        # Not the last address, which is IPv4's broadcast.
        wanted[next(host for host in (address.network[2], address.network[3]) if host != address.ip)] = index
    for destination, interface in wanted.items():
        try:
            route = next(iter(ip.route("get", dst=str(destination))))
        except Exception as exc:
            if getattr(exc, "code", None) not in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                raise
            return False
        if route.get_attr("RTA_OIF") != interface:
            return False
    return True


def bridge_sysctls() -> dict[str, str]:
    # A guest is asked for its address every 100 ms until it answers: that is how we know that it is ready.
    return {
        f"net/ipv4/neigh/{BRIDGE}/retrans_time_ms": "100",
        f"net/ipv6/neigh/{BRIDGE}/retrans_time_ms": "100",
        f"net/ipv6/conf/{BRIDGE}/accept_ra": "0",  # a guest is no router of the pod's
        f"net/ipv6/conf/{BRIDGE}/accept_dad": "0",
    }


def tap_sysctls(tap: str) -> dict[str, str]:
    return {f"net/ipv6/conf/{tap}/disable_ipv6": "1"}  # the pod's stack has no business there


def delete_link(netns: Path, index: int) -> None:
    """Idempotent."""
    with _iproute(netns, "delete a link") as ip:
        try:
            ip.link("del", index=index)
        except Exception as exc:
            if getattr(exc, "code", None) != errno.ENODEV:
                raise


def link_indexes(netns: Path) -> dict[str, int]:
    """Every link's name and index, asked without pyroute2."""
    return in_netns(netns, lambda: {name: index for index, name in socket.if_nameindex()})


def link_aliases(netns: Path, names: Iterable[str]) -> dict[str, str]:
    """Of those that exist; an alias is where a link says whose it is."""
    names = list(names)
    if not names:
        return {}  # without pyroute2
    with _iproute(netns, "look at links") as ip:
        return {name: link.get_attr("IFLA_IFALIAS") or "" for name in names for link in ip.get_links(ifname=name)}


def attach_guest(
    netns: Path,
    *,
    bridge: int,
    tap: str,
    alias: str,
    addresses: tuple[IPv4Address | IPv6Address, ...],
    mtu: int,
    program_fd: int,
    pod_id: int,
    index: int = 0,
    rate_bits: int | None = None,
) -> None:
    """Filter the TAP, then make it a port of the bridge: no frame of the guest's gets past the router.

    `index`: the TAP that has once been attached; what is amiss with it is put right. `rate_bits`: so many a second may
    go to the guest.
    """
    with _iproute(netns, f"join {tap} to {BRIDGE}") as ip:
        if index:
            _rename(ip, ip.link("get", index=index)[0], tap)
        else:
            index = int(ip.link_lookup(ifname=tap)[0])
        write_sysctls(netns, tap_sysctls(tap))
        _attach_router(ip, index, "ingress", program_fd, pod_id)
        if rate_bits is not None:
            _shape(ip, index, rate_bits)
        for address in addresses:  # what is known of them is of an earlier guest
            with contextlib.suppress(Exception):
                ip.neigh("del", ifindex=bridge, dst=str(address))
        ip.link("set", index=index, ifalias=f"{TAG}:{alias}", mtu=mtu, master=bridge, state="up")


def attach_loopback(netns: Path, program_fd: int, pod_id: int) -> bool:
    """Put the router on what leaves `lo`, unless it is there. Returns whether the clsact qdisc has been made for it."""
    with _iproute(netns, "attach the router to lo") as ip:
        return _attach_router(ip, LOOPBACK_IFINDEX, "egress", program_fd, pod_id)


def attach_uplink(netns: Path, index: int, program_fd: int, pod_id: int) -> bool:
    """Put the router on what comes in by the uplink, unless it is there. Returns whether the clsact qdisc has been made
    for it."""
    with _iproute(netns, "attach the router to the uplink") as ip:
        return _attach_router(ip, index, "ingress", program_fd, pod_id)


def make_rate_link(
    netns: Path,
    *,
    name: str,
    alias: str,
    mtu: int,
    rate_bits: int,
    program_fd: int,
    pod_id: int,
    indexes: tuple[int, int] = (0, 0),
) -> tuple[int, int]:
    """The detour of what a guest sends: a veth pair whose first end holds it to so many bits a second. Idempotent.

    Returns the ends' interface indexes. `indexes`: it has once been made; what is amiss with it is put right, and the
    first end, which the router knows, keeps its index.
    """
    names = (name, rate_peer(name))
    with _iproute(netns, f"make {name}") as ip:
        links = [_get_link(ip, index) for index in indexes]
        if None not in links:
            for link, own in zip(links, names, strict=True):
                _rename(ip, link, own)
        else:
            for left in [index for own in names for index in ip.link_lookup(ifname=own)][:1]:  # the other goes with it
                ip.link("del", index=left)
            ip.link("add", ifname=name, index=indexes[0], kind="veth", peer={"ifname": names[1]})
        ends = (int(ip.link_lookup(ifname=names[0])[0]), int(ip.link_lookup(ifname=names[1])[0]))
        write_sysctls(netns, {key: value for own in names for key, value in tap_sysctls(own).items()})
        _shape(ip, ends[0], rate_bits)
        _attach_router(ip, ends[1], "ingress", program_fd, pod_id)
        for end in ends:
            ip.link("set", index=end, ifalias=f"{TAG}:{alias}", mtu=mtu, state="up")
    return ends


def rate_peer(name: str) -> str:
    return f"{name}b"


def _shape(ip: IPRoute, index: int, rate_bits: int) -> None:
    """Idempotent. What the router redirects to the link passes this too: net/core/filter.c, __bpf_tx_skb()."""
    if _rate(ip, index) == rate_bits // 8:
        return
    burst = limits.burst_bytes(rate_bits)
    queue = burst + rate_bits // 8 // 20  # 50 ms
    ip.tc("replace", "tbf", index, handle=_RATE_HANDLE, rate=rate_bits // 8, burst=burst, limit=queue, mtu=_RATE_PACKET)


def _rate(ip: IPRoute, index: int) -> int | None:
    """Bytes a second of the tbf qdisc that `_shape` has put on the link."""
    for qdisc in ip.get_qdiscs(index=index):
        if qdisc["handle"] == _RATE_HANDLE and qdisc.get_attr("TCA_KIND") == "tbf":
            return int(qdisc.get_attr("TCA_OPTIONS").get_attr("TCA_TBF_PARMS")["rate"])
    return None


def _attach_router(ip: IPRoute, index: int, hook: str, program_fd: int, pod_id: int) -> bool:
    """Idempotent. Returns whether the link had no clsact qdisc before."""
    made = True
    try:
        ip.tc("add", "clsact", index)
    except Exception as exc:
        if getattr(exc, "code", None) != errno.EEXIST:
            raise
        made = False
    if made or not _has_router(_filters(ip, index, hook), pod_id):
        _add_filter(ip, index, hook, program_fd, pod_id)
    return made


def _filters(ip: IPRoute, index: int, hook: str) -> list[tuple[int, Any]]:
    """(preference, options or None) of each filter on the hook, in the order in which the kernel asks them."""
    found = ip.get_filters(index=index, parent=_PARENT_NUMBERS[hook])
    return [(message["info"] >> 16, message.get_attr("TCA_OPTIONS")) for message in found if message["handle"]]


def _has_router(filters: list[tuple[int, Any]], pod_id: int) -> bool:
    return any(
        preference == ROUTER_PREFERENCE
        and hasattr(options, "get_attr")  # else a filter of another kind
        and options.get_attr("TCA_BPF_NAME") == ROUTER_FILTER
        and options.get_attr("TCA_BPF_CLASSID") == pod_id
        for preference, options in filters
    )


def attach_program(netns: Path, index: int, hook: str, program_fd: int) -> None:
    """Put any program on a link, as the router is; for the benchmarks."""
    with _iproute(netns, "attach a program") as ip:
        ip.tc("add", "clsact", index)
        _add_filter(ip, index, hook, program_fd, 1)


def detach_loopback(netns: Path, *, own_clsact: bool) -> None:
    """Idempotent."""
    with _iproute(netns, "take the router off lo") as ip:
        _detach_router(ip, LOOPBACK_IFINDEX, "egress", own_clsact)


def detach_uplink(netns: Path, name: str, *, own_clsact: bool) -> None:
    """Idempotent."""
    with _iproute(netns, f"take the router off {name}") as ip:
        for index in ip.link_lookup(ifname=name):
            _detach_router(ip, index, "ingress", own_clsact)


def _detach_router(ip: IPRoute, index: int, hook: str, own_clsact: bool) -> None:
    try:
        if own_clsact:
            ip.tc("del", "clsact", index)
        else:
            ip.tc("del-filter", "bpf", index, parent=_PARENTS[hook], prio=ROUTER_PREFERENCE)
    except Exception as exc:
        if getattr(exc, "code", None) not in (errno.ENOENT, errno.EINVAL, errno.ENODEV):
            raise


_PARENTS = {"ingress": "ffff:fff2", "egress": "ffff:fff3"}
_PARENT_NUMBERS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}


def _add_filter(ip: IPRoute, index: int, hook: str, program_fd: int, pod_id: int) -> None:
    # cls_bpf hands the class id to the program (its low 16 bits as skb->tc_classid): so the program knows the pod.
    ip.tc(
        "add-filter",
        "bpf",
        index,
        fd=program_fd,
        name=ROUTER_FILTER,
        parent=_PARENTS[hook],
        prio=ROUTER_PREFERENCE,
        classid=pod_id,
        direct_action=True,
    )


# --- is it as it was made? ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a link of ours is to be like; `hook` is where the router sits on it. `alone`: nothing else of it is ours."""

    label: str
    name: str
    index: int
    hook: str = ""
    alone: bool = False
    alias: str = ""
    mac: str = ""
    mtu: int = 0
    rate_bits: int | None = None
    master: int = 0
    addresses: tuple[Interface, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)


def has_ipv6(netns: Path, name: str) -> bool:
    """Has the link's IPv6 not been switched off?"""

    def body() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").read_text().strip() == "0"
        return False

    return in_netns(netns, body)


def faults(netns: Path, devices: Sequence[Device], pod_id: int) -> dict[str, list[str]]:
    """What is not as it is to be, by the device's name: "bridge ukbr0 was set down"."""
    found = dict[str, list[str]]()
    sysctls = read_sysctls(netns, {name for device in devices for name in device.sysctls})
    with _iproute(netns, "look at the pod's links") as ip:
        addresses = list(ip.get_addr())
        for device in devices:
            found[device.name] = [
                f"{device.label}{'' if fault.startswith('was ') else ':'} {fault}"
                for fault in _faults(ip, device, addresses, sysctls, pod_id)
            ]
    return {name: those for name, those in found.items() if those}


def _faults(
    ip: IPRoute, device: Device, addresses: list[Any], sysctls: Mapping[str, str], pod_id: int
) -> Iterator[str]:
    link = _get_link(ip, device.index)
    if device.alone:
        yield from _router_faults(ip, device, pod_id) if link is not None else ()
        return
    if link is None:
        yield "was removed"
        return
    yield from _link_faults(link, device)
    yield from _address_faults(ip, device, addresses)
    if device.rate_bits is not None and _rate(ip, device.index) != device.rate_bits // 8:
        yield "its rate was taken off"
    if device.hook:
        yield from _router_faults(ip, device, pod_id)
    if link.get_attr("IFLA_IFNAME") != device.name:  # then its sysctls have another name too
        return
    for name, wanted in device.sysctls.items():
        if sysctls.get(name, wanted) != wanted:
            yield f"{name.replace('/', '.')} was set to {sysctls[name]}"


def _link_faults(link: Any, device: Device) -> Iterator[str]:
    if (name := link.get_attr("IFLA_IFNAME")) != device.name:
        yield f"was renamed to {name}"
    if not link["flags"] & _IFF_UP:
        yield "was set down"
    if device.mac and (mac := link.get_attr("IFLA_ADDRESS")) != device.mac:
        yield f"was given the MAC address {mac}"
    if device.mtu and (mtu := link.get_attr("IFLA_MTU")) != device.mtu:
        yield f"was given an MTU of {mtu}"
    if device.master and link.get_attr("IFLA_MASTER") != device.master:
        yield "was taken off its bridge"
    if device.alias and link.get_attr("IFLA_IFALIAS") != device.alias:
        yield "was given another alias"


def _address_faults(ip: IPRoute, device: Device, addresses: list[Any]) -> Iterator[str]:
    present = {
        (message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"), message["prefixlen"])
        for message in addresses
        if message["index"] == device.index
    }
    for address in device.addresses:
        if (str(address.ip), address.network.prefixlen) not in present:
            yield f"address {address} was removed"
        elif not _is_routed(ip, device.index, address):
            yield f"the route of {address} was removed"


def _router_faults(ip: IPRoute, device: Device, pod_id: int) -> Iterator[str]:
    filters = _filters(ip, device.index, device.hook)
    if not _has_router(filters, pod_id):
        yield "the router was removed"
    first = [preference for preference, _ in filters if preference < ROUTER_PREFERENCE]
    if first:
        yield (
            f"another program was put before the router, which sees only what that one leaves; to take it off: "
            f"tc filter del dev {device.name} {device.hook} pref {first[0]}"
        )


# --- is the guest there? ---


def open_neighbour_events(netns: Path) -> socket.socket:
    """A netlink socket that tells of every change in the namespace's neighbour tables."""

    with _explained("watch the pod's neighbours"):
        return open_netlink(netns, _RTMGRP_NEIGH)


def parse_neighbour_events(data: bytes) -> Iterator[tuple[IPv4Address | IPv6Address, bool]]:
    """(address, answered) for each change; not answered: the kernel has given up asking."""
    from pyroute2.netlink.rtnl.marshal import MarshalRtnl

    for message in MarshalRtnl().parse(data):
        if message["event"] == "RTM_NEWNEIGH" and (dst := message.get_attr("NDA_DST")):
            if message["state"] & _NUD_ANSWERED:
                yield ip_address(dst), True
            elif message["state"] & _NUD_FAILED:
                yield ip_address(dst), False


def are_about(data: bytes, indexes: Collection[int]) -> bool:
    """Is one of these netlink messages about one of the links, or about routes and rules, which are of no one link?"""
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.marshal import MarshalRtnl
    from pyroute2.netlink.rtnl.tcmsg import tcmsg

    of_links = (ifinfmsg, ifaddrmsg, tcmsg)
    return any(
        not isinstance(message, of_links) or message["index"] in indexes for message in MarshalRtnl().parse(data)
    )


def open_socket(netns: Path, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    """A non-blocking socket that lives in the namespace, whatever thread uses it."""
    with _explained("open a socket in the pod"):
        return in_netns(netns, lambda: socket.socket(family, kind | socket.SOCK_NONBLOCK))


# --- uplinks ---


netlink = _iproute  # for several of the following at the price of one: each handle costs 2 ms


def first_free(ip: IPRoute, groups: Iterable[G]) -> G | None:
    """The first group of addresses to which no route of the namespace leads, but perhaps a default route."""
    from pyroute2.netlink.exceptions import NetlinkError

    def is_free(address: IPv4Interface | IPv6Interface) -> bool:
        try:
            (route, *_) = ip.route("get", dst=str(address.ip), flags=_RTM_F_FIB_MATCH)
        except NetlinkError:  # ENETUNREACH and its like: no route at all
            return True
        return bool(route["dst_len"] == 0)

    return next((group for group in groups if all(is_free(address) for address in group)), None)


def add_veth(ip: IPRoute, name: str, netns: Path, peer: str) -> None:
    """A pair of links, each born in its namespace."""
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ip.link("add", ifname=name, kind="veth", peer={"ifname": peer, "net_ns_fd": fd})
    finally:
        os.close(fd)


def set_up_link(
    ip: IPRoute,
    name: str,
    *,
    alias: str,
    addresses: Iterable[IPv4Interface | IPv6Interface],
    routes: Iterable[tuple[IPv4Network | IPv6Network, IPv4Address | IPv6Address]] = (),
) -> None:
    """Name the link's owner, give it its addresses, bring it up, and lead (network, gateway) routes over it."""
    index = int(ip.link_lookup(ifname=name)[0])
    ip.link("set", index=index, ifalias=f"{TAG}:{alias}")
    for address in addresses:
        _add_address(ip, index, address)
    ip.link("set", index=index, state="up")
    for network, gateway in routes:
        with _ipv6_may_be_missing(gateway):
            ip.route("add", dst=str(network), gateway=str(gateway), oif=index, family=_FAMILIES[gateway.version])


@contextlib.contextmanager
def _ipv6_may_be_missing(address: IPv4Address | IPv6Address) -> Iterator[None]:
    """IPv6 switched off on this host: what is to be done is done for IPv4 alone."""
    try:
        yield
    except Exception as exc:
        if address.version == 4 or getattr(exc, "code", None) not in (errno.EACCES, errno.EOPNOTSUPP):
            raise


def add_local_route(netns: Path, name: str, address: IPv6Address, metric: int) -> None:
    """Take packets for the address that come in from the link as the namespace's own. Idempotent."""
    with _iproute(netns, f"route {address}") as ip, _ipv6_may_be_missing(address):
        index = int(ip.link_lookup(ifname=name)[0])
        ip.route("replace", dst=f"{address}/128", type="local", table=_RT_TABLE_MAIN, oif=index, priority=metric)


def find_uplink(netns: Path) -> tuple[str, list[IPv4Address | IPv6Address]]:
    """The link that the default routes leave by, and its addresses of global scope; ("", []) if there is none."""
    with _iproute(netns, "look for an uplink") as ip:
        for family in _FAMILIES.values():
            for route in ip.get_default_routes(family=family, table=_RT_TABLE_MAIN):
                if (index := route.get_attr("RTA_OIF")) is not None:
                    (link,) = ip.get_links(index)
                    rows = ip.get_addr(index=index, scope=0)
                    found = [row.get_attr("IFA_LOCAL") or row.get_attr("IFA_ADDRESS") for row in rows]
                    return str(link.get_attr("IFLA_IFNAME")), [ip_address(text) for text in found]
    return "", []


def delete_links(netns: Path, names: Iterable[str]) -> None:
    """Those that exist."""
    present = link_indexes(netns)
    for name in names:
        if name in present:
            delete_link(netns, present[name])
