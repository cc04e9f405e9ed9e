"""The errors a user sees. Owns the exit codes; prints nothing.

Every failure that can be blamed on input, machine or guest is raised as an `UklaunchError`: one line that
says what and why, a hint that says what to do. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What `uklaunch` exits with when it is not the guest's own code (documented in README.md)."""

    OK = 0
    FAILURE = 1  # a question was answered "no": doctor found a fault, demo failed
    USAGE = 2  # argparse's own code for bad arguments
    OURS = 125  # uklaunch, the VMM or the machine failed
    NOT_RUNNABLE = 126  # the image or command exists and cannot be run
    NOT_FOUND = 127  # the image or command does not exist


class UklaunchError(Exception):
    """A failure to show to a person.

    `message` says what and why, in one line; `hint` says what to do; `detail` is for `-v`.
    """

    exit_code = ExitCode.OURS

    def __init__(self, message: str, hint: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.detail = detail


class UsageError(UklaunchError):
    """Bad input: an argument, a manifest, a name that is taken or unknown."""

    exit_code = ExitCode.USAGE


class ImageError(UklaunchError):
    """The image exists and is not one that we can boot."""

    exit_code = ExitCode.NOT_RUNNABLE


class ImageNotFound(UklaunchError):
    exit_code = ExitCode.NOT_FOUND


def first_error(group: BaseExceptionGroup[BaseException]) -> UklaunchError | None:
    """The error to show out of what several tasks raised together; None if one of them is a bug of ours.

    The only place that unwraps exception groups.
    """
    errors, bugs = group.split(UklaunchError)
    if errors is None or bugs is not None:
        return None
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UklaunchError)
    return error
