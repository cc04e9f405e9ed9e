"""Make a named step fail, so that what happens then is tested and not hoped for: $UKLAUNCH_FAULT.

    UKLAUNCH_FAULT=bridge:raise uklaunch run ...            an error, as soon as the bridge is made
    UKLAUNCH_FAULT=qmp:SIGKILL uklaunch run ...             the supervisor dies when it has met QEMU
    UKLAUNCH_FAULT=resumed:SIGTERM,stop:ENOSPC ...          stopped as soon as it runs; the disk is full by then

The steps are those of `timeline.mark`. An action is `raise`, an errno's name or a signal's; each strikes once, the
first time that its step is reached. SIGSTOP holds everything still for whoever wants to break something else.
"""

from __future__ import annotations

import errno
import os
import signal

from .errors import UklaunchError, UsageError

VARIABLE = "UKLAUNCH_FAULT"


def parse(text: str) -> dict[str, str]:
    """Step -> action. Raises UsageError."""
    faults = {}
    for item in text.split(","):
        step, _, action = item.partition(":")
        if not step or not (action == "raise" or hasattr(errno, action) or action in signal.Signals.__members__):
            raise UsageError(f"{VARIABLE}: {item!r} is no fault", "write STEP:raise, STEP:ENOSPC or STEP:SIGKILL")
        faults[step] = action
    return faults


def strike(step: str, faults: dict[str, str]) -> None:
    """Do what is to happen at this step, if anything. Raises UklaunchError, OSError, or what the signal brings."""
    action = faults.pop(step, None)
    if action is None:
        return
    if action == "raise":
        raise UklaunchError(f"made to fail at step {step!r}", f"unset {VARIABLE}")
    if action in signal.Signals.__members__:
        signal.raise_signal(signal.Signals[action])  # of this very thread: it does not run on
        return
    number = getattr(errno, action)
    raise OSError(number, os.strerror(number))
