"""Rows of the router's maps: the only place that knows their bytes. Mirrors bpf/maps.h, which describes them;
tests/bpf/test_layout.py holds the two together.

Who writes: `add_*` and `remove_*` here; the program writes flows, learned ports, counters and a guest's `seen_*`.
Changes to one pod are the caller's to serialise (the launcher holds the pod's lock).
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from . import program, syscall
from .errors import RouterError
from .model import (
    PASSED,
    REDIRECTED,
    Address,
    Drop,
    Endpoint,
    Flow,
    FlowState,
    GuestRow,
    Loaded,
    PodRow,
    PortRow,
    Reason,
    Severed,
    UplinkRow,
)
from .ring import Ring

LO_IFINDEX = 1
GUESTS_PER_POD = 64
FLOWS_PER_POD = 32768
DROP_SLOTS = 32

_PROTOCOLS = {"tcp": 6, "udp": 17}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOLS.items()}

_u8, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint32, ctypes.c_uint64
_u16 = ctypes.c_uint16
_port = ctypes.c_uint16.__ctype_be__
_Address, _Mac = _u8 * 16, _u8 * 6


class Pod(ctypes.Structure):
    _fields_ = (
        ("ipv4", _Address),
        ("ipv6", _Address),
        ("ifindex", _u32),
        ("mac", _Mac),
        ("guest_count", _u16),
        ("uplink_ipv4", _Address),
        ("uplink_ipv6", _Address),
        ("uplink", _u32),
        ("uplink_translates", _u32),
        ("udp_idle_s", _u32),
        ("tcp_idle_s", _u32),
        ("tcp_closed_s", _u32),
        ("owner", _u32),
        ("taps", _u32 * GUESTS_PER_POD),
    )


class GuestKey(ctypes.Structure):
    _fields_ = (("pod", _u32), ("ifindex", _u32))


class Guest(ctypes.Structure):
    _fields_ = (
        ("ipv4", _Address),
        ("ipv6", _Address),
        ("mtu", _u32),
        ("index", _u16),
        ("mac", _Mac),
        ("seen_ipv4", _u8),
        ("seen_ipv6", _u8),
        ("pad", _u8 * 2),
        ("rate_link", _u32),
    )


class PortKey(ctypes.Structure):
    _fields_ = (("pod", _u32), ("port", _port), ("family", _u8), ("proto", _u8))


class PortOwner(ctypes.Structure):
    _fields_ = (("ifindex", _u32), ("declared", _u32))


class FlowKey(ctypes.Structure):
    _fields_ = (
        ("ifindex", _u32),
        ("family", _u8),
        ("proto", _u8),
        ("row", _u16),
        ("saddr", _Address),
        ("daddr", _Address),
        ("sport", _port),
        ("dport", _port),
    )


class FlowRow(ctypes.Structure):
    _fields_ = (
        ("saddr", _Address),
        ("daddr", _Address),
        ("sport", _port),
        ("dport", _port),
        ("dmac", _Mac),
        ("smac", _Mac),
        ("ifindex", _u32),
        ("csum_diff", _u32),
        ("mtu", _u32),
        ("role", _u8),
        ("seen", _u8),
        ("family", _u8),
        ("pad", _u8),
        ("asked", _u32),
        ("refused", _u32),
        ("idle_s", _u32),
        ("pad2", _u32),
        ("created_ns", _u64),
        ("last_ns", _u64),
        ("packets", _u64),
        ("bytes", _u64),
    )


class Packet(ctypes.Structure):
    _fields_ = (
        ("key", FlowKey),
        ("pod_id", _u32),
        ("l4", _u32),
        ("csum", _u32),
        ("ip_id", _u32),
        ("ethertype", _port),
        ("ip_csum", _u16),
        ("kind", _u8),
        ("fragment", _u8),
        ("tcp_flags", _u8),
        ("reason", _u8),
    )


class Counters(ctypes.Structure):
    _fields_ = (("dropped", _u64 * DROP_SLOTS), ("redirected", _u64), ("passed", _u64))


ROW_PACKETS = 0
ASIDE_S = (
    60  # how long a question to several guests, or where a datagram's fragments go, is of use: RFC 791's 15 s, and more
)
FORWARD, REVERSE, CANDIDATE = 1, 2, 3
SEEN_ANSWER, SEEN_FIN, SEEN_RST, SEEN_REFUSAL = 1, 2, 4, 8

_POD_KEY = 4
_S = TypeVar("_S", bound=ctypes.Structure)


def _mapped(address: Address) -> ctypes.Array[ctypes.c_uint8]:
    if address.version == 4:
        return _Address(*b"\0" * 10, 0xFF, 0xFF, *address.packed)
    return _Address(*address.packed)


def _address(family: int, packed: ctypes.Array[ctypes.c_uint8]) -> Address:
    raw = bytes(packed)
    return IPv4Address(raw[12:]) if family == 4 else IPv6Address(raw)


def _pod_key(pod_id: int) -> bytes:
    return bytes(_u32(pod_id))


def drop_reasons() -> tuple[Reason, ...]:
    """The program's list, in the order of its counters."""
    text = (program.source_directory() / "reasons.h").read_text()
    return tuple(Reason(*found) for found in re.findall(r'X\((\w+), "([^"]+)"\)', text))


