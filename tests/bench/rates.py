"""How often: connections opened and closed, small datagrams, one after the other on one core. And at what price: CPU
time for a gigabit, sender and receiver on a core each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from . import baselines
from .traffic import (
    Unmeasurable,
    Way,
    connections_per_second,
    cpu_ms_per_gbit,
    datagrams_per_second,
    on_one_core,
)
from .turns import Row, Sample, take_turns, verdict

NO_UDP = ("clone-to-all", "proxy", "tc-mirred, localhost")  # TCP only, as they are built here
METRICS = {
    "connections": ("connections/s", True),
    "datagrams": ("datagrams/s", True),
    "cpu": ("CPU ms/Gb", False),
}


def _connections(make: Callable[[], Way]) -> Sample:
    with on_one_core():
        return {"connections": connections_per_second(make())}


def _datagrams(make: Callable[[], Way], name: str) -> Sample:
    if name.startswith(NO_UDP):
        raise Unmeasurable("carries TCP only")
    with on_one_core():
        return {"datagrams": datagrams_per_second(make(), 1)}


def _cpu(make: Callable[[], Way], seconds: float) -> Sample:
    return {"cpu": cpu_ms_per_gbit(make(), seconds)}


def rates(rounds: int, seconds: float) -> dict[str, list[Row]]:
    """Rows by metric. `seconds`: of the measurement of CPU time, which the kernel counts in hundredths."""
    with contextlib.ExitStack() as stack:
        ways = baselines.ways(stack)
        takes: dict[str, Callable[[Callable[[], Way], str], Sample]] = {
            "connections": lambda make, _: _connections(make),
            "datagrams": _datagrams,
            "cpu": lambda make, _: _cpu(make, seconds),
        }
        return {
            metric: take_turns(
                {name: lambda take=take, make=make, name=name: take(make, name) for name, make in ways.items()},
                baselines.bridge_of,
                rounds,
            )
            for metric, take in takes.items()
        }


def show(results: dict[str, list[Row]]) -> None:
    for metric, (unit, at_least) in METRICS.items():
        print(f"\n{unit:<36}{'':>10}{'ratio':>7}")
        for row in results[metric]:
            if "unmeasurable" in row:
                print(f"{row['name']:<36}  {row['unmeasurable']}")
                continue
            figure = row[metric]
            line = f"{row['name']:<36}{figure['median']:>10,.4g}{figure['ratio']['median']:>7.2f}"
            if row["name"].startswith("router"):
                line += f"  {verdict(figure['ratio'], 1.0, at_least=at_least)}"
            print(line)
