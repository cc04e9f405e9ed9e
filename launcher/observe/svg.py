"""Draws a pod's graph as SVG, by a fixed layout: containers on the left, guests on the right, localhost between them.

      containers          localhost            guests
    ┌────────────┐        ┌───────┐        ┌────────────┐
    │ curl       o──────────  rate ────────► 8080 tcp   │     an edge has a lane of its own on the way
    │            │        │       │        │            │
    │ 9090 tcp   ◄──────────  rate ────────o web        │
    └────────────┘        └───────┘        └────────────┘

Lengths are pixels. Text is not measured: it is cut where it might not fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.etree import ElementTree

from .graph import Edge, Graph, Node, Port
from .stats import format_scaled

WIDTH = 1120
MARGIN = 28
BOX_WIDTH = 320
TOP = 128  # where boxes begin
HEAD, LINE, ROW, PAD, GAP = 34, 18, 28, 12, 20
SPINE_WIDTH = 200
LANE = 34
MAX_PORTS = 12

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
INK, FAINT, PAPER, FRAME = "#1e293b", "#64748b", "#ffffff", "#cbd5e1"
CONTAINER, GUEST, AMBER = "#2563eb", "#0f766e", "#b45309"
TINT = {CONTAINER: "#eff6ff", GUEST: "#f0fdfa", AMBER: "#fffbeb"}

LEFT = MARGIN * 2
RIGHT = WIDTH - MARGIN * 2 - BOX_WIDTH
MIDDLE = WIDTH / 2


@dataclass(slots=True, kw_only=True)
class _Box:
    node: Node
    x: float
    y: float
    shown: list[Port]

    @property
    def color(self) -> str:
        return GUEST if self.node.guest else CONTAINER

    @property
    def inner(self) -> float:
        """The edge that looks at localhost."""
        return self.x if self.node.guest else self.x + BOX_WIDTH

    @property
    def rows_y(self) -> float:
        return self.y + HEAD + len(self.node.lines) * LINE + 8

    @property
    def height(self) -> float:
        rows = len(self.shown) + (len(self.node.ports) > len(self.shown))
        return self.rows_y - self.y + rows * ROW + (PAD if rows else 4)

    @property
    def start(self) -> tuple[float, float]:
        """Where edges leave."""
        return self.inner, self.y + HEAD / 2 + 4

    def end(self, port: tuple[str, int]) -> tuple[float, float]:
        """Where those to the port arrive; all that is not shown is at the last row."""
        keys = [shown.key for shown in self.shown]
        row = keys.index(port) if port in keys else len(keys)
        return self.inner, self.rows_y + row * ROW + ROW / 2


def draw(graph: Graph) -> str:
    """The picture, as a file's text."""
    boxes = _place(graph)
    lanes = _lanes(graph, boxes)
    bottom = max([box.y + box.height for box in boxes] + [y + LANE for y in lanes] + [TOP + 150]) + 24
    height = bottom + 72
    svg = _add(
        None,
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        width=WIDTH,
        height=height,
        viewBox=f"0 0 {WIDTH} {_number(height)}",
        font_family=FONT,
        fill=INK,
    )
    _add(svg, "title", f"pod {graph.title}")
    _add(svg, "rect", width="100%", height="100%", fill=PAPER)
    _frame(svg, graph, bottom)
    for edge, y in zip(graph.edges, lanes, strict=True):
        _draw_edge(svg, boxes[edge.opener], boxes[edge.server], edge, y)
    for box in boxes:
        _draw_box(svg, box)
    for edge, y in zip(graph.edges, lanes, strict=True):
        _draw_ends(svg, boxes[edge.opener], boxes[edge.server], edge)
        _draw_rate(svg, boxes[edge.opener].color, edge, y)
    _legend(svg, bottom + 30, graph.footer)
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode", xml_declaration=True) + "\n"


# --- layout ---


def _place(graph: Graph) -> list[_Box]:
    boxes, down = [], {False: float(TOP), True: float(TOP)}
    for node in graph.nodes:
        side = node.guest
        shown = node.ports if len(node.ports) <= MAX_PORTS else node.ports[: MAX_PORTS - 1]
        box = _Box(node=node, x=RIGHT if side else LEFT, y=down[side], shown=shown)
        down[side] += box.height + GAP
        boxes.append(box)
    shift = abs(down[True] - down[False]) / 2  # the shorter column in the middle of the longer
    shorter = down[True] < down[False]
    for box in boxes:
        if box.node.guest == shorter:
            box.y += shift
    return boxes