class Router:
    """The host's router. A context manager: it holds descriptors. Errors: RouterError, or an OSError of bpf(2)."""

    def __init__(self, pins: program.Pins) -> None:
        self._pins = pins
        self.program_fd = pins.program
        self.shaped_fd = pins.shaped  # in its place on the TAP of a guest that has a rate

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for fd in (self._pins.program, self._pins.shaped, *self._pins.maps.values(), self._pins.lock):
            os.close(fd)

    # --- bytes ---

    def _get(self, name: str, key: bytes, kind: type[_S]) -> _S | None:
        value = syscall.lookup(self._pins.maps[name], key, ctypes.sizeof(kind))
        return None if value is None else kind.from_buffer_copy(value)

    def _put(self, name: str, key: bytes, value: bytes, flags: int = syscall.ANY) -> bool:
        try:
            return syscall.update(self._pins.maps[name], key, value, flags)
        except OSError as exc:
            raise RouterError(
                f"the router's table of {name.replace('_', ' ')} takes no more: {exc.strerror}",
                "see what is left behind: uklaunch gc",
            ) from exc

    def _delete(self, name: str, key: bytes) -> None:
        syscall.delete(self._pins.maps[name], key)

    def _flow_map(self, pod_id: int) -> int | None:
        """A descriptor of the pod's own flow table; the caller closes it."""
        value = syscall.lookup(self._pins.maps["flows"], _pod_key(pod_id), 4)
        if value is None:
            return None
        if (made_before := self._made_flow_map(pod_id)) is not None:
            return made_before
        try:
            return syscall.map_fd_by_id(int.from_bytes(value, "little"))
        except FileNotFoundError:
            return None

    def _made_flow_map(self, pod_id: int) -> int | None:
        """Of a user's own router: the table that root has made for this pod id."""
        try:
            return syscall.open_pin(f"{self._pins.directory}/{program.FLOW_TABLE.format(pod_id)}")
        except FileNotFoundError:
            return None

    def _flow_rows(self, pod_id: int) -> Iterator[tuple[FlowKey, FlowRow]]:
        fd = self._flow_map(pod_id)
        if fd is None:
            return
        try:
            sizes = ctypes.sizeof(FlowKey), ctypes.sizeof(FlowRow)
            for key, row in syscall.items(fd, *sizes):
                yield FlowKey.from_buffer_copy(key), FlowRow.from_buffer_copy(row)
        finally:
            os.close(fd)

    def _guest_rows(self, pod_id: int) -> Iterator[tuple[int, Guest]]:
        for raw in set(syscall.keys(self._pins.maps["guests"], ctypes.sizeof(GuestKey))):
            key = GuestKey.from_buffer_copy(raw)
            if key.pod == pod_id and (row := self._get("guests", raw, Guest)) is not None:
                yield key.ifindex, row

    def _port_rows(self, pod_id: int) -> Iterator[tuple[PortKey, PortOwner]]:
        for raw in set(syscall.keys(self._pins.maps["ports"], ctypes.sizeof(PortKey))):
            key = PortKey.from_buffer_copy(raw)
            if key.pod == pod_id and (row := self._get("ports", raw, PortOwner)) is not None:
                yield key, row

    def _indexes(self, pod_id: int) -> dict[int, int]:
        """TAP's ifindex -> guest's index."""
        return {ifindex: row.index for ifindex, row in self._guest_rows(pod_id)}

    # --- pods ---

    @property
    def pod_id_max(self) -> int:
        """Ids are 1 to this. As many pods as root has made flow tables for, if this is a user's own router."""
        return sum(1 for _ in self._pins.directory.glob(program.FLOW_TABLE.format("*"))) or 0xFFFF

    def pod_ids(self) -> list[int]:
        pods = self._pins.maps["pods"]
        return sorted({int.from_bytes(key, "little") for key in syscall.keys(pods, _POD_KEY)})

    def pod_ids_of(self, owner: int) -> list[int]:
        """Those that were added with this `owner`."""
        rows = ((pod_id, self._get("pods", _pod_key(pod_id), Pod)) for pod_id in self.pod_ids())
        return [pod_id for pod_id, row in rows if row is not None and row.owner == owner]

    def add_pod(self, pod_id: int, row: PodRow) -> None:
        """Replaces whatever was there under this id."""
        if not 1 <= pod_id <= 0xFFFF:
            raise RouterError(f"pod id {pod_id} is not between 1 and 65535")
        self.remove_pod(pod_id)
        key = _pod_key(pod_id)
        pod = Pod(
            ipv4=_mapped(row.ipv4),
            ipv6=_mapped(row.ipv6),
            ifindex=row.ifindex,
            mac=_Mac(*row.mac),
            udp_idle_s=row.timeouts.udp_s,
            tcp_idle_s=row.timeouts.tcp_s,
            tcp_closed_s=row.timeouts.tcp_closed_s,
            owner=row.owner,
        )
        self._put("pods", key, bytes(pod))
        size = ctypes.sizeof(Counters) * _possible_cpus()
        self._put("pod_counters", key, bytes(size))
        flows = self._made_flow_map(pod_id)
        if flows is None:
            flows = syscall.create_map(
                syscall.MAP_TYPE_LRU_HASH,
                ctypes.sizeof(FlowKey),
                ctypes.sizeof(FlowRow),
                FLOWS_PER_POD,
                f"uk_flows_{pod_id}",
            )
        try:
            for flow, _ in list(syscall.items(flows, ctypes.sizeof(FlowKey), ctypes.sizeof(FlowRow))):
                syscall.delete(flows, flow)  # of the pod that had this id, and the table, before
            self._put("flows", key, bytes(_u32(flows)))  # last: from here on the program acts
        finally:
            os.close(flows)

    def remove_pod(self, pod_id: int) -> None:
        """Every row of the pod's. Idempotent."""
        for name in _POD_MAPS:
            _remove_rows(self._pins.maps[name], pod_id)

    def set_uplink(self, pod_id: int, row: UplinkRow) -> None:
        """`program_fd` is to be attached at the uplink's ingress. Raises RouterError if the pod is unknown."""
        key = _pod_key(pod_id)
        pod = self._get("pods", key, Pod)
        if pod is None:
            raise RouterError(f"the router knows no pod {pod_id}")
        pod.uplink = row.ifindex
        pod.uplink_ipv4 = _mapped(row.ipv4) if row.ipv4 else _Address()
        pod.uplink_ipv6 = _mapped(row.ipv6) if row.ipv6 else _Address()
        pod.uplink_translates = row.translates
        self._put("pods", key, bytes(pod))

    # --- guests ---

    def guests(self, pod_id: int) -> list[GuestRow]:
        ports = dict[int, set[tuple[str, int]]]()
        for key, owner in self._port_rows(pod_id):
            if owner.declared:
                ports.setdefault(owner.ifindex, set()).add((_PROTOCOL_NAMES[key.proto], key.port))
        rows = [
            GuestRow(
                index=row.index,
                ifindex=ifindex,
                mac=bytes(row.mac),
                ipv4=IPv4Address(bytes(row.ipv4)[12:]),
                ipv6=IPv6Address(bytes(row.ipv6)),
                ports=tuple(sorted(ports.get(ifindex, ()))),
                mtu=row.mtu,
                seen_ipv4=bool(row.seen_ipv4),
                seen_ipv6=bool(row.seen_ipv6),
                rate_link=row.rate_link,
            )
            for ifindex, row in self._guest_rows(pod_id)
        ]
        return sorted(rows, key=lambda row: row.index)

    def add_guest(self, pod_id: int, row: GuestRow) -> None:
        """Raises RouterError if the pod is unknown or full, or another guest has declared one of the ports."""
        pod = self._get("pods", _pod_key(pod_id), Pod)
        if pod is None:
            raise RouterError(f"the router knows no pod {pod_id}")
        self.remove_guest(pod_id, row.ifindex)
        pod = self._get("pods", _pod_key(pod_id), Pod)
        assert pod is not None
        if pod.guest_count == GUESTS_PER_POD:
            raise RouterError(f"the pod has {GUESTS_PER_POD} guests already, which is the most")
        self._declare(pod_id, row)
        guest = Guest(
            ipv4=_mapped(row.ipv4),
            ipv6=_mapped(row.ipv6),
            mtu=row.mtu,
            index=row.index,
            mac=_Mac(*row.mac),
            seen_ipv4=row.seen_ipv4,
            seen_ipv6=row.seen_ipv6,
            rate_link=row.rate_link,
        )
        self._put("guests", bytes(GuestKey(pod=pod_id, ifindex=row.ifindex)), bytes(guest))
        pod.taps[pod.guest_count] = row.ifindex
        pod.guest_count += 1
        self._put("pods", _pod_key(pod_id), bytes(pod))

    def _declare(self, pod_id: int, row: GuestRow) -> None:
        owner = PortOwner(ifindex=row.ifindex, declared=1)
        keys = [
            PortKey(pod=pod_id, port=number, family=family, proto=_PROTOCOLS[protocol])
            for protocol, number in row.ports
            for family in (4, 6)
        ]
        for key in keys:
            old = self._get("ports", bytes(key), PortOwner)
            if old is not None and old.declared:
                guest = self._indexes(pod_id).get(old.ifindex)
                raise RouterError(
                    f"port {key.port}/{_PROTOCOL_NAMES[key.proto]} is declared by guest {guest} of this pod",
                    "declare it for one guest, or for none: then who answers first serves it",
                )
        for key in keys:
            self._put("ports", bytes(key), bytes(owner))

    def remove_guest(self, pod_id: int, ifindex: int) -> list[Severed]:
        """Idempotent. Its ports and its flows go too, in both directions. Returns the open TCP connections that others
        had with it: they believe in them until somebody tells them."""
        pod = self._get("pods", _pod_key(pod_id), Pod)
        if pod is not None:
            taps = [tap for tap in pod.taps[: pod.guest_count] if tap != ifindex]
            if len(taps) != pod.guest_count:
                pod.guest_count = len(taps)
                pod.taps = (_u32 * GUESTS_PER_POD)(*taps)
                self._put("pods", _pod_key(pod_id), bytes(pod))
        self._delete("guests", bytes(GuestKey(pod=pod_id, ifindex=ifindex)))
        for key, owner in list(self._port_rows(pod_id)):
            if owner.ifindex == ifindex:
                self._delete("ports", bytes(key))
        severed = []
        for flow, row in self._forget_flows(pod_id, lambda key, row: ifindex in (key.ifindex, row.ifindex)):
            is_open = flow.row == ROW_PACKETS and row.role != CANDIDATE and not row.seen & SEEN_RST
            if is_open and flow.proto == _PROTOCOLS["tcp"] and flow.ifindex != ifindex:
                severed.append(
                    Severed(
                        address=_address(flow.family, flow.saddr),
                        port=flow.sport,
                        peer_address=_address(flow.family, flow.daddr),
                        peer_port=flow.dport,
                    )
                )
        return severed

    def _forget_flows(
        self, pod_id: int, condition: Callable[[FlowKey, FlowRow], bool]
    ) -> list[tuple[FlowKey, FlowRow]]:
        """Delete the entries for which this holds; returns them."""
        fd = self._flow_map(pod_id)
        if fd is None:
            return []
        try:
            rows = [(key, row) for key, row in self._flow_rows(pod_id) if condition(key, row)]
            for key, _ in rows:
                syscall.delete(fd, bytes(key))
        finally:
            os.close(fd)
        return rows

    # --- what is going on ---

    @contextmanager
    def watch_drops(self, pod_id: int) -> Iterator[DropWatch]:
        """See this pod's drops while the block lasts. One watches a pod at a time: the latest takes over."""
        if pod_id not in self.pod_ids():
            raise RouterError(f"the router knows no pod {pod_id}")
        try:
            ring = Ring()
        except PermissionError as exc:
            raise RouterError(
                "the kernel lets only root make the ring in which drops are seen one by one",
                "to see them counted: uklaunch drops POD",
            ) from exc
        key, identifier = _pod_key(pod_id), bytes(_u32(syscall.map_id(ring.fd)))
        try:
            self._put("drops", key, bytes(_u32(ring.fd)))
            yield DropWatch(self, pod_id, ring, identifier)
        finally:
            if self._drop_ring_id(pod_id) == identifier:
                self._delete("drops", key)
            ring.close()

    def _drop_ring_id(self, pod_id: int) -> bytes | None:
        return syscall.lookup(self._pins.maps["drops"], _pod_key(pod_id), 4)

    def ports(self, pod_id: int) -> list[PortRow]:
        """Who serves what, declared or learned, sorted."""
        indexes = self._indexes(pod_id)
        rows = [
            PortRow(
                protocol=_PROTOCOL_NAMES[key.proto],
                family=key.family,
                number=key.port,
                guest=indexes.get(owner.ifindex),
                declared=bool(owner.declared),
            )
            for key, owner in self._port_rows(pod_id)
        ]
        return sorted(rows, key=lambda row: (row.number, row.protocol, row.family))

    def counters(self, pod_id: int) -> dict[Reason, int]:
        """Every drop reason that has occurred, and the totals REDIRECTED and PASSED, since the pod was made."""
        cpus, size = _possible_cpus(), ctypes.sizeof(Counters)
        raw = syscall.lookup(self._pins.maps["pod_counters"], _pod_key(pod_id), size * cpus)
        per_cpu = [] if raw is None else [Counters.from_buffer_copy(raw, i * size) for i in range(cpus)]
        totals = {
            REDIRECTED: sum(row.redirected for row in per_cpu),
            PASSED: sum(row.passed for row in per_cpu),
        }
        for slot, reason in enumerate(drop_reasons()):
            if count := sum(row.dropped[slot] for row in per_cpu):
                totals[reason] = count
        return totals

    def expire_flows(self, pod_id: int) -> None:
        """Forget what is older than the pod's timeouts. Nobody has to: a full table evicts what is oldest."""
        pod = self._get("pods", _pod_key(pod_id), Pod)
        if pod is None:
            return
        now = time.monotonic_ns()
        rows = {bytes(key): row for key, row in self._flow_rows(pod_id)}

        def is_over(key: FlowKey, row: FlowRow) -> bool:
            twin = rows.get(bytes(_turned(key, row)), row)
            idle_s = (now - max(row.last_ns, twin.last_ns)) / 1e9
            return bool(idle_s > _timeout_s(pod, key, row, twin))

        self._forget_flows(pod_id, is_over)

    def flows(self, pod_id: int) -> list[Flow]:
        """One for each conversation, latest used first. Expired ones are forgotten on the way."""
        self.expire_flows(pod_id)
        indexes, now = self._indexes(pod_id), time.monotonic_ns()
        rows = {bytes(key): (key, row) for key, row in self._flow_rows(pod_id) if key.row == ROW_PACKETS}
        flows = []
        for key, row in rows.values():
            if row.role == FORWARD:
                back = rows.get(bytes(_turned(key, row)))
                flows.append(_flow(key, row, back[1] if back else FlowRow(), indexes, now))
            elif row.role == CANDIDATE and not row.seen & SEEN_REFUSAL:
                flows.append(_flow(_turned(key, row), _turned_row(key, row), row, indexes, now))
        return sorted(flows, key=lambda flow: flow.idle_s)


