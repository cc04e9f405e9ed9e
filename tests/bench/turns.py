"""Alternatives take turns, round by round, and each is compared with its base in the same round: machines are noisy,
ratios within a round less so. Every other round goes backwards, so that what drifts favours nobody.

A row of results is {"name": ..., METRIC: {"median": ..., "q1": ..., "q3": ..., "ratio": {"median": ..., ...}}, ...}, or
{"name": ..., "unmeasurable": why}. q1 and q3 are the quartiles: half of all rounds lie between them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .traffic import Unmeasurable

Sample = dict[str, float]
Row = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def take_turns(alternatives: Mapping[str, Callable[[], Sample]], base: Callable[[str], str], rounds: int) -> list[Row]:
    """`base`: from an alternative's name to the one that it is compared with. What cannot be measured once is not tried
    again; raises Unmeasurable if that is a base."""
    samples: dict[str, list[Sample]] = {name: [] for name in alternatives}
    failed: dict[str, str] = {}
    order = list(alternatives)
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            if name in failed:
                continue
            try:
                samples[name].append(alternatives[name]())
            except Unmeasurable as exc:
                if name in {base(other) for other in alternatives}:
                    raise Unmeasurable(f"{name}: {exc}") from exc
                failed[name] = str(exc)
    return [
        {"name": name, "unmeasurable": failed[name]} if name in failed else _row(name, taken, samples[base(name)])
        for name, taken in samples.items()
    ]


def _row(name: str, taken: list[Sample], base: list[Sample]) -> Row:
    row: Row = {"name": name}
    for metric in taken[0]:
        ratios = [mine[metric] / its[metric] for mine, its in zip(taken, base, strict=True)]
        row[metric] = {**spread([sample[metric] for sample in taken]), "ratio": spread(ratios)}
    return row


def verdict(ratio: Mapping[str, float], goal: float, *, at_least: bool) -> str:
    """Whether the median of a ratio reaches a goal, to the third decimal. Where it does not but a quarter of the
    rounds do, the noise is larger than the difference, and the verdict says so."""
    sign = 1 if at_least else -1
    reached = {key: sign * round(value, 3) >= sign * goal for key, value in ratio.items()}
    if reached["median"]:
        return "meets the goal"
    return "at the goal, within the noise" if reached["q3" if at_least else "q1"] else "MISSES the goal"
