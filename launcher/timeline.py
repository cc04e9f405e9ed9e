"""The steps of a guest's life, by name: from its launch to the end of its pod.

$UKLAUNCH_TIMELINE: a file that gets a line `name monotonic_ns` when a step has been reached, for `make bench`.
CLOCK_MONOTONIC is one clock for all processes, so the lines of the command and of its supervisor can be compared.
$UKLAUNCH_FAULT: steps that are to fail, see fault.py.
"""

from __future__ import annotations

import os
import time

_file = os.environ.get("UKLAUNCH_TIMELINE")
_fault = os.environ.get("UKLAUNCH_FAULT")
_faults: dict[str, str] = {}  # those that have not yet struck


def mark(name: str) -> None:
    """Note that a step has been reached; costs nothing unless it is asked for."""
    if _file is not None:
        with open(_file, "a") as out:  # noqa: PTH123
            out.write(f"{name} {time.monotonic_ns()}\n")
    if _fault is not None:
        _strike(name)


def _strike(name: str) -> None:
    global _fault
    from . import fault

    if _fault:
        text, _fault = _fault, ""
        _faults.update(fault.parse(text))
    fault.strike(name, _faults)
