"""A pod at one moment: what has passed its links, its flows, its counters, what its guests' VMMs use.

Everything is a total since the thing was made. Two samples make rates: see `stats`.
Sources: proc(5), /proc/net/dev and /proc/PID/stat.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import router
from router.model import FlowState

from .. import net, pod, state
from ..errors import UklaunchError

T = TypeVar("T")

LIVE_STATES = frozenset({FlowState.ASKING, FlowState.OPENING, FlowState.OPEN, FlowState.CLOSING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Packets and bytes (frames, with their headers) into and out of a guest, or the pod's own stack."""

    packets_in: float = 0
    bytes_in: float = 0
    packets_out: float = 0
    bytes_out: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            packets_in=self.packets_in + other.packets_in,
            bytes_in=self.bytes_in + other.bytes_in,
            packets_out=self.packets_out + other.packets_out,
            bytes_out=self.bytes_out + other.bytes_out,
        )

    def turned(self) -> Traffic:
        """The same, seen from the link's other end."""
        return Traffic(
            packets_in=self.packets_out,
            bytes_in=self.bytes_out,
            packets_out=self.packets_in,
            bytes_out=self.bytes_in,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a guest's VMM uses of the host: CPU time in seconds, resident memory in bytes."""

    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSample:
    """A guest. `record` and `process` are None if its supervisor or VMM is no more."""

    index: int
    tap: str
    traffic: Traffic
    flows: int  # live ones, at either end
    record: state.GuestRecord | None
    process: Process | None

    @property
    def name(self) -> str:
        return self.record.name if self.record else f"guest {self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSample:
    """`links` are all but the guests' TAPs: `lo` is what containers say to each other."""

    record: state.PodRecord
    at_s: float  # monotonic
    guests: tuple[GuestSample, ...]
    links: dict[str, Traffic]
    flows: tuple[router.Flow, ...]
    counters: dict[router.Reason, int]

    @property
    def names(self) -> dict[int, str]:
        return {guest.index: guest.name for guest in self.guests}

    @property
    def drops(self) -> int:
        return sum(count for reason, count in self.counters.items() if reason not in (router.REDIRECTED, router.PASSED))


def is_live(flow: router.Flow) -> bool:
    return flow.state in LIVE_STATES


def in_pod(record: state.PodRecord, function: Callable[[], T]) -> T:
    """Run the function in a thread in the pod's namespace. Raises UklaunchError if that is gone."""
    try:
        return net.in_netns(Path(record.netns), function)
    except OSError as exc:
        raise UklaunchError(f"cannot enter {record.netns}: {exc.strerror}", "clean up: uklaunch gc") from exc


def sample(record: state.PodRecord, table: router.Router) -> PodSample:
    """Raises UklaunchError if the pod's namespace is gone."""
    links = in_pod(record, _read_links)
    flows = tuple(table.flows(record.id))
    live = Counter(guest for flow in flows if is_live(flow) for guest in {flow.opener.guest, flow.server.guest})
    running = {guest.index: guest for guest in pod.running_guests(record.name)}
    guests = []
    for row in table.guests(record.id):
        tap, traffic = links.pop(row.ifindex, ("", Traffic()))
        guest = running.get(row.index)
        guests.append(
            GuestSample(
                index=row.index,
                tap=tap,
                traffic=traffic.turned(),
                flows=live[row.index],
                record=guest,
                process=read_process(guest) if guest else None,
            )
        )
    links.pop(record.bridge, None)  # what passes it has passed a TAP
    return PodSample(
        record=record,
        at_s=time.monotonic(),
        guests=tuple(guests),
        links=dict(links.values()),
        flows=flows,
        counters=table.counters(record.id),
    )


def sample_all(records: Sequence[state.PodRecord], table: router.Router) -> Iterator[PodSample]:
    """Those of the pods that can be sampled; the others are just coming or going."""
    for record in records:
        if record.id:
            try:
                yield sample(record, table)
            except UklaunchError:
                continue


def _read_links() -> dict[int, tuple[str, Traffic]]:
    """Of the calling thread's namespace: interface index -> name, and traffic as its stack sees it."""
    traffic = {}
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        count = [int(number) for number in numbers.split()]
        traffic[name.strip()] = Traffic(
            bytes_in=count[0], packets_in=count[1], bytes_out=count[8], packets_out=count[9]
        )
    return {index: (name, traffic.get(name, Traffic())) for index, name in socket.if_nameindex()}


def read_process(guest: state.GuestRecord) -> Process | None:
    """Of the guest's VMM; None if it does not run."""
    if not guest.vmm_pid or not state.vmm_runs(guest):
        return None
    try:
        after_name = Path(f"/proc/{guest.vmm_pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    user, system, pages = int(after_name[11]), int(after_name[12]), int(after_name[21])
    return Process(
        cpu_s=(user + system) / os.sysconf("SC_CLK_TCK"),
        memory_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
    )
