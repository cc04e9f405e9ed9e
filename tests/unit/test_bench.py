"""How the benchmarks turn samples into rows and verdicts; what they measure is theirs to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ..bench.traffic import Unmeasurable
from ..bench.turns import Sample, spread, take_turns, verdict


def series(*values: float) -> Callable[[], Sample]:
    following: Iterator[float] = iter(values)
    return lambda: {"gbps": next(following)}


def test_ratios_are_those_of_one_round() -> None:
    """A machine that is half as fast in the second round changes the figures, not the ratios."""
    rows = take_turns({"base": series(10, 5, 10), "mine": series(8, 4, 8)}, lambda _: "base", 3)
    assert rows[1]["gbps"]["ratio"] == {"median": 0.8, "q1": 0.8, "q3": 0.8}
    assert rows[1]["gbps"]["median"] == 8


def test_every_other_round_goes_backwards() -> None:
    order: list[str] = []

    def measure(name: str) -> Callable[[], Sample]:
        def take() -> Sample:
            order.append(name)
            return {"p50": 1.0}

        return take

    take_turns({name: measure(name) for name in "abc"}, lambda _: "a", 2)
    assert "".join(order) == "abccba"


def test_what_cannot_be_measured_says_why_and_is_not_tried_again() -> None:
    tries: list[None] = []

    def fail() -> Sample:
        tries.append(None)
        raise Unmeasurable("no such action")

    rows = take_turns({"base": series(1, 1), "mine": fail}, lambda _: "base", 2)
    assert rows[1] == {"name": "mine", "unmeasurable": "no such action"}
    assert len(tries) == 1
    with pytest.raises(Unmeasurable, match="base: no such action"):
        take_turns({"base": fail}, lambda _: "base", 2)


@pytest.mark.parametrize(
    ("values", "at_least", "says"),
    [
        ((1.0, 1.01, 1.02), True, "meets the goal"),
        ((0.9, 0.99, 1.05), True, "at the goal, within the noise"),
        ((0.9, 0.91, 0.92), True, "MISSES the goal"),
        ((0.98, 0.99, 1.0), False, "meets the goal"),
        ((0.94, 1.01, 1.02), False, "at the goal, within the noise"),
        ((1.1, 1.11, 1.12), False, "MISSES the goal"),
    ],
)
def test_verdicts(values: tuple[float, ...], at_least: bool, says: str) -> None:
    assert verdict(spread(values), 1.0, at_least=at_least) == says
