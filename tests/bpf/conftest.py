"""Pods and guests made of namespaces, on a BPF file system of the tests' own.

    ukr-<pid>-pod                                 ukr-<pid>-2, -3, ...
    ┌───────────────────────────────┐            ┌──────────────────────────┐
    │ containers ── lo ◄─ router    │            │                          │
    │                               │            │  a guest: its own stack, │
    │ ukbr0 ── uktap2 ◄─ router ────┼─── veth ───┼─ eth0  169.254.77.2      │
    │       └─ uktap3 ...           │            │        fd00:77::2        │
    └───────────────────────────────┘            └──────────────────────────┘

Needs root and the kernel, not the launcher. A skip would hide that a machine cannot test: there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TypeVar

import pytest

import router
from router import program

from . import packets

T = TypeVar("T")

# Never the same twice: the devices of a namespace that is going away outlive its name by a moment.
POD_IDS = itertools.count(1)
BRIDGE_MAC = bytes.fromhex("020000007701")
BRIDGE4, BRIDGE6 = IPv4Address("169.254.77.1"), IPv6Address("fd00:77::1")


def run(*words: str | Path, netns: str | None = None) -> str:
    # Not `ip netns exec`: it mounts another /sys over ours, without our pins.
    prefix = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
    done = subprocess.run([*prefix, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def in_netns(netns: str, function: Callable[[], T]) -> T:
    """Run the function in a thread of its own inside the namespace."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            fd = os.open(f"/run/netns/{netns}", os.O_RDONLY)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.setns(fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())
            finally:
                os.close(fd)
            result.append(function())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


