"""What happens to a pod's flows, by comparing its flow table with what it was a moment ago.

This samples: a flow that opens and ends between two looks is seen only if its row is still there, as it is for as long
as the router keeps ended flows; states it went through in between are not seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from router.model import Endpoint, Flow
from router.trace import flow_rows

from .. import state
from .sample import is_live

if TYPE_CHECKING:
    import router

_Key = tuple[str, Endpoint, Endpoint, Endpoint]


class What(StrEnum):
    PRESENT = "present"  # it was there when we began to look
    OPENED = "opened"
    CHANGED = "changed"  # its state
    ENDED = "ended"  # closed, refused, or gone from the table


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowEvent:
    at_s: float  # since the epoch
    what: What
    flow: Flow  # for one that is gone: as it was seen last


def key_of(flow: Flow) -> _Key:
    """What tells it from others that live at the same time."""
    return flow.protocol, flow.opener, flow.dialled, flow.server


def compare(before: Sequence[Flow], after: Sequence[Flow], elapsed_s: float) -> list[tuple[What, Flow]]:
    """What must have happened between two looks at the table: what is gone, then the others, oldest first."""
    old = {key_of(flow): flow for flow in before}
    new = {key_of(flow): flow for flow in after}
    ended, begun = [], []
    for key, was in old.items():
        now = new.get(key)
        gone = now is None or now.age_s < elapsed_s  # or it is another one by the same name
        if gone and is_live(was):
            ended.append((What.ENDED, was))
    for key, now in sorted(new.items(), key=lambda item: -item[1].age_s):
        earlier = old.get(key)
        if earlier is None or now.age_s < elapsed_s:
            begun.append((What.OPENED, now))
            if not is_live(now):
                begun.append((What.ENDED, now))
        elif earlier.state != now.state:
            begun.append((What.CHANGED if is_live(now) else What.ENDED, now))
    return ended + begun


def follow(record: state.PodRecord, table: router.Router, interval_s: float) -> Iterator[FlowEvent]:
    """Live flows first, as PRESENT; then without end, until the pod is removed."""
    before, looked = table.flows(record.id), time.monotonic()
    for flow in reversed(before):
        if is_live(flow):
            yield FlowEvent(at_s=time.time(), what=What.PRESENT, flow=flow)
    while True:
        time.sleep(interval_s)
        after, now = table.flows(record.id), time.monotonic()
        for what, flow in compare(before, after, now - looked):
            yield FlowEvent(at_s=time.time(), what=what, flow=flow)
        before, looked = after, now
        current = state.read_pod(record.name)
        if current is None or current.id != record.id:
            return


_WIDTHS = (12, 8, 5, 12, 21, 21, 12, 8, 10, 10, 9)
HEADINGS = ("TIME", "EVENT", "PROTO", "FROM", "SOURCE", "DIALLED", "SERVED BY", "STATE", "SENT", "RECEIVED", "PACKETS")


def _line(cells: Sequence[str], last: str) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)), last])


def heading() -> str:
    return _line(HEADINGS, "AGE")


def event_line(event: FlowEvent, names: Mapping[int, str]) -> str:
    flow = event.flow
    ((*cells, age, _idle),) = flow_rows([flow], names)[1]
    clock = time.strftime("%H:%M:%S", time.localtime(event.at_s)) + f".{int(event.at_s * 1000 % 1000):03}"
    packets = f"{flow.packets_sent}/{flow.packets_received}"
    return _line([clock, event.what, *cells, packets], age)
