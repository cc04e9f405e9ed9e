"""The sockets of a pod's containers, that is, of any process in its namespace.

ss(8) asks the kernel by sock_diag(7) and finds each socket's processes: 25 ms, where pyroute2's import alone is 250.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from .. import state
from ..errors import UklaunchError
from .sample import in_pod

_PROCESS = re.compile(r'\("(.*?)",pid=(\d+),fd=\d+\)')
_LISTENING = {"LISTEN", "UNCONN"}


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """A process, by what /proc/PID/comm says. `pid` 0: no process holds the socket any more."""

    name: str
    pid: int

    def __str__(self) -> str:
        return f"{self.name} ({self.pid})" if self.pid else self.name


NOBODY = Owner("container", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket:
    """`families`: those in which it is reached; a socket on `::` may serve both. `address` None: any of them."""

    protocol: str
    families: tuple[int, ...]
    address: IPv4Address | IPv6Address | None
    port: int
    listening: bool  # for UDP: takes datagrams from anybody
    device: str | None  # bound to it
    owner: Owner


def read_sockets(record: state.PodRecord) -> list[Socket]:
    """TCP and UDP, listening or not. Raises UklaunchError if ss is missing or the namespace is gone."""

    def body() -> str:
        # A child is in the namespace of the thread that made it.
        return subprocess.run(["ss", "-HOtunap"], capture_output=True, text=True, check=True).stdout

    try:
        said = in_pod(record, body)
    except subprocess.CalledProcessError as exc:
        raise UklaunchError("ss cannot list the pod's sockets", "run uklaunch as root", exc.stderr) from exc
    return list(parse_ss(said))


def parse_ss(said: str) -> Iterator[Socket]:
    """Of `ss -HOtunap`: protocol, state, two queues, local and peer address, processes."""
    for line in said.splitlines():
        words = line.split(maxsplit=6)
        host, _, port = words[4].rpartition(":")
        host, _, device = host.partition("%")
        bare = host.strip("[]")
        address: IPv4Address | IPv6Address | None
        families: tuple[int, ...]
        if bare == "*":  # `::` with IPV6_V6ONLY off
            address, families = None, (4, 6)
        else:
            address = ip_address(bare)
            if isinstance(address, IPv6Address) and address.ipv4_mapped:
                address = address.ipv4_mapped
            families = (address.version,)
        processes = sorted(Owner(name, int(pid)) for name, pid in _PROCESS.findall(words[6] if words[6:] else ""))
        yield Socket(
            protocol=words[0],
            families=families,
            address=None if address is None or address.is_unspecified else address,
            port=int(port),
            listening=words[1] in _LISTENING,
            device=device.rstrip("]") or None,
            owner=min(processes, key=lambda owner: owner.pid, default=NOBODY),
        )