def _lanes(graph: Graph, boxes: list[_Box]) -> list[float]:
    """Each edge's height on localhost: as near as can be to half-way between its ends, in order, apart."""
    wanted = [(boxes[edge.opener].start[1] + boxes[edge.server].end(edge.port)[1]) / 2 for edge in graph.edges]
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    lanes, last = [0.0] * len(wanted), TOP + 40.0
    for number in order:
        last = lanes[number] = max(wanted[number], last + LANE)
    return lanes


# --- drawing ---


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _add(parent: ElementTree.Element | None, tag: str, text: str = "", /, **attributes: object) -> ElementTree.Element:
    """An element; `font_size=12` is the attribute font-size."""
    given = {
        name.replace("_", "-"): _number(value) if isinstance(value, (int, float)) else str(value)
        for name, value in attributes.items()
    }
    given = {{"viewBox": "viewBox"}.get(name, name): value for name, value in given.items()}
    element = ElementTree.Element(tag, given) if parent is None else ElementTree.SubElement(parent, tag, given)
    if text:
        element.text = text
    return element


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _frame(svg: ElementTree.Element, graph: Graph, bottom: float) -> None:
    _add(
        svg,
        "rect",
        x=MARGIN,
        y=MARGIN,
        width=WIDTH - 2 * MARGIN,
        height=bottom - MARGIN,
        rx=18,
        fill="#f8fafc",
        stroke=FRAME,
        stroke_width=1.5,
    )
    _add(svg, "text", f"pod {_cut(graph.title, 48)}", x=LEFT, y=MARGIN + 38, font_size=22, font_weight=700)
    _add(svg, "text", _cut(graph.subtitle, 60), x=LEFT, y=MARGIN + 60, font_size=12.5, fill=FAINT)
    for x, text, color in ((LEFT, "CONTAINERS", CONTAINER), (RIGHT, "GUESTS", GUEST)):
        _add(svg, "text", text, x=x, y=TOP - 12, font_size=11, font_weight=700, letter_spacing=1.2, fill=color)
    _add(
        svg,
        "rect",
        x=MIDDLE - SPINE_WIDTH / 2,
        y=MARGIN + 22,
        width=SPINE_WIDTH,
        height=bottom - MARGIN - 40,
        rx=14,
        fill="#e2e8f0",
    )
    middle = {"x": MIDDLE, "text_anchor": "middle"}
    _add(svg, "text", "localhost", **middle, y=MARGIN + 50, font_size=18, font_weight=700)
    for row, addresses in enumerate((graph.containers_localhost, graph.guests_localhost)):
        _add(svg, "text", _cut(" · ".join(addresses), 36), **middle, y=MARGIN + 71 + 17 * row, font_size=11, fill=FAINT)


def _draw_box(svg: ElementTree.Element, box: _Box) -> None:
    group = _add(svg, "g")
    place = {"x": box.x, "y": box.y, "width": BOX_WIDTH, "height": box.height, "rx": 10}
    _add(group, "rect", **place, fill=PAPER, stroke=box.color, stroke_width=1.5)
    side = box.x + BOX_WIDTH - 5 if box.node.guest else box.x
    _add(group, "rect", x=side, y=box.y + 10, width=5, height=box.height - 20, rx=2, fill=box.color)
    left = box.x + 20
    _add(group, "text", _cut(box.node.title, 30), x=left, y=box.y + 26, font_size=15, font_weight=700)
    for number, line in enumerate(box.node.lines):
        _add(group, "text", _cut(line, 46), x=left, y=box.y + HEAD + 11 + number * LINE, font_size=11.5, fill=FAINT)
    for number, port in enumerate(box.shown):
        _draw_port(group, box, port, box.rows_y + number * ROW)
    if hidden := len(box.node.ports) - len(box.shown):
        y = box.rows_y + len(box.shown) * ROW + 18
        _add(group, "text", f"and {hidden} more ports", x=left, y=y, font_size=11.5, fill=FAINT)