@pytest.fixture(scope="session")
def bpffs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("bpffs")
    with packets.mounted_bpffs(path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("UKLAUNCH_BPFFS", str(path))
        yield path


@pytest.fixture
def table(bpffs: Path) -> Iterator[router.Router]:
    with router.open_router() as opened:
        yield opened
        for pod_id in opened.pod_ids():
            opened.remove_pod(pod_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    index: int
    netns: str
    row: router.GuestRow


@dataclass(slots=True, kw_only=True)
class Pod:
    """A pod with guests that have all been seen in both families."""

    table: router.Router
    id: int
    netns: str
    guests: list[Guest] = field(default_factory=list)

    def socket(self, where: Guest | None, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """A socket of a container (None) or inside a guest; it times out, so that a hang is a failure."""
        netns = where.netns if where else self.netns
        sock = in_netns(netns, lambda: socket.socket(family, kind))
        sock.settimeout(3)
        return sock


def attach(netns: str, interface: str, hook: str, fd: int, class_id: int) -> None:
    from pyroute2 import IPRoute

    parents = {"ingress": "ffff:fff2", "egress": "ffff:fff3"}
    sock = in_netns(netns, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 0))
    with contextlib.closing(IPRoute(use_socket=sock)) as ip:
        index = ip.link_lookup(ifname=interface)[0]
        ip.tc("add", "clsact", index)
        ip.tc(
            "add-filter",
            "bpf",
            index,
            fd=fd,
            name="uklaunch",
            parent=parents[hook],
            classid=class_id,
            direct_action=True,
        )
    sock.close()


def _add_guest(pod: Pod, index: int, ports: Sequence[tuple[str, int]], ipv6: bool) -> Guest:
    netns, tap = f"{pod.netns[:-4]}-{index}", f"uktap{index}"
    row = router.GuestRow(
        index=index,
        ifindex=100 + index,
        mac=bytes((2, 0, 0, 0, 0x77, index)),
        ipv4=IPv4Address(f"169.254.77.{index}"),
        ipv6=IPv6Address(f"fd00:77::{index:x}"),
        ports=tuple(ports),
    )
    run("ip", "netns", "add", netns)
    guest = Guest(index=index, netns=netns, row=row)
    pod.guests.append(guest)
    names = ["name", tap, "index", str(row.ifindex), "type", "veth", "peer", "name", "eth0", "netns", netns]
    run("ip", "link", "add", *names, netns=pod.netns)
    pod.table.add_guest(pod.id, row)
    attach(pod.netns, tap, "ingress", pod.table.program_fd, pod.id)
    run("ip", "link", "set", tap, "master", "ukbr0", "up", netns=pod.netns)
    run("ip", "link", "set", "lo", "up", netns=netns)
    run("ip", "link", "set", "eth0", "address", row.mac.hex(":"), "up", netns=netns)
    run("ip", "addr", "add", f"{row.ipv4}/24", "dev", "eth0", netns=netns)
    if ipv6:
        run("ip", "addr", "add", f"{row.ipv6}/64", "dev", "eth0", "nodad", netns=netns)
    return guest


def announce(pod: Pod, guest: Guest, family: socket.AddressFamily, bridge: str) -> None:
    """Make the guest send something: until it has, the router takes it for one that still boots."""
    with pod.socket(guest, family, socket.SOCK_STREAM) as sock, contextlib.suppress(ConnectionRefusedError):
        sock.connect((bridge, 9))


@pytest.fixture
def make_pod(table: router.Router) -> Iterator[Callable[..., Pod]]:
    """make_pod(guests=2, ports={2: [("tcp", 80)]}, ipv6=True)"""
    pods: list[Pod] = []

    def make(guests: int = 1, ports: dict[int, list[tuple[str, int]]] | None = None, ipv6: bool = True) -> Pod:
        pod = Pod(table=table, id=next(POD_IDS), netns=f"ukr-{os.getpid()}-pod")
        run("ip", "netns", "add", pod.netns)
        pods.append(pod)
        run("sysctl", "-qw", "net.ipv4.conf.lo.route_localnet=1", "net.ipv4.conf.lo.accept_local=1", netns=pod.netns)
        run("ip", "link", "set", "lo", "up", netns=pod.netns)
        run(
            "ip",
            "link",
            "add",
            "ukbr0",
            "address",
            BRIDGE_MAC.hex(":"),
            "type",
            "bridge",
            "mcast_snooping",
            "0",
            netns=pod.netns,
        )
        run("ip", "addr", "add", f"{BRIDGE4}/24", "dev", "ukbr0", netns=pod.netns)
        run("ip", "addr", "add", f"{BRIDGE6}/64", "dev", "ukbr0", "nodad", netns=pod.netns)
        run("ip", "link", "set", "ukbr0", "up", netns=pod.netns)
        ifindex = in_netns(pod.netns, lambda: socket.if_nametoindex("ukbr0"))
        table.add_pod(pod.id, router.PodRow(ifindex=ifindex, mac=BRIDGE_MAC, ipv4=BRIDGE4, ipv6=BRIDGE6))
        attach(pod.netns, "lo", "egress", table.program_fd, pod.id)
        for index in range(2, 2 + guests):
            guest = _add_guest(pod, index, (ports or {}).get(index, []), ipv6)
            announce(pod, guest, socket.AF_INET, str(BRIDGE4))
            if ipv6:
                announce(pod, guest, socket.AF_INET6, str(BRIDGE6))
        return pod

    try:
        yield make
    finally:
        for pod in pods:
            for netns in (*(guest.netns for guest in pod.guests), pod.netns):
                run("ip", "netns", "del", netns)


# --- made-up packets: packets.py ---


@pytest.fixture(scope="package")
def variant(bpffs: Path) -> Iterator[tuple[router.Router, str]]:
    with packets.loaded_variant(bpffs) as found:
        yield found


@pytest.fixture(scope="package")
def thread(variant: tuple[router.Router, str]) -> Iterator[ThreadPoolExecutor]:
    with packets.thread_in(variant[1]) as pool:
        yield pool


@pytest.fixture
def hooks(variant: tuple[router.Router, str], thread: ThreadPoolExecutor) -> Iterator[packets.Hooks]:
    """A pod with guest 2, seen in both families; guest 3 joins where a test says so."""
    table, netns = variant
    table.add_pod(packets.POD, router.PodRow(ifindex=5, mac=BRIDGE_MAC, ipv4=BRIDGE4, ipv6=BRIDGE6))
    table.add_guest(packets.POD, packets.guest_row(2, seen_ipv4=True, seen_ipv6=True))
    yield packets.Hooks(table=table, netns=netns, thread=thread)
    table.remove_pod(packets.POD)


__all__ = ["Guest", "Pod", "attach", "in_netns", "program", "run"]
