"""A pod as a graph: containers and guests with their ports, and who talks to whom at what rate. `svg` draws it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_interface

import router
from router.model import FlowState
from router.trace import format_bytes

from .. import pod, state
from .follow import key_of
from .ports import Known, Served, served_ports
from .sample import GuestSample, PodSample, is_live, sample
from .sockets import NOBODY, Owner, Socket, read_sockets
from .stats import Kind, rates

OUTSIDE = Owner("outside", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """As it is shown. `known`: declared, learned, listening, ...; `note` is what else there is to say."""

    number: int
    protocol: str
    known: str
    note: str = ""
    conflict: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.protocol, self.number


@dataclass(slots=True, kw_only=True)
class Node:
    """A container's process or a guest."""

    title: str
    guest: bool
    lines: list[str]
    ports: list[Port] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Flows from one node to a port of another, together. Rates are frames' bytes per second."""

    opener: int  # an index into the graph's nodes
    server: int
    port: tuple[str, int]
    flows: int
    sent: float  # by the opener
    received: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    title: str
    subtitle: str
    containers_localhost: tuple[str, ...]
    guests_localhost: tuple[str, ...]
    nodes: list[Node]
    edges: list[Edge]
    footer: str


def look(record: state.PodRecord, seconds: float) -> Graph:
    """Rates are taken over that many seconds. Raises UklaunchError if the pod cannot be read."""
    with pod.open_router() as table:
        before = sample(record, table)
        time.sleep(seconds)
        after = sample(record, table)
        rows = table.ports(record.id)
    sockets = read_sockets(record)
    return build(before, after, served_ports(record, rows, after.names, sockets), sockets)


def build(before: PodSample, after: PodSample, served: Sequence[Served], sockets: Sequence[Socket]) -> Graph:
    nodes: dict[Owner | int, Node] = {}
    usage = {one.name: one for one in rates(before, after) if one.kind == Kind.GUEST}
    seconds = after.at_s - before.at_s
    # Also those that have ended meanwhile: many short ones are traffic, too.
    flows = [
        flow for flow in after.flows if is_live(flow) or (flow.state == FlowState.CLOSED and flow.idle_s < seconds)
    ]
    owners = _Owners(after.record, sockets)

    for one in served:
        if one.guest is None:
            nodes.setdefault(Owner(one.owner, one.pid or 0), _container(one.owner, {one.pid or 0}))
    for flow in flows:
        for owner in (owners.opener(flow), owners.server(flow)):
            if isinstance(owner, Owner):
                nodes.setdefault(owner, _container(owner.name, owners.clients.get(owner.name, set())))
    for guest in after.guests:
        cpu = usage[guest.name].cpu_s
        nodes[guest.index] = Node(title=guest.name, guest=True, lines=list(_guest_lines(guest, cpu)))
    for key, port in _ports(served):
        if key in nodes:
            nodes[key].ports.append(port)

    numbers = {key: number for number, key in enumerate(nodes)}
    edges = _edges(before, after, flows, owners, numbers)
    for edge in edges:
        server = list(nodes.values())[edge.server]
        if edge.port not in {port.key for port in server.ports}:  # the only guest of its pod has whatever is asked for
            server.ports.append(Port(number=edge.port[1], protocol=edge.port[0], known="in use"))
    for node in nodes.values():
        node.ports.sort(key=lambda port: (port.number, port.protocol))
    whole = next(one for one in rates(before, after) if one.kind == Kind.POD)
    record = after.record
    return Graph(
        title=record.name,
        subtitle=f"network namespace {record.netns}",
        containers_localhost=("127.0.0.1", "::1"),
        guests_localhost=(record.ipv4.partition("/")[0], record.ipv6.partition("/")[0]),
        nodes=list(nodes.values()),
        edges=edges,
        footer=(
            f"{len(flows)} {'flow' if len(flows) == 1 else 'flows'}, {whole.drops or 0:.0f} drops/s"
            f" · rates over {seconds:.1f} s · {time.strftime('%Y-%m-%d %H:%M:%S')}"
        ),
    )


def _container(name: str, pids: set[int]) -> Node:
    if name == OUTSIDE.name:
        line = "by the pod's uplink"
    elif pids and 0 not in pids:
        line = f"pid {min(pids)}" if len(pids) == 1 else f"{len(pids)} processes"
    else:
        line = "its process has ended"
    return Node(title=name, guest=False, lines=[line])


