"""How much: traffic, flows, drops, CPU and memory of pods and guests, as totals or as rates between two samples."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

import router
from router.trace import format_bytes

from .. import pod, state
from .sample import PodSample, Traffic, is_live, sample, sample_all

N = TypeVar("N", int, float)


class Kind(StrEnum):
    POD = "pod"  # its guests together
    GUEST = "guest"
    LINK = "link"  # of the pod's own stack: `lo` for containers among themselves, an uplink


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Since it was made, or per second: packets, bytes, drops, CPU seconds (so 1.0 per second is one CPU, busy).

    Flows and memory are those of now. None: not known, or not counted for this kind.
    """

    pod: str
    kind: Kind
    name: str
    traffic: Traffic
    flows: int | None = None
    drops: float | None = None
    cpu_s: float | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None


def totals(now: PodSample) -> list[Usage]:
    """The pod, its guests, its other links."""
    name = now.record.name
    guests = [
        Usage(
            pod=name,
            kind=Kind.GUEST,
            name=guest.name,
            traffic=guest.traffic,
            flows=guest.flows,
            cpu_s=guest.process.cpu_s if guest.process else None,
            memory_bytes=guest.process.memory_bytes if guest.process else None,
            memory_limit_bytes=guest.record.memory_mib << 20 if guest.record else None,
        )
        for guest in now.guests
    ]
    whole = Usage(
        pod=name,
        kind=Kind.POD,
        name="",
        traffic=sum((guest.traffic for guest in guests), Traffic()),
        flows=sum(map(is_live, now.flows)),
        drops=now.drops,
        cpu_s=_sum([guest.cpu_s for guest in guests]),
        memory_bytes=_sum([guest.memory_bytes for guest in guests]),
        memory_limit_bytes=_sum([guest.memory_limit_bytes for guest in guests]),
    )
    links = [Usage(pod=name, kind=Kind.LINK, name=link, traffic=traffic) for link, traffic in now.links.items()]
    return [whole, *guests, *links]


def _sum(numbers: Sequence[N | None]) -> N | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def rates(before: PodSample, after: PodSample) -> list[Usage]:
    """Per second. What was not there before began at nothing."""
    seconds = after.at_s - before.at_s
    old = {(usage.kind, usage.name): usage for usage in totals(before)}
    return [_rate(old.get((usage.kind, usage.name)), usage, seconds) for usage in totals(after)]


def _rate(before: Usage | None, after: Usage, seconds: float) -> Usage:
    def per_second(was: float | None, now: float | None) -> float | None:
        if now is None:
            return None
        was = was or 0
        return (now - was if now >= was else now) / seconds  # less than before: it is another one by the same name

    was, now = before.traffic if before else Traffic(), after.traffic
    return replace(
        after,
        traffic=Traffic(
            packets_in=per_second(was.packets_in, now.packets_in) or 0,
            bytes_in=per_second(was.bytes_in, now.bytes_in) or 0,
            packets_out=per_second(was.packets_out, now.packets_out) or 0,
            bytes_out=per_second(was.bytes_out, now.bytes_out) or 0,
        ),
        drops=per_second(before.drops if before else None, after.drops),
        cpu_s=per_second(before.cpu_s if before else None, after.cpu_s),
    )


def _samples(name: str | None, table: router.Router) -> list[PodSample]:
    if name:
        return [sample(state.get_pod(name), table)]
    return list(sample_all(state.pods(), table))


def usage_once(name: str | None) -> list[Usage]:
    """Totals of the pod, or of all. Raises UsageError if there is no such pod."""
    with pod.open_router() as table:
        return [usage for now in _samples(name, table) for usage in totals(now)]


def usage_rates(name: str | None, interval_s: float) -> Iterator[list[Usage]]:
    """Rates, one list each interval, without end; of one pod, until it is removed.

    Raises UsageError if there is no such pod.
    """
    with pod.open_router() as table:
        before = {now.record.id: now for now in _samples(name, table)}
        while True:
            time.sleep(interval_s)
            records = [record for record in state.pods() if name in (None, record.name)]
            if name and not records:
                return
            after = {now.record.id: now for now in sample_all(records, table)}
            yield [usage for pod_id, now in after.items() if pod_id in before for usage in rates(before[pod_id], now)]
            before = after


# --- for a person ---


def format_scaled(value: float, unit: str) -> str:
    """With a decimal prefix, as rates of bits and packets have them."""
    for prefix in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.0f} {prefix}{unit}" if not prefix or value >= 99.95 else f"{value:.1f} {prefix}{unit}"
        value /= 1000
    return f"{value:.1f} G{unit}"


def _memory(usage: Usage) -> str:
    if usage.memory_bytes is None:
        return "-"
    limit = f" / {format_bytes(usage.memory_limit_bytes)}" if usage.memory_limit_bytes else ""
    return format_bytes(usage.memory_bytes) + limit


def _name(usage: Usage) -> str:
    return {Kind.POD: usage.pod, Kind.GUEST: f"  {usage.name}", Kind.LINK: f"  ({usage.name})"}[usage.kind]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def total_rows(usages: Sequence[Usage]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return (
        ("POD / GUEST", "IN", "OUT", "PACKETS IN", "PACKETS OUT", "FLOWS", "DROPS", "CPU", "MEMORY"),
        [
            (
                _name(usage),
                format_bytes(int(usage.traffic.bytes_in)),
                format_bytes(int(usage.traffic.bytes_out)),
                f"{usage.traffic.packets_in:.0f}",
                f"{usage.traffic.packets_out:.0f}",
                _or_dash(usage.flows, "{}"),
                _or_dash(usage.drops, "{:.0f}"),
                _or_dash(usage.cpu_s, "{:.1f}s"),
                _memory(usage),
            )
            for usage in usages
        ],
    )


def rate_rows(usages: Sequence[Usage]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns of numbers keep their widths from one table to the next."""
    headings = ("POD / GUEST", "IN", "OUT", "PACKETS IN", "PACKETS OUT", "FLOWS", "DROPS/s", "CPU", "MEMORY")
    widths = (0, 10, 10, 11, 11, 5, 7, 5, 0)
    rows = [
        (
            _name(usage),
            format_scaled(usage.traffic.bytes_in * 8, "b/s"),
            format_scaled(usage.traffic.bytes_out * 8, "b/s"),
            format_scaled(usage.traffic.packets_in, "/s"),
            format_scaled(usage.traffic.packets_out, "/s"),
            _or_dash(usage.flows, "{}"),
            _or_dash(usage.drops, "{:.0f}"),
            _or_dash(usage.cpu_s, "{:.0%}"),
            _memory(usage),
        )
        for usage in usages
    ]
    first, *others = [
        tuple(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows)
    ]
    return first, others


def redraw(lines: Sequence[str], size: tuple[int, int]) -> str:
    """What to write to a terminal of (columns, lines) to replace what was drawn before: ECMA-48 CUP, EL and ED."""
    columns, height = size
    shown = lines if len(lines) < height else [*lines[: height - 2], f"... {len(lines) - height + 2} more"]
    return "\x1b[H" + "".join(f"{line[:columns]}\x1b[K\n" for line in shown) + "\x1b[J"
