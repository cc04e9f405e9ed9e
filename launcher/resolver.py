"""Whom a pod's guests ask for names: the nameservers of the pod's resolv.conf, as guests can reach them.

The file is /etc/netns/NAME/resolv.conf if the namespace has one (ip-netns(8)), else what CNI said, else the caller's
/etc/resolv.conf. A loopback address in it means a resolver in the pod, if one listens there, or one on the host, which
no pod can reach: then systemd-resolved's own list of upstream servers is taken.

    in the file                            what guests are told
    192.0.2.1, 2001:db8::1                 the same; they go out by the pod's uplink
    127.0.0.1, ::1 in the pod              the bridge's address: the router knows the way
    127.0.0.53, 127.0.0.11, ... in the pod firewall.RESOLVER, translated in the pod's namespace
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from . import net, state
from .firewall import DNS_PORT, HOST, RESOLVER
from .model import AddressPlan

RESOLV_CONF = Path("/etc/resolv.conf")
UPSTREAM = Path("/run/systemd/resolve/resolv.conf")
NETNS_ETC = Path("/etc/netns")
_TCP_LISTEN, _UDP_UNCONNECTED = 0x0A, 0x07  # include/net/tcp_states.h

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolver:
    """What guests' resolv.conf is to say. `behind`: where RESOLVER leads to, and its ports by protocol."""

    nameservers: tuple[Address, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    behind: IPv4Address | None = None
    ports: Mapping[str, int] = field(default_factory=dict)


def parse(text: str) -> Resolver:
    """A resolv.conf. What cannot be understood is passed over, as resolvers do (resolv.conf(5))."""
    nameservers: list[Address] = []
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    for line in text.splitlines():
        match line.split():
            case ["nameserver", address, *_]:
                with contextlib.suppress(ValueError):
                    nameservers.append(ip_address(address))
            case ["search" | "domain", *names]:
                search = tuple(names)
            case ["options", *words]:
                options += tuple(words)
    return Resolver(nameservers=tuple(nameservers), search=search, options=options)


def _read(path: Path) -> Resolver | None:
    try:
        return parse(path.read_text(errors="replace"))
    except OSError:
        return None


def find(record: state.PodRecord, plan: AddressPlan, cni: Resolver | None = None) -> Resolver:
    """What the pod's guests are to be told."""
    netns = Path(record.netns)
    own = _read(NETNS_ETC / netns.name / "resolv.conf") if netns.parent == state.NETNS_DIR else None
    given = own or cni or _read(RESOLV_CONF) or Resolver()
    inside = own is not None or (record.adopted and netns.exists() and netns.samefile(HOST))
    told: dict[Address, None] = {}
    behind, ports = None, {}
    for address in given.nameservers:
        if not address.is_loopback:
            if record.uplink != "none" and not getattr(address, "scope_id", None):
                told[address] = None
            continue
        found = listening(netns, address)
        if not found and not inside:
            continue
        if address in (IPv4Address("127.0.0.1"), IPv6Address("::1")):
            told[plan.ipv4.ip if address.version == 4 else plan.ipv6.ip] = None
        elif isinstance(address, IPv4Address) and behind is None:
            told[RESOLVER] = None
            behind, ports = address, found or {"udp": DNS_PORT, "tcp": DNS_PORT}
    if not told and record.uplink != "none" and (upstream := _read(UPSTREAM)) is not None:
        told = dict.fromkeys(address for address in upstream.nameservers if not address.is_loopback)
    return Resolver(nameservers=tuple(told), search=given.search, options=given.options, behind=behind, ports=ports)


def listening(netns: Path, address: Address) -> dict[str, int]:
    """The ports of the sockets that are bound to this very address, or to any, and could be a resolver's.

    53 if there is such a socket. Else the only one there is: Docker's resolver on 127.0.0.11 has ports that it was
    given by chance, and translates 53 for those alone who ask from inside the namespace.
    """
    wanted = _proc_form(address)
    anyone = "0" * len(wanted)
    suffix = "6" if address.version == 6 else ""

    def body() -> dict[str, list[tuple[str, int]]]:
        return {
            "udp": _sockets(Path(f"/proc/thread-self/net/udp{suffix}"), _UDP_UNCONNECTED),
            "tcp": _sockets(Path(f"/proc/thread-self/net/tcp{suffix}"), _TCP_LISTEN),
        }

    ports = {}
    for protocol, sockets in net.in_netns(netns, body).items():
        if any(bound in (wanted, anyone) and port == DNS_PORT for bound, port in sockets):
            ports[protocol] = DNS_PORT
        elif len(own := [port for bound, port in sockets if bound == wanted]) == 1 and address != ip_address(
            "127.0.0.1"
        ):
            ports[protocol] = own[0]
    return ports


def _sockets(table: Path, state_wanted: int) -> list[tuple[str, int]]:
    """(address as /proc writes it, port) of the sockets in that state: Documentation/networking/proc_net_tcp.rst."""
    try:
        lines = table.read_text().splitlines()[1:]
    except FileNotFoundError:  # no IPv6
        return []
    rows = [line.split() for line in lines]
    return [
        (address, int(port, 16))
        for _, local, _, status, *_ in rows
        if int(status, 16) == state_wanted
        for address, port in (local.split(":"),)
    ]


def _proc_form(address: Address) -> str:
    """Words of 32 bits in the machine's own order."""
    words = [address.packed[at : at + 4] for at in range(0, len(address.packed), 4)]
    return "".join(f"{int.from_bytes(word, 'little'):08X}" for word in words)
