"""What is shown of a pod, from made-up samples of it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from xml.etree import ElementTree

import pytest

import router
from launcher import events, state
from launcher.observe import metrics
from launcher.observe.follow import FlowEvent, What, compare, event_line, heading
from launcher.observe.graph import Graph, build
from launcher.observe.ports import Known, port_rows, served_ports
from launcher.observe.sample import GuestSample, PodSample, Process, Traffic
from launcher.observe.sockets import NOBODY, Owner, parse_ss
from launcher.observe.stats import Kind, format_scaled, rate_rows, rates, redraw, total_rows
from launcher.observe.svg import draw
from router.model import Endpoint, Flow, FlowState, PortRow

POD = state.PodRecord(
    name="shop", id=1, netns="/run/netns/uk-shop", ipv4="169.254.77.1/24", ipv6="fd00:77::1/64", saved_sysctls={}
)
LOOPBACK = IPv4Address("127.0.0.1")
BRIDGE = IPv4Address("169.254.77.1")

SS = """\
udp UNCONN 0      0            0.0.0.0:53      0.0.0.0:*     users:(("dns",pid=66,fd=6))
udp UNCONN 0      0      127.0.0.53%lo:55      0.0.0.0:*     users:(("dns",pid=66,fd=12))
udp ESTAB  0      0          127.0.0.1:59243 127.0.0.1:53    users:(("curl",pid=71,fd=11))
tcp LISTEN 1      128        127.0.0.1:80      0.0.0.0:*     users:(("a (b) "c"",pid=43,fd=3),("nginx",pid=42,fd=3))
tcp ESTAB  0      0          127.0.0.1:80    127.0.0.1:46916
tcp LISTEN 0      128             [::]:82         [::]:*     users:(("web",pid=7,fd=5))
tcp LISTEN 0      128                *:81            *:*     users:(("web",pid=7,fd=4))
tcp LISTEN 0      128 [::ffff:127.0.0.1]:83          *:*     users:(("web",pid=7,fd=4))
tcp LISTEN 0      128      169.254.77.1:84     0.0.0.0:*     users:(("web",pid=7,fd=4))
"""


def flow(port: int, *, server: int | None = 2, opener: int | None = None, sport: int = 40000) -> Flow:
    return Flow(
        protocol="tcp",
        opener=Endpoint(guest=opener, address=LOOPBACK if opener is None else BRIDGE + opener - 1, port=sport),
        dialled=Endpoint(guest=None, address=LOOPBACK if opener is None else BRIDGE, port=port),
        server=Endpoint(guest=server, address=LOOPBACK if server is None else BRIDGE + server - 1, port=port),
        seen_as=Endpoint(guest=None, address=BRIDGE, port=sport),
        state=FlowState.OPEN,
        packets_sent=10,
        bytes_sent=1000,
        packets_received=20,
        bytes_received=2000,
        age_s=60,
        idle_s=0.5,
    )


def guest(index: int, name: str, *, bytes_in: int = 0, cpu_s: float = 0) -> GuestSample:
    record = state.GuestRecord(
        name=name,
        pod="shop",
        index=index,
        mac="",
        ipv4=f"169.254.77.{index}",
        ipv6=f"fd00:77::{index}",
        tap=f"uktap{index}",
        image="",
        family="linux",
        vmm="qemu",
        accel="kvm",
        memory_mib=128,
        cpus=1,
        supervisor_pid=1,
        started_at=0,
    )
    return GuestSample(
        index=index,
        tap=record.tap,
        traffic=Traffic(bytes_in=bytes_in),
        flows=1,
        record=record,
        process=Process(cpu_s=cpu_s, memory_bytes=90 << 20),
    )


def sample(at_s: float, guests: tuple[GuestSample, ...], flows: tuple[Flow, ...] = (), dropped: int = 0) -> PodSample:
    counters = {router.REDIRECTED: 100, router.PASSED: 7, router.Reason("FRAGMENT", "..."): dropped}
    return PodSample(
        record=POD, at_s=at_s, guests=guests, links={"lo": Traffic(bytes_in=8)}, flows=flows, counters=counters
    )


# --- sockets and ports ---


def test_ss_is_understood() -> None:
    sockets = list(parse_ss(SS))
    assert [(one.port, one.families, str(one.address), one.listening, one.device) for one in sockets] == [
        (53, (4,), "None", True, None),
        (55, (4,), "127.0.0.53", True, "lo"),
        (59243, (4,), "127.0.0.1", False, None),
        (80, (4,), "127.0.0.1", True, None),
        (80, (4,), "127.0.0.1", False, None),
        (82, (6,), "None", True, None),
        (81, (4, 6), "None", True, None),
        (83, (4,), "127.0.0.1", True, None),
        (84, (4,), "169.254.77.1", True, None),
    ]
    assert sockets[3].owner == Owner("nginx", 42)
    assert sockets[4].owner == NOBODY


@pytest.mark.parametrize(
    ("number", "protocol", "conflict"),
    [
        (80, "tcp", "shadowed by nginx"),
        (80, "udp", ""),  # another protocol
        (81, "tcp", "shadowed by web"),  # a socket of IPv6 that takes IPv4 too
        (82, "tcp", ""),  # IPv6 only
        (84, "tcp", "shadowed by web for guests"),  # the bridge's address is what localhost is to them
        (55, "udp", ""),  # 127.0.0.53 is nobody's localhost
    ],
)
def test_a_socket_shadows_a_guests_port(number: int, protocol: str, conflict: str) -> None:
    row = PortRow(protocol=protocol, family=4, number=number, guest=2, declared=True)
    served = served_ports(POD, [row], {2: "one", 3: "two"}, list(parse_ss(SS)))
    (of_guest,) = [one for one in served if one.guest == 2]
    assert (of_guest.owner, of_guest.known, of_guest.conflict) == ("one", Known.DECLARED, conflict)
    others = {one.conflict for one in served if one.guest is None and one.conflict}
    assert len(others) == bool(conflict)


def test_a_port_of_both_families_is_one_row_and_the_only_guest_has_the_rest() -> None:
    rows = [PortRow(protocol="tcp", family=family, number=80, guest=2, declared=False) for family in (4, 6)]
    headings, shown = port_rows(served_ports(POD, rows, {2: "web"}, []))
    assert [dict(zip(headings, row, strict=True)) for row in shown] == [
        {
            "PORT": "80",
            "PROTO": "tcp",
            "IP": "v4,v6",
            "SERVED BY": "web",
            "PID": "-",
            "BOUND TO": "-",
            "KNOWN": "learned",
            "CONFLICT": "-",
        },
        {
            "PORT": "other",
            "PROTO": "any",
            "IP": "any",
            "SERVED BY": "web",
            "PID": "-",
            "BOUND TO": "-",
            "KNOWN": "only guest",
            "CONFLICT": "-",
        },
    ]


# --- following ---


def test_what_happened_between_two_looks() -> None:
    stays, ends, goes, closed = (flow(80, sport=sport) for sport in (1, 2, 3, 4))
    before = [stays, ends, goes, replace(closed, state=FlowState.CLOSED)]
    new, brief = replace(flow(81), age_s=0.2), replace(flow(82), age_s=0.1, state=FlowState.REFUSED)
    after = [stays, replace(ends, state=FlowState.CLOSED), new, brief]
    assert compare(before, after, 1) == [
        (What.ENDED, goes),
        (What.ENDED, replace(ends, state=FlowState.CLOSED)),
        (What.OPENED, new),
        (What.OPENED, brief),
        (What.ENDED, brief),
    ]
    closing = replace(stays, state=FlowState.CLOSING)
    assert compare([stays], [closing], 1) == [(What.CHANGED, closing)]
    assert compare(after, after, 0.01) == []


def test_a_flow_by_the_name_of_an_earlier_one_is_another() -> None:
    old, new = flow(80), replace(flow(80), age_s=0.3, bytes_sent=1)
    assert compare([old], [new], 1) == [(What.ENDED, old), (What.OPENED, new)]


def test_a_line_of_an_event_stands_under_its_heading() -> None:
    line = event_line(FlowEvent(at_s=0.5, what=What.OPENED, flow=flow(80)), {2: "web"})
    for title, cell in (("EVENT", "opened"), ("DIALLED", "127.0.0.1:80"), ("SERVED BY", "web"), ("AGE", "1m00s")):
        assert line[heading().index(title) :].startswith(cell)
    assert "10/20" in line


# --- rates ---


def test_rates() -> None:
    before = sample(10, (guest(2, "web", bytes_in=1000, cpu_s=1), guest(3, "db", bytes_in=9000, cpu_s=5)), dropped=4)
    after = sample(12, (guest(2, "web", bytes_in=5000, cpu_s=2), guest(3, "db", bytes_in=600, cpu_s=0.2)), dropped=10)
    pod, web, db, lo = rates(before, after)
    assert (web.traffic.bytes_in, web.cpu_s) == (2000, 0.5)
    assert (db.traffic.bytes_in, db.cpu_s) == (300, 0.1)  # it has begun anew
    assert (pod.kind, pod.drops, pod.memory_bytes) == (Kind.POD, 3, 180 << 20)
    assert (lo.name, lo.traffic.bytes_in, lo.cpu_s) == ("lo", 0, None)
    headings, rows = rate_rows([pod, web])
    assert {heading.strip(): cell.strip() for heading, cell in zip(headings, rows[1], strict=True)} == {
        "POD / GUEST": "web",
        "IN": "16.0 kb/s",
        "OUT": "0 b/s",
        "PACKETS IN": "0 /s",
        "PACKETS OUT": "0 /s",
        "FLOWS": "1",
        "DROPS/s": "-",
        "CPU": "50%",
        "MEMORY": "90.0 MiB / 128.0 MiB",
    }
    assert len(total_rows([pod])[1][0]) == len(total_rows([pod])[0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 b/s"),
        (999, "999 b/s"),
        (1000, "1.0 kb/s"),
        (99960, "100 kb/s"),
        (2.5e6, "2.5 Mb/s"),
        (4e13, "40000.0 Gb/s"),
    ],
)
def test_scaled(value: float, text: str) -> None:
    assert format_scaled(value, "b/s") == text


def test_what_does_not_fit_the_terminal_is_cut() -> None:
    drawn = redraw([f"line {number} is long" for number in range(10)], (6, 5))
    assert drawn == "\x1b[H" + "".join(f"line {n}\x1b[K\n" for n in range(3)) + "... 7 \x1b[K\n\x1b[J"


# --- the picture ---

SVG = "{http://www.w3.org/2000/svg}"


def picture(graph: Graph) -> tuple[str, list[ElementTree.Element], list[str]]:
    """The whole, the edges, the texts."""
    text = draw(graph)
    root = ElementTree.fromstring(text)
    return text, list(root.iter(f"{SVG}path")), [element.text or "" for element in root.iter(f"{SVG}text")]


def test_an_empty_pod_has_a_picture() -> None:
    _, edges, texts = picture(build(sample(0, ()), sample(1, ()), [], []))
    assert not edges
    assert "pod shop" in texts


def test_the_picture_of_a_pod() -> None:
    sockets = [
        *parse_ss(SS),
        *parse_ss('tcp ESTAB 0 0 127.0.0.1:40000 127.0.0.1:8080 users:(("curl",pid=71,fd=3))'),
        *parse_ss('tcp ESTAB 0 0 127.0.0.1:40001 127.0.0.1:8080 users:(("curl",pid=72,fd=3))'),
    ]
    rows = [PortRow(protocol="tcp", family=4, number=80, guest=3, declared=True)]
    flows = (
        flow(8080, sport=40000),  # curl to web
        flow(8080, sport=40001),  # another
        flow(80, opener=2, server=None),  # web to nginx
        flow(5432, opener=2, server=3),  # web to db
        replace(flow(81, opener=2, server=None), state=FlowState.CLOSED),  # web to "web", ended meanwhile
        replace(flow(82, opener=2, server=None), state=FlowState.CLOSED, idle_s=3),  # ended before
        replace(flow(1), state=FlowState.REFUSED),
    )
    earlier = tuple(replace(one, bytes_sent=500, bytes_received=2000) for one in flows)
    guests = (guest(2, "web"), guest(3, "<db> & co"))
    served = served_ports(POD, rows, {2: "web", 3: "<db> & co"}, sockets)
    graph = build(sample(0, guests, earlier), sample(2, guests, flows), served, sockets)
    found = {
        (graph.nodes[edge.opener].title, graph.nodes[edge.server].title, edge.port[1]): (edge.flows, edge.sent)
        for edge in graph.edges
    }
    assert found == {
        ("curl", "web", 8080): (2, 500),
        ("web", "nginx", 80): (1, 250),
        ("web", "web", 81): (1, 250),
        ("web", "<db> & co", 5432): (1, 250),
    }
    _, edges, texts = picture(graph)
    assert len(edges) == 4
    for text in ("curl", "2 processes", "<db> & co", "8080 tcp", "4.0 kb/s · 2 flows", "shadowed by nginx"):
        assert text in texts


def test_a_caller_without_a_process_is_told_from_one_outside() -> None:
    outside = replace(flow(80), opener=Endpoint(guest=None, address=IPv4Address("10.4.0.7"), port=4000))
    now = sample(1, (guest(2, "web"),), (flow(80), outside))
    graph = build(replace(now, at_s=0), now, [], [])
    assert [(graph.nodes[edge.opener].title, edge.flows) for edge in graph.edges] == [("container", 1), ("outside", 1)]


def test_a_node_of_very_many_ports_is_cut() -> None:
    rows = [PortRow(protocol="tcp", family=4, number=number, guest=2, declared=False) for number in range(1, 41)]
    served = served_ports(POD, rows, {2: "x" * 48}, [])
    now = sample(1, (guest(2, "x" * 48),), (flow(40),))
    _, edges, texts = picture(build(replace(now, at_s=0), now, served, []))
    assert "and 29 more ports" in texts
    assert len(edges) == 1
    assert any(text.endswith("…") for text in texts)


def test_addresses_of_sockets_are_shown_together() -> None:
    sockets = list(parse_ss(SS.replace("[::]:82", "[::1]:80")))
    graph = build(sample(0, ()), sample(1, ()), served_ports(POD, [], {}, sockets), sockets)
    ports = {(node.title, port.number): port.note for node in graph.nodes for port in node.ports}
    assert ports["nginx", 80] == "127.0.0.1"
    assert ports["web", 80] == str(IPv6Address("::1"))
    assert ports["web", 81] == "any"


def test_metrics_of_how_guests_fare(state_dir: Path) -> None:
    fresh = guest(2, "fresh").record
    state.write_guest(replace(fresh, pod="shop", exit_code=None, health=None))
    state.write_guest(
        replace(
            fresh, name="tried", pod="shop", restarts=3, health="unhealthy", exit_code=134, reason="panicked",
            ready_at=1000.5, resumed_at=999.25,
        )
    )  # fmt: skip
    events.note("ready", "shop", "tried")
    lines = {line for line in metrics.text().splitlines() if not line.startswith("#")}
    tried = 'guest="tried",pod="shop"'
    assert {
        f"uklaunch_guest_restarts_total{{{tried}}} 3.0",
        f'uklaunch_guest_health{{{tried},state="healthy"}} 0.0',
        f'uklaunch_guest_health{{{tried},state="unhealthy"}} 1.0',
        f"uklaunch_guest_last_exit_code{{{tried}}} 134.0",
        f'uklaunch_guest_last_exit_reason{{{tried},reason="panicked"}} 1.0',
        f"uklaunch_guest_ready_time_seconds{{{tried}}} 1000.5",
        f"uklaunch_guest_boot_duration_seconds{{{tried}}} 1.25",
        'uklaunch_events_total{event="ready"} 1.0',
        'uklaunch_events_total{event="restarting"} 0.0',
    } <= lines
    of_fresh = {line.partition("{")[0] for line in lines if 'guest="fresh"' in line}
    assert "uklaunch_guest_restarts_total" in of_fresh
    assert not {name for name in of_fresh if "health" in name or "exit" in name or "ready" in name or "boot" in name}
