"""Who serves what in a pod, how that is known, and who is in whose way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_interface

from router.model import PortRow

from .. import pod, state
from .sockets import Socket, read_sockets


class Known(StrEnum):
    DECLARED = "declared"  # by a guest's user
    LEARNED = "learned"  # a guest was the first to answer for it
    LISTENING = "listening"  # a container's socket
    ONLY = "only guest"  # it gets whatever no socket takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A port of the pod's localhost. `number` 0: all others. `conflict`: who is in the way, or ''."""

    number: int
    protocol: str
    family: int  # 4 or 6; 0: both
    owner: str
    guest: int | None  # its index
    pid: int | None
    address: IPv4Address | IPv6Address | None  # a socket bound to any address has none
    known: Known
    conflict: str = ""


def look(record: state.PodRecord) -> list[Served]:
    """Raises UklaunchError if ss is missing or the pod's namespace is gone."""
    with pod.open_router() as table:
        rows, guests = table.ports(record.id), table.guests(record.id)
    running = {guest.index: guest.name for guest in pod.running_guests(record.name)}
    names = {guest.index: running.get(guest.index, f"guest {guest.index}") for guest in guests}
    return served_ports(record, rows, names, read_sockets(record))


def served_ports(
    record: state.PodRecord, rows: Sequence[PortRow], names: dict[int, str], sockets: Sequence[Socket]
) -> list[Served]:
    """Sorted by port. `rows` and `names` (by index) are the router's; a container's socket wins over either."""
    guests = [
        Served(
            number=row.number,
            protocol=row.protocol,
            family=row.family,
            owner=names.get(row.guest, f"guest {row.guest}"),
            guest=row.guest,
            pid=None,
            address=None,
            known=Known.DECLARED if row.declared else Known.LEARNED,
        )
        for row in rows
        if row.guest is not None
    ]
    containers = [
        Served(
            number=sock.port,
            protocol=sock.protocol,
            family=family,
            owner=sock.owner.name,
            guest=None,
            pid=sock.owner.pid or None,
            address=sock.address,
            known=Known.LISTENING,
        )
        for sock in sockets
        for family in sock.families
        if sock.listening and sock.device in (None, "lo")
    ]
    containers = list(dict.fromkeys(containers))  # SO_REUSEPORT
    served = [_with_conflict(one, guests, containers, record) for one in (*guests, *containers)]
    served.sort(key=lambda one: (one.number, one.protocol, one.family, one.known == Known.LISTENING, one.owner))
    if len(names) == 1:
        index, name = next(iter(names.items()))
        only = Served(
            number=0, protocol="any", family=0, owner=name, guest=index, pid=None, address=None, known=Known.ONLY
        )
        served.append(only)
    return served


def _with_conflict(
    one: Served, guests: Sequence[Served], containers: Sequence[Served], record: state.PodRecord
) -> Served:
    def same(other: Served) -> bool:
        return (one.number, one.protocol, one.family) == (other.number, other.protocol, other.family)

    if one.guest is None:
        callers = _callers(one, record)
        others = [guest.owner for guest in guests if same(guest)] if callers is not None else []
        return replace(one, conflict=f"shadows guest {', '.join(others)}{callers}" if others else "")
    for other in containers:
        if same(other) and (callers := _callers(other, record)) is not None:
            return replace(one, conflict=f"shadowed by {other.owner}{callers}")
    return one


def _callers(listener: Served, record: state.PodRecord) -> str | None:
    """Whose `localhost` the socket takes, as words for after its name; None: nobody's. bpf/localhost.c, decide()."""
    bridge = ip_interface(record.ipv4 if listener.family == 4 else record.ipv6).ip
    if listener.address is None or str(listener.address) in ("127.0.0.1", "::1"):
        return ""
    return " for guests" if listener.address == bridge else None


def format_address(served: Served) -> str:
    return "-" if served.guest is not None else str(served.address or "*")


def port_rows(served: Sequence[Served]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows for a person; a port that is the same over IPv4 and IPv6 is one row."""
    families: dict[Served, list[int]] = {}
    for one in served:
        families.setdefault(replace(one, family=0), []).append(one.family)
    return (
        ("PORT", "PROTO", "IP", "SERVED BY", "PID", "BOUND TO", "KNOWN", "CONFLICT"),
        [
            (
                str(one.number or "other"),
                one.protocol,
                "any" if versions == [0] else ",".join(f"v{version}" for version in versions),
                one.owner,
                str(one.pid or "-"),
                format_address(one),
                str(one.known),
                one.conflict or "-",
            )
            for one, versions in families.items()
        ],
    )
