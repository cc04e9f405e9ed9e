"""Namespaces for the baselines: a pod's parts without its router. Made of what a pod is made of, so that the router
is all that differs.

    ukb-PID-NAME-pod                    ukb-PID-NAME-N
    lo   ukbr0 ── uktapN ═══ veth ═══ eth0   169.254.77.N  fd00:77::N
         169.254.77.1  fd00:77::1
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher import net, state
from launcher.model import AddressPlan, format_mac

PLAN = AddressPlan()
FIRST_GUEST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A namespace with a bridge, and guests played by namespaces."""

    netns: Path
    guests: tuple[Path, ...]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def namespace(name: str) -> Iterator[Path]:
    path = state.NETNS_DIR / f"ukb-{os.getpid()}-{name}"
    try:
        net.create_netns(path)
        yield path
    finally:
        net.delete_netns(path)


@contextlib.contextmanager
def lab(name: str, guests: int) -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        pod = stack.enter_context(namespace(f"{name}-pod"))
        net.make_bridge(pod, PLAN, name)
        net.write_sysctls(pod, net.LOOPBACK_SYSCTLS)
        played = []
        for index in range(FIRST_GUEST, FIRST_GUEST + guests):
            guest = stack.enter_context(namespace(f"{name}-{index}"))
            tap = f"uktap{index}"
            ip("link", "add", tap, "netns", pod.name, "type", "veth", "peer", "name", "eth0", "netns", guest.name)
            ip("-n", pod.name, "link", "set", tap, "master", net.BRIDGE, "up")
            ip("-n", guest.name, "link", "set", "lo", "up")
            ip("-n", guest.name, "link", "set", "eth0", "address", format_mac(PLAN.guest_mac(index)), "up")
            ip("-n", guest.name, "addr", "add", str(PLAN.guest_ipv4(index)), "dev", "eth0")
            ip("-n", guest.name, "addr", "add", str(PLAN.guest_ipv6(index)), "dev", "eth0", "nodad")
            played.append(guest)
        yield Lab(netns=pod, guests=tuple(played))
