"""Faults on purpose: what is understood, that each strikes once, and that they cost nothing when nobody asks."""

from __future__ import annotations

import timeit

import pytest

from launcher import fault, timeline
from launcher.errors import UklaunchError, UsageError


@pytest.mark.parametrize("text", ["", "bridge", "bridge:", ":raise", "bridge:sulk", "bridge:raise,", "bridge:EFOO"])
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no fault"):
        fault.parse(text)


def test_each_strikes_at_its_step_and_once() -> None:
    faults = fault.parse("bridge:raise,tap:ENOSPC")
    fault.strike("qmp", faults)
    with pytest.raises(UklaunchError, match="'bridge'"):
        fault.strike("bridge", faults)
    fault.strike("bridge", faults)
    with pytest.raises(OSError, match="No space left") as raised:
        fault.strike("tap", faults)
    assert raised.value.errno == fault.errno.ENOSPC


def test_a_step_costs_nothing_unless_asked() -> None:
    assert timeline._fault is None
    best_s = min(timeit.repeat(lambda: timeline.mark("bridge"), number=1000, repeat=5)) / 1000
    assert best_s < 1e-6
