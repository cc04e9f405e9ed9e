"""What the router costs a conversation: throughput and latency, against the alternatives, with one guest. And what it
costs those who do not use it: two processes that talk over the pod's plain loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from ..net.conftest import played_pod
from . import baselines
from .topology import lab
from .traffic import Way, latency_us, on_one_core, throughput_gbps
from .turns import Row, Sample, take_turns, verdict


def measure(make: Callable[[], Way]) -> Callable[[], Sample]:
    def take() -> Sample:
        gbps = throughput_gbps(make(), 1)
        p50, p99 = latency_us(make())
        return {"gbps": gbps, "p50": p50, "p99": p99}

    return take


def compare(rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack, on_one_core():
        alternatives = {name: measure(make) for name, make in baselines.ways(stack).items()}
        return take_turns(alternatives, baselines.bridge_of, rounds)


def loopback(rounds: int) -> list[Row]:
    """Two processes on a loopback with the router, a guest in the pod, and on one without."""

    def itself(netns: Path) -> Callable[[], Sample]:
        return measure(baselines.way(netns, netns, "127.0.0.1", "127.0.0.1"))

    with played_pod(1, name="bench-lo") as routed, lab("lo", 1) as plain, on_one_core():
        pair = {"without the router": itself(plain.netns), "with the router": itself(routed.netns)}
        return take_turns(pair, lambda _: "without the router", rounds)


def show(rows: list[Row]) -> None:
    print(f"\n{'one guest, one core':<36}{'Gb/s':>8}{'ratio':>7}{'p50 us':>9}{'ratio':>7}{'p99 us':>9}")
    for row in rows:
        if "unmeasurable" in row:
            print(f"{row['name']:<36}  {row['unmeasurable']}")
            continue
        gbps, p50 = row["gbps"], row["p50"]
        line = f"{row['name']:<36}{gbps['median']:>8.2f}{gbps['ratio']['median']:>7.2f}"
        line += f"{p50['median']:>9.2f}{p50['ratio']['median']:>7.2f}{row['p99']['median']:>9.1f}"
        if row["name"].startswith("router"):
            line += f"  throughput {verdict(gbps['ratio'], 1.0, at_least=True)}, "
            line += f"latency {verdict(p50['ratio'], 1.0, at_least=False)}"
        print(line)


def show_loopback(rows: list[Row]) -> None:
    ratio = {metric: rows[1][metric]["ratio"] for metric in ("gbps", "p50")}
    print(f"\nplain loopback with the router / without (goal: 2 %)\n"
          f"  throughput {ratio['gbps']['median']:.3f}  {verdict(ratio['gbps'], 0.98, at_least=True)}\n"
          f"  p50        {ratio['p50']['median']:.3f}  {verdict(ratio['p50'], 1.02, at_least=False)}")  # fmt: skip