class DropWatch:
    """What is dropped, as it happens. `fileno()` is readable when there is something; a burst that is faster than its
    reader loses packets here, not in `counters`."""

    def __init__(self, table: Router, pod_id: int, ring: Ring, identifier: bytes) -> None:
        self._table, self._pod_id, self._ring, self._id = table, pod_id, ring, identifier
        self._reasons = drop_reasons()

    def fileno(self) -> int:
        return self._ring.fd

    def read(self) -> list[Drop]:
        """All that is there now. Raises RouterError when somebody else has taken over, or the pod is gone."""
        if self._table._drop_ring_id(self._pod_id) != self._id:
            raise RouterError("the pod is gone, or somebody else watches its drops now")
        indexes = self._table._indexes(self._pod_id)
        return [self._drop(Packet.from_buffer_copy(record), indexes) for record in self._ring.read()]

    def _drop(self, packet: Packet, indexes: dict[int, int]) -> Drop:
        key = packet.key
        is_ip = key.family in (4, 6)
        return Drop(
            reason=self._reasons[packet.reason],
            guest=indexes.get(key.ifindex),
            on_loopback=key.ifindex == LO_IFINDEX,
            ethertype=packet.ethertype,
            protocol=_PROTOCOL_NAMES.get(key.proto, str(key.proto)) if is_ip else None,
            source=_address(key.family, key.saddr) if is_ip else None,
            source_port=key.sport,
            target=_address(key.family, key.daddr) if is_ip else None,
            target_port=key.dport,
        )


