"""Pods whose guests are played by namespaces: real kernel stacks at both ends, the router between them.

    pod's namespace                      guest's namespace
    lo ─ router ─ uktapN ═══ veth ═══ eth0  169.254.77.N  fd00:77::N

A veth stands in for the TAP: the router and the bridge cannot tell them apart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import router
from launcher import net, pod, state
from launcher.limits import UNLIMITED, Limits
from launcher.model import AddressPlan, Nic, Port, format_mac

from .outside import ip, played_outside

PLAN = AddressPlan()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedGuest:
    """A guest played by a namespace."""

    index: int
    netns: Path
    nic: Nic


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedPod:
    record: state.PodRecord
    table: router.Router
    guests: tuple[PlayedGuest, ...]

    @property
    def netns(self) -> Path:
        return Path(self.record.netns)

    @property
    def nat(self) -> Path:
        """Where its packets are translated, if its uplink is nat."""
        return Path(f"{self.record.netns}.nat")


@contextlib.contextmanager
def played_guest(
    record: state.PodRecord,
    table: router.Router,
    index: int,
    ports: tuple[Port, ...] = (),
    *,
    ipv6: bool = True,
    limits: Limits = UNLIMITED,
) -> Iterator[PlayedGuest]:
    """One guest in the pod; `ipv6` False: one like OSv, which has none."""
    netns = state.NETNS_DIR / f"ukt-{os.getpid()}-{record.id}-{index}"
    nic = Nic(
        mac=PLAN.guest_mac(index),
        ipv4=PLAN.guest_ipv4(index),
        ipv6=PLAN.guest_ipv6(index),
        gateway_ipv4=PLAN.ipv4.ip,
        gateway_ipv6=PLAN.ipv6.ip,
    )
    tap = f"uktap{index}"
    ip("netns", "add", netns.name)
    try:
        net.write_sysctls(
            netns,
            {
                "net/ipv4/icmp_ratelimit": "0",  # as in guest-config/linux/init
                "net/ipv6/icmp/ratelimit": "0",
                "net/ipv4/conf/default/arp_notify": "1",
                "net/ipv6/conf/default/ndisc_notify": "1",
                "net/ipv6/conf/all/disable_ipv6": "0" if ipv6 else "1",
            },
        )
        pod_name = Path(record.netns).name
        ip("link", "add", tap, "netns", pod_name, "type", "veth", "peer", "name", "eth0", "netns", netns.name)
        ifindex = net.link_indexes(Path(record.netns))[tap]
        rate_link = 0
        if limits.net_out_bits is not None:
            rate_link, _ = net.make_rate_link(
                Path(record.netns),
                name=f"{net.RATE_LINK}{index}",
                alias="test",
                mtu=nic.mtu,
                rate_bits=limits.net_out_bits,
                program_fd=table.shaped_fd,
                pod_id=record.id,
            )
        table.add_guest(
            record.id,
            router.GuestRow(
                index=index,
                ifindex=ifindex,
                mac=nic.mac,
                ipv4=nic.ipv4.ip,
                ipv6=nic.ipv6.ip,
                ports=tuple((port.protocol.value, port.number) for port in ports),
                rate_link=rate_link,
            ),
        )
        net.attach_guest(
            Path(record.netns),
            bridge=record.bridge,
            tap=tap,
            alias="test",
            addresses=(nic.ipv4.ip, nic.ipv6.ip),
            mtu=nic.mtu,
            program_fd=table.program_fd if limits.net_out_bits is None else table.shaped_fd,
            pod_id=record.id,
            rate_bits=limits.net_in_bits,
        )
        guest = ["-n", netns.name]
        ip(*guest, "link", "set", "lo", "up")
        ip(*guest, "link", "set", "eth0", "address", format_mac(nic.mac), "mtu", str(nic.mtu))
        ip(*guest, "addr", "add", str(nic.ipv4), "dev", "eth0")
        if ipv6:
            ip(*guest, "addr", "add", str(nic.ipv6), "dev", "eth0", "nodad")
        ip(*guest, "link", "set", "eth0", "up")
        ip(*guest, "route", "add", "default", "via", str(nic.gateway_ipv4))
        if ipv6:
            ip(*guest, "-6", "route", "add", "default", "via", str(nic.gateway_ipv6))
        announce(netns, nic, ipv6=ipv6)
        yield PlayedGuest(index=index, netns=netns, nic=nic)
    finally:
        with contextlib.suppress(KeyError):
            table.remove_guest(record.id, net.link_indexes(Path(record.netns))[tap])
        ip("netns", "del", netns.name)


def announce(netns: Path, nic: Nic, *, ipv6: bool = True) -> None:
    """Make the guest say something from each of its addresses, and wait for the answer: the router has seen it then."""
    targets = [(socket.AF_INET, nic.gateway_ipv4), *([(socket.AF_INET6, nic.gateway_ipv6)] if ipv6 else [])]
    for family, target in targets:
        with net.in_netns(netns, partial(socket.socket, family, socket.SOCK_STREAM)) as sock:
            sock.settimeout(5)
            assert sock.connect_ex((str(target), 1)) == errno.ECONNREFUSED  # nobody is there, but who asked is known


@contextlib.contextmanager
def played_pod(
    guests: int = 1,
    *,
    ports: dict[int, tuple[Port, ...]] | None = None,
    ipv6: bool = True,
    name: str = "nettest",
    limits: Limits = UNLIMITED,
    **options: Any,
) -> Iterator[PlayedPod]:
    """A pod with that many guests, at 2, 3, ...; `ports`: what each declares; `limits`: of the first; `options`: of
    `pod.create`."""
    with contextlib.ExitStack() as stack:
        record = pod.create(name, **options)
        stack.callback(pod.delete, name)
        table = stack.enter_context(pod.open_router())
        played = tuple(
            stack.enter_context(
                played_guest(
                    record,
                    table,
                    index,
                    (ports or {}).get(index, ()),
                    ipv6=ipv6,
                    limits=limits if index == 2 else UNLIMITED,
                )
            )
            for index in range(2, 2 + guests)
        )
        yield PlayedPod(record=record, table=table, guests=played)


@pytest.fixture(scope="module")
def outside() -> Iterator[Path]:
    """The namespace that plays the outside world."""
    with played_outside() as netns:
        yield netns


@pytest.fixture(scope="module")
def make_pod() -> Iterator[Callable[[int], PlayedPod]]:
    """Pods by their number of guests, kept for the module."""
    with contextlib.ExitStack() as stack:
        made: dict[int, PlayedPod] = {}

        def make(guests: int) -> PlayedPod:
            if guests not in made:
                made[guests] = stack.enter_context(played_pod(guests, name=f"nettest-{guests}"))
            return made[guests]

        yield make