def _guest_lines(guest: GuestSample, cpu: float | None) -> Iterator[str]:
    if guest.record:
        yield f"{guest.record.ipv4} · {guest.record.ipv6}"
        facts = [f"guest {guest.index}", guest.record.family]
        if guest.process:
            facts += [f"{cpu or 0:.0%} CPU", format_bytes(guest.process.memory_bytes)]
        yield " · ".join(facts)
    else:
        yield "without a supervisor"


def _ports(served: Sequence[Served]) -> Iterator[tuple[Owner | int, Port]]:
    """What is the same over IPv4 and IPv6, or on several addresses, is shown once."""
    found: dict[tuple[Owner | int, str, int], Port] = {}
    for one in served:
        if one.known == Known.ONLY:
            continue
        owner = Owner(one.owner, one.pid or 0) if one.guest is None else one.guest
        address = "" if one.guest is not None else str(one.address or "any")
        port = Port(number=one.number, protocol=one.protocol, known=str(one.known), note=address, conflict=one.conflict)
        old = found.setdefault((owner, one.protocol, one.number), port)
        notes = dict.fromkeys(note for note in (*old.note.split(), address) if note)
        found[owner, one.protocol, one.number] = replace(
            old, note=" ".join(notes), conflict=old.conflict or one.conflict
        )
    for (owner, _, _), port in found.items():
        yield owner, port


class _Owners:
    """Which process, or guest, is at a flow's ends. Processes of one name that serve nothing count as one, of pid 0."""

    def __init__(self, record: state.PodRecord, sockets: Sequence[Socket]) -> None:
        self._bridge = {ip_interface(record.ipv4).ip, ip_interface(record.ipv6).ip}
        servers = {sock.owner for sock in sockets if sock.listening}
        self.clients: dict[str, set[int]] = {}
        self._connected: dict[tuple[str, int], Owner] = {}
        self._listening: dict[tuple[str, int, int], Owner] = {}
        for sock in sockets:
            if sock.listening:
                for family in sock.families:
                    self._listening[sock.protocol, family, sock.port] = sock.owner
            elif sock.owner in servers:
                self._connected[sock.protocol, sock.port] = sock.owner
            elif sock.owner != NOBODY:
                self.clients.setdefault(sock.owner.name, set()).add(sock.owner.pid)
                self._connected[sock.protocol, sock.port] = Owner(sock.owner.name, 0)

    def opener(self, flow: router.Flow) -> Owner | int:
        end = flow.opener
        if end.guest is not None:
            return end.guest
        # A UDP socket that is not connected listens, too.
        listening = self._listening.get((flow.protocol, end.address.version, end.port))
        owner = self._connected.get((flow.protocol, end.port), listening)
        if owner is None:
            owner = NOBODY if end.address.is_loopback or end.address in self._bridge else OUTSIDE
        return owner

    def server(self, flow: router.Flow) -> Owner | int:
        end = flow.server
        if end.guest is not None:
            return end.guest
        return self._listening.get((flow.protocol, end.address.version, end.port), NOBODY)


def _edges(
    before: PodSample,
    after: PodSample,
    flows: Sequence[router.Flow],
    owners: _Owners,
    numbers: Mapping[Owner | int, int],
) -> list[Edge]:
    seconds = after.at_s - before.at_s
    old = {key_of(flow): flow for flow in before.flows}
    edges: dict[tuple[int, int, tuple[str, int]], Edge] = {}
    for flow in flows:
        was = old.get(key_of(flow))
        if was and flow.age_s < seconds:
            was = None
        opener, server = owners.opener(flow), owners.server(flow)
        if opener not in numbers or server not in numbers:  # a guest that has just left
            continue
        port = flow.protocol, flow.server.port
        edge = Edge(opener=numbers[opener], server=numbers[server], port=port, flows=0, sent=0, received=0)
        edge = edges.get((edge.opener, edge.server, port), edge)
        edges[edge.opener, edge.server, port] = replace(
            edge,
            flows=edge.flows + 1,
            sent=edge.sent + max(0, flow.bytes_sent - (was.bytes_sent if was else 0)) / seconds,
            received=edge.received + max(0, flow.bytes_received - (was.bytes_received if was else 0)) / seconds,
        )
    return list(edges.values())