def _turned(key: FlowKey, row: FlowRow) -> FlowKey:
    """The key of the entry's twin: bpf/flows.h, reverse_key()."""
    return FlowKey(
        ifindex=row.ifindex,
        family=row.family,
        proto=key.proto,
        saddr=row.daddr,
        daddr=row.saddr,
        sport=row.dport,
        dport=row.sport,
    )


def _turned_row(key: FlowKey, row: FlowRow) -> FlowRow:
    return FlowRow(
        saddr=key.daddr,
        daddr=key.saddr,
        sport=key.dport,
        dport=key.sport,
        ifindex=key.ifindex,
        role=CANDIDATE,
        family=key.family,
        created_ns=row.created_ns,
        last_ns=row.last_ns,
    )


def _flow(key: FlowKey, forward: FlowRow, back: FlowRow, indexes: dict[int, int], now_ns: int) -> Flow:
    def endpoint(row: FlowKey | FlowRow, ifindex: int, address: ctypes.Array[ctypes.c_uint8], port: int) -> Endpoint:
        guest = indexes.get(ifindex)
        outside = guest is None and ifindex != LO_IFINDEX
        return Endpoint(guest=guest, address=_address(row.family, address), port=port, outside=outside)

    return Flow(
        protocol=_PROTOCOL_NAMES[key.proto],
        opener=endpoint(key, key.ifindex, key.saddr, key.sport),
        dialled=endpoint(key, LO_IFINDEX, key.daddr, key.dport),
        server=endpoint(forward, forward.ifindex, forward.daddr, forward.dport),
        seen_as=endpoint(forward, LO_IFINDEX, forward.saddr, forward.sport),
        state=_state(forward, back),
        packets_sent=forward.packets,
        bytes_sent=forward.bytes,
        packets_received=back.packets,
        bytes_received=back.bytes,
        age_s=(now_ns - forward.created_ns) / 1e9,
        idle_s=max(0, now_ns - max(forward.last_ns, back.last_ns)) / 1e9,
    )


