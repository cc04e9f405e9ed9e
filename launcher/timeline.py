"""When each step of a launch was reached, for `make bench`: lines of `name monotonic_ns` in $UKLAUNCH_TIMELINE.

CLOCK_MONOTONIC is one clock for all processes, so the lines of the command and of its supervisor can be compared.
"""

from __future__ import annotations

import os
import time

_file = os.environ.get("UKLAUNCH_TIMELINE")


def mark(name: str) -> None:
    """Note that a step has been reached; costs nothing unless it is asked for."""
    if _file is not None:
        with open(_file, "a") as out:  # noqa: PTH123
            out.write(f"{name} {time.monotonic_ns()}\n")
