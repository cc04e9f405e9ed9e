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
import threading
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import UklaunchError
from .model import AddressPlan, format_mac
from .state import NETNS_DIR, TAG
from .timeline import mark

if TYPE_CHECKING:
    from pyroute2 import IPRoute

T = TypeVar("T")

BRIDGE = "ukbr0"
LOOPBACK_IFINDEX = 1  # in every network namespace: include/net/net_namespace.h
ROUTER_FILTER = "uklaunch"
ROUTER_PREFERENCE = 0x756B  # tc's "pref", by which our filter is told from a stranger's

# Without these two, packets for 127/8 that the router injects into `lo` are martians (net/ipv4/route.c).
LOOPBACK_SYSCTLS = {
    "net/ipv4/conf/lo/route_localnet": "1",
    "net/ipv4/conf/lo/accept_local": "1",
}

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
_IFA_F_NODAD = 0x02
_RTMGRP_NEIGH = 4
_NUD_ANSWERED = 0x02 | 0x04 | 0x08  # REACHABLE, STALE, DELAY: include/uapi/linux/neighbour.h
_NUD_FAILED = 0x20

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
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            enter_netns(netns)
            result.append(function())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


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


# --- links ---


def open_tap(netns: Path, name: str) -> int:
    """A new TAP in the namespace, with vnet_hdr; it lives until the last copy of the descriptor is closed."""

    def body() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
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


def make_bridge(netns: Path, plan: AddressPlan, pod: str) -> int:
    """The pod's bridge, up and with its addresses, and `lo` up. Returns the bridge's interface index."""
    with _iproute(netns, f"make bridge {BRIDGE}") as ip:
        ip.link(
            "add",
            ifname=BRIDGE,
            kind="bridge",
            address=format_mac(plan.mac),
            br_mcast_snooping=0,  # no querier here: neighbour discovery must reach every guest
        )
        index = int(ip.link_lookup(ifname=BRIDGE)[0])
        write_sysctls(netns, _bridge_sysctls())
        ip.link("set", index=index, ifalias=f"{TAG}:{pod}")
        for address in (plan.ipv4, plan.ipv6):
            _add_address(ip, index, str(address.ip), address.network.prefixlen)
        ip.link("set", index=index, state="up")
        ip.link("set", index=LOOPBACK_IFINDEX, state="up")
    return index


def _add_address(ip: IPRoute, index: int, address: str, prefix: int) -> None:
    try:
        # Duplicate address detection would hold IPv6 back for a second; IPv4 ignores the flag.
        flags = _IFA_F_NODAD if ":" in address else 0
        ip.addr("add", index=index, address=address, prefixlen=prefix, flags=flags)
    except Exception as exc:
        # IPv6 switched off on this host: the pod then has one localhost less, and works.
        if ":" not in address or getattr(exc, "code", None) not in (errno.EACCES, errno.EOPNOTSUPP):
            raise


def _bridge_sysctls() -> dict[str, str]:
    # A guest is asked for its address every 100 ms until it answers: that is how we know that it is ready.
    return {
        f"net/ipv4/neigh/{BRIDGE}/retrans_time_ms": "100",
        f"net/ipv6/neigh/{BRIDGE}/retrans_time_ms": "100",
        f"net/ipv6/conf/{BRIDGE}/accept_ra": "0",  # a guest is no router of the pod's
        f"net/ipv6/conf/{BRIDGE}/accept_dad": "0",
    }


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


def attach_guest(
    netns: Path,
    *,
    bridge: int,
    tap: str,
    alias: str,
    addresses: tuple[IPv4Address | IPv6Address, ...],
    program_fd: int,
    pod_id: int,
) -> None:
    """Filter the TAP, then make it a port of the bridge: no frame of the guest's gets past the router."""
    write_sysctls(netns, {f"net/ipv6/conf/{tap}/disable_ipv6": "1"})  # the pod's stack has no business there
    with _iproute(netns, f"join {tap} to {BRIDGE}") as ip:
        index = int(ip.link_lookup(ifname=tap)[0])
        ip.tc("add", "clsact", index)
        _add_filter(ip, index, "ingress", program_fd, pod_id)
        for address in addresses:  # what is known of them is of an earlier guest
            with contextlib.suppress(Exception):
                ip.neigh("del", ifindex=bridge, dst=str(address))
        ip.link("set", index=index, ifalias=f"{TAG}:{alias}", master=bridge, state="up")


def attach_loopback(netns: Path, program_fd: int, pod_id: int) -> bool:
    """Put the router on what leaves `lo`. Returns whether the clsact qdisc there is ours."""
    with _iproute(netns, "attach the router to lo") as ip:
        made = True
        try:
            ip.tc("add", "clsact", LOOPBACK_IFINDEX)
        except Exception as exc:
            if getattr(exc, "code", None) != errno.EEXIST:
                raise
            made = False
        _add_filter(ip, LOOPBACK_IFINDEX, "egress", program_fd, pod_id)
    return made


def attach_program(netns: Path, index: int, hook: str, program_fd: int) -> None:
    """Put any program on a link, as the router is; for the benchmarks."""
    with _iproute(netns, "attach a program") as ip:
        ip.tc("add", "clsact", index)
        _add_filter(ip, index, hook, program_fd, 1)


def detach_loopback(netns: Path, *, own_clsact: bool) -> None:
    """Idempotent."""
    with _iproute(netns, "take the router off lo") as ip:
        try:
            if own_clsact:
                ip.tc("del", "clsact", LOOPBACK_IFINDEX)
            else:
                ip.tc(
                    "del-filter",
                    "bpf",
                    LOOPBACK_IFINDEX,
                    parent=_PARENTS["egress"],
                    prio=ROUTER_PREFERENCE,
                )
        except Exception as exc:
            if getattr(exc, "code", None) not in (errno.ENOENT, errno.EINVAL, errno.ENODEV):
                raise


_PARENTS = {"ingress": "ffff:fff2", "egress": "ffff:fff3"}


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


def open_socket(netns: Path, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    """A non-blocking socket that lives in the namespace, whatever thread uses it."""
    with _explained("open a socket in the pod"):
        return in_netns(netns, lambda: socket.socket(family, kind | socket.SOCK_NONBLOCK))