def _timeout_s(pod: Pod, key: FlowKey, row: FlowRow, twin: FlowRow) -> int:
    if key.row != ROW_PACKETS:
        return ASIDE_S
    if key.proto != _PROTOCOLS["tcp"]:
        return int(pod.udp_idle_s)
    answers = row if row.role == REVERSE else twin
    seen = row.seen | twin.seen
    closed = seen & SEEN_RST or row.seen & twin.seen & SEEN_FIN or not answers.seen & SEEN_ANSWER
    return int(pod.tcp_closed_s if closed else pod.tcp_idle_s)


def _state(forward: FlowRow, back: FlowRow) -> FlowState:
    seen = forward.seen | back.seen
    if forward.role == CANDIDATE:
        return FlowState.ASKING
    if seen & SEEN_RST:
        return FlowState.CLOSED if back.seen & SEEN_ANSWER else FlowState.REFUSED
    if forward.seen & back.seen & SEEN_FIN:
        return FlowState.CLOSED
    if seen & SEEN_FIN:
        return FlowState.CLOSING
    return FlowState.OPEN if back.seen & SEEN_ANSWER else FlowState.OPENING


def _possible_cpus() -> int:
    """A per-CPU value has a slot for each CPU that could ever be there: Documentation/bpf/map_hash.rst."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return 1 + max(int(part.rpartition("-")[2]) for part in text.split(","))


# --- open ---


def open_router() -> Router:
    """The host's router, loaded now if it is not. Close it: `with open_router() as router`. Raises RouterError."""
    return Router(program.open_pins())


