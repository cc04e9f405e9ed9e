"""Does it stay flat? Guests in a pod, and flows that the router keeps already, against a new conversation's throughput
and latency, and against what it takes to open one. The base is a pod with one guest and no other flow.

`connect` is a connection to a port whose server is known. `ask` is the first to a port that the router knows nothing
of: it asks all guests, and all but one refuse, so it cannot be flat; how steep it is, is the question. clone-to-all is
measured beside it, without other flows: that is what asking everybody always would be.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace

from router.model import FlowState

from ..net.conftest import PlayedPod, played_pod
from . import baselines
from .topology import lab
from .traffic import OPENING_PORTS, Way, background, latency_us, on_one_core, opening_us, throughput_gbps
from .turns import Row, Sample, take_turns, verdict

GUESTS = (1, 8, 64)
FLOWS = (1, 1000, 10_000)
BASE = "1 guest, nothing else"
_unknown_ports = itertools.cycle(range(10000, baselines.PORTS.start, OPENING_PORTS))


def point(guests: int, flows: int) -> str:
    return f"{guests} guest{'s' if guests > 1 else ''}, {flows} flow{'s' if flows > 1 else ''}"


def _conversation(make: Callable[[], Way]) -> Sample:
    gbps = throughput_gbps(make(), 1)
    p50, _ = latency_us(make())
    return {"gbps": gbps, "p50": p50}


def _routed(make: Callable[[], Way]) -> Callable[[], Sample]:
    def take() -> Sample:
        sample = _conversation(make)
        sample["ask"], sample["connect"] = opening_us(replace(make(), port=next(_unknown_ports)))
        return sample

    return take


def scale(rounds: int) -> dict[str, list[Row]]:
    with on_one_core():
        return {"router": _router(rounds), "clone-to-all": _clones(rounds)}


def _way(pod: PlayedPod) -> Callable[[], Way]:
    return baselines.way(pod.netns, pod.guests[-1].netns, "0.0.0.0", "127.0.0.1")


def _router(rounds: int) -> list[Row]:
    """A row per point, with its `guests` and `flows`; `kept`: the flows that the table holds in the end."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(played_pod(1, name="bench-base"))
        pods = {guests: stack.enter_context(played_pod(guests, name=f"bench-{guests}")) for guests in GUESTS}
        opened = 0
        for flows in FLOWS:
            for pod in pods.values():
                stack.enter_context(background(_way(pod)(), flows - opened))
            opened = flows
            alternatives = {BASE: _routed(_way(base))}
            alternatives |= {point(guests, flows): _routed(_way(pod)) for guests, pod in pods.items()}
            taken = take_turns(alternatives, lambda _: BASE, rounds)
            for (guests, pod), row in zip(pods.items(), taken[1:], strict=True):
                kept = sum(flow.state is not FlowState.CLOSED for flow in pod.table.flows(pod.record.id))
                rows.append({**row, "guests": guests, "flows": flows, "kept": kept})
    return rows


def _clones(rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(lab("plain", 1))
        bridge = baselines.way(plain.netns, plain.guests[0], baselines.GUEST4, baselines.GUEST4)
        alternatives = {"bridge": lambda: _conversation(bridge)}
        for guests in GUESTS:
            made = stack.enter_context(baselines.clone_to_all(guests))
            make = baselines.way(made.netns, made.guests[0], "0.0.0.0", "127.0.0.1")
            alternatives[point(guests, 1)] = lambda make=make: _conversation(make)
        rows = take_turns(alternatives, lambda _: "bridge", rounds)
        return [{**row, "guests": guests, "flows": 1} for guests, row in zip(GUESTS, rows[1:], strict=True)]


def show(results: dict[str, list[Row]]) -> None:
    print(f"\n{'router: ratios to one guest alone':<36}{'Gb/s':>8}{'ratio':>7}{'p50 us':>9}{'ratio':>7}"
          f"{'connect':>9}{'ratio':>7}{'ask us':>9}")  # fmt: skip
    for row in results["router"]:
        if "unmeasurable" in row:
            print(f"{row['name']:<36}  {row['unmeasurable']}")
            continue
        line = f"{row['name']:<36}"
        for metric, width in (("gbps", 8), ("p50", 9), ("connect", 9)):
            line += f"{row[metric]['median']:>{width}.2f}{row[metric]['ratio']['median']:>7.2f}"
        line += f"{row['ask']['median']:>9.0f}"
        # Flat: no more than the noise of one machine away, a twentieth.
        line += f"  throughput {verdict(row['gbps']['ratio'], 0.95, at_least=True)}, "
        line += f"latency {verdict(row['p50']['ratio'], 1.05, at_least=False)}"
        print(line)
    print(f"\n{'clone-to-all: ratios to the bridge':<36}{'Gb/s':>8}{'ratio':>7}{'p50 us':>9}{'ratio':>7}")
    for row in results["clone-to-all"]:
        if "unmeasurable" in row:
            print(f"{row['name']:<36}  {row['unmeasurable']}")
            continue
        line = f"{row['name']:<36}"
        for metric, width in (("gbps", 8), ("p50", 9)):
            line += f"{row[metric]['median']:>{width}.2f}{row[metric]['ratio']['median']:>7.2f}"
        print(line)