def _draw_port(group: ElementTree.Element, box: _Box, port: Port, y: float) -> None:
    color = AMBER if port.conflict else box.color
    x, width = box.x + 20, 86
    _add(
        group,
        "rect",
        x=x,
        y=y + 3,
        width=width,
        height=22,
        rx=11,
        fill=TINT[color] if port.known != "declared" else color,
        stroke=color,
    )
    ink = PAPER if port.known == "declared" else color
    label = {"font_size": 12, "font_weight": 600, "text_anchor": "middle", "fill": ink}
    _add(group, "text", f"{port.number} {port.protocol}", x=x + width / 2, y=y + 18.5, **label)
    text = port.conflict or " ".join(part for part in (port.known, port.note) if part)
    text_ink = {"font_size": 11.5, "fill": AMBER if port.conflict else FAINT}
    element = _add(group, "text", _cut(text, 32), x=x + width + 10, y=y + 18, **text_ink)
    _add(element, "title").text = text


def _width(edge: Edge) -> float:
    """Of the line: 1.5 for next to nothing, a pixel more for every tenfold of it beyond 10 kb/s."""
    return 1.5 + max(0.0, math.log10(max(1.0, (edge.sent + edge.received) * 8)) - 4) * 0.8


def _draw_edge(svg: ElementTree.Element, opener: _Box, server: _Box, edge: Edge, lane: float) -> None:
    (x1, y1), (x2, y2) = opener.start, server.end(edge.port)
    x2 += 9 if not server.node.guest else -9  # the arrow's head
    one, two = lane, lane
    near = MIDDLE + (SPINE_WIDTH / 2 - 24) * (1 if opener.node.guest else -1)
    far = MIDDLE + (SPINE_WIDTH / 2 - 24) * (1 if server.node.guest else -1)
    if opener.node.guest == server.node.guest:  # there and back, turning behind the rate
        near = far = MIDDLE + (12 if opener.node.guest else -12)
        one, two = (lane - 6, lane + 6) if y1 <= y2 else (lane + 6, lane - 6)
    half1, half2 = (x1 + near) / 2, (x2 + far) / 2
    path = (
        f"M{_number(x1)},{_number(y1)} C{_number(half1)},{_number(y1)} {_number(half1)},{_number(one)} "
        f"{_number(near)},{_number(one)} L{_number(far)},{_number(two)} "
        f"C{_number(half2)},{_number(two)} {_number(half2)},{_number(y2)} {_number(x2)},{_number(y2)}"
    )
    _add(
        svg,
        "path",
        d=path,
        fill="none",
        stroke=opener.color,
        stroke_width=_width(edge),
        stroke_opacity=0.75,
        stroke_linejoin="round",
    )


def _draw_ends(svg: ElementTree.Element, opener: _Box, server: _Box, edge: Edge) -> None:
    x, y = opener.start
    _add(svg, "circle", cx=x, cy=y, r=4.5, fill=PAPER, stroke=opener.color, stroke_width=2)
    x, y = server.end(edge.port)
    back = 11 if not server.node.guest else -11
    points = f"{_number(x)},{_number(y)} {_number(x + back)},{_number(y - 6)} {_number(x + back)},{_number(y + 6)}"
    _add(svg, "polygon", points=points, fill=opener.color)


def _draw_rate(svg: ElementTree.Element, color: str, edge: Edge, lane: float) -> None:
    rate = format_scaled((edge.sent + edge.received) * 8, "b/s") if edge.sent + edge.received else "idle"
    text = f"{rate} · {edge.flows} flows" if edge.flows > 1 else rate
    width = 30 + 6.6 * len(text)
    group = _add(svg, "g")
    place = {"x": MIDDLE - width / 2, "y": lane - 12, "width": width, "height": 24, "rx": 12}
    _add(group, "rect", **place, fill=PAPER, stroke=color, stroke_width=1.2)
    _add(group, "text", text, x=MIDDLE, y=lane + 4.2, text_anchor="middle", font_size=12, font_weight=600)
    sent, received = format_scaled(edge.sent * 8, "b/s"), format_scaled(edge.received * 8, "b/s")
    _add(group, "title", f"{sent} from the opener, {received} back")


def _legend(svg: ElementTree.Element, y: float, footer: str) -> None:
    x = float(MARGIN)
    for color, filled, text in (
        (CONTAINER, False, "a container listens"),
        (GUEST, True, "declared for a guest"),
        (GUEST, False, "learned from its answer"),
        (AMBER, False, "shadows, or is shadowed"),
    ):
        _add(svg, "rect", x=x, y=y - 10, width=26, height=14, rx=7, fill=color if filled else TINT[color], stroke=color)
        _add(svg, "text", text, x=x + 33, y=y + 1.5, font_size=11.5, fill=FAINT)
        x += 50 + 6.6 * len(text)
    _add(svg, "text", footer, x=MARGIN, y=y + 25, font_size=11.5, fill=FAINT)
