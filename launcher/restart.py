"""Restart policies: whether a guest that has ended is to run again, and when. Decides; does nothing.

A guest that fails again and again is started ever more seldom: 0.5 s, 1 s, 2 s ... up to 30 s. One that was ready for
10 s has proven itself: its next failure counts as the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .errors import UsageError

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
PROVEN_S = 10.0


class RestartMode(StrEnum):
    NO = "no"
    ON_FAILURE = "on-failure"  # when its exit code is not 0
    ALWAYS = "always"  # however it ended, unless it was asked to


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    mode: RestartMode = RestartMode.NO
    limit: int | None = None  # so many restarts in a row, at most

    @classmethod
    def parse(cls, text: str) -> RestartPolicy:
        """`no`, `on-failure`, `on-failure:5`, `always`. Raises UsageError."""
        mode, colon, limit = text.partition(":")
        if mode not in set(RestartMode) or (colon and mode != RestartMode.ON_FAILURE):
            raise UsageError(f"restart policy {text!r} is not known", "it is one of no, on-failure[:N], always")
        if colon and not (limit.isascii() and limit.isdigit() and 1 <= int(limit) < 1 << 31):
            raise UsageError(f"restart policy {text!r}: {limit!r} is not a number from 1 up", "such as on-failure:5")
        return cls(RestartMode(mode), int(limit) if colon else None)

    def __str__(self) -> str:
        return self.mode if self.limit is None else f"{self.mode}:{self.limit}"


@dataclass(slots=True)
class Restarts:
    """How often a guest has been started again under a policy, and how long it waits for the next time."""

    policy: RestartPolicy
    in_a_row: int = 0

    def delay_s(self, exit_code: int, ready_s: float) -> float | None:
        """How long to wait before the guest that has ended so runs again, after it was ready for `ready_s`; None: it
        does not."""
        if self.policy.mode is RestartMode.NO or (self.policy.mode is RestartMode.ON_FAILURE and exit_code == 0):
            return None
        if ready_s >= PROVEN_S:
            self.in_a_row = 0
        if self.policy.limit is not None and self.in_a_row >= self.policy.limit:
            return None
        delay_s = FIRST_DELAY_S
        for _ in range(self.in_a_row):  # not 2 ** n, which a guest that fails for years makes too big for a float
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
            if delay_s == LONGEST_DELAY_S:
                break
        self.in_a_row += 1
        return delay_s