# Keys of these begin with a pod's id, in every version of the router. In the order in which a pod's rows go: without
# flows the program leaves it alone, and until the last one has gone `pod_ids` knows that something is left.
_POD_MAPS = ("flows", "ports", "guests", "drops", "pod_counters", "pods")


def _remove_rows(fd: int, pod_id: int) -> None:
    for key in set(syscall.keys(fd, syscall.map_shape(fd)["key_size"])):
        if key.startswith(_pod_key(pod_id)):
            syscall.delete(fd, key)


def _open_maps(directory: Path, stack: ExitStack) -> dict[str, int]:
    """Those of a version that may not be ours, so that only their keys are known. OSError: it is not complete."""
    maps = {}
    for name in _POD_MAPS:
        maps[name] = syscall.open_pin(f"{directory}/{name}")
        stack.callback(os.close, maps[name])
    return maps


def remove_pod(pod_id: int) -> None:
    """Every row of the pod's, in whichever version of the router it is; one that is superseded goes with its last
    pod. Idempotent."""
    for directory in program.versions():
        with suppress(OSError), ExitStack() as stack:
            for fd in _open_maps(directory, stack).values():
                _remove_rows(fd, pod_id)
    unload_superseded()


def pod_ids() -> list[int]:
    """Of all versions of the router that are loaded: pods keep theirs over an upgrade, and ids are of the host."""
    return sorted({pod_id for directory in program.versions() for pod_id in _pods_of(directory)})


