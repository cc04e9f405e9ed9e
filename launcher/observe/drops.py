"""What the router drops, packet by packet, as it happens: all of it, or as much as a person or a log can take."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from router.errors import RouterError
from router.model import Drop
from router.trace import format_source, format_target

from .. import state

if TYPE_CHECKING:
    import router

_WAIT_S = 1.0
_WIDTHS = (12, 18, 12, 5, 30)


def follow(record: state.PodRecord, watch: router.DropWatch, per_second: int) -> Iterator[Drop | int]:
    """Drops until the pod is removed, at most `per_second` of them; then, once that second is over, how many more there
    were. Raises RouterError when somebody else begins to watch."""
    began, shown, more = time.monotonic(), 0, 0
    while True:
        select.select([watch], [], [], _WAIT_S)
        if time.monotonic() - began >= 1:
            if more:
                yield more
            began, shown, more = time.monotonic(), 0, 0
        try:
            drops = watch.read()
        except RouterError:
            current = state.read_pod(record.name)
            if current is None or current.id != record.id:
                return
            raise
        for drop in drops:
            if shown < per_second:
                shown += 1
                yield drop
            else:
                more += 1


def _line(cells: Sequence[str], last: str) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)), last])


def heading() -> str:
    return _line(("TIME", "REASON", "FROM", "PROTO", "SOURCE"), "TARGET")


def line(drop: Drop, names: Mapping[int, str]) -> str:
    now = time.time()
    clock = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 1000 % 1000):03}"
    if drop.guest is not None:
        who = names.get(drop.guest, f"guest {drop.guest}")
    else:
        who = "container" if drop.on_loopback else "outside"
    protocol = drop.protocol or f"{drop.ethertype:#06x}"
    return _line([clock, str(drop.reason), who, protocol, format_source(drop)], format_target(drop))