def is_loaded() -> bool:
    return (program.root() / program.version()).is_dir()


def loaded() -> list[Loaded]:
    """Every version of the router that is loaded. What is half-pinned is not."""
    found = []
    for directory in program.versions():
        with suppress(OSError):
            found.append(Loaded(directory, pods=len(_pods_of(directory)), ours=directory.name == program.version()))
    return found


def unload_all() -> list[Path]:
    """Unpin every version of the router that has no pods left and is not in use; returns what is gone."""
    gone = _unload(program.versions())
    with suppress(OSError):
        program.root().rmdir()  # not empty: somebody else's version is in use
    return gone


def unload_superseded() -> list[Path]:
    """The same, but for the version that was loaded last: the next pod will want it."""
    return _unload(program.versions()[:-1])


def _unload(directories: Iterable[Path]) -> list[Path]:
    gone = []
    for directory in directories:
        with program.unused(directory) as unused:
            if unused and not _pods_of(directory):
                program.remove(directory)
                gone.append(directory)
    return gone


def _pods_of(directory: Path) -> set[int]:
    """None if it is half-pinned: then there is nothing in it to keep."""
    try:
        fd = syscall.open_pin(f"{directory}/pods")
    except OSError:
        return set()
    try:
        return {int.from_bytes(key, "little") for key in syscall.keys(fd, _POD_KEY)}
    finally:
        os.close(fd)
