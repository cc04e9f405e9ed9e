"""The errors a user sees. Owns the exit codes; prints nothing.

Every failure that can be blamed on input, machine or guest is raised as an `UklaunchError`: one line that
says what and why, a hint that says what to do. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """What `uklaunch` exits with when it is not the guest's own code (documented in README.md)."""

    OK = 0
    FAILURE = 1  # a question was answered "no": doctor found a fault, demo failed
    USAGE = 2  # argparse's own code for bad arguments
    OURS = 125  # uklaunch, the VMM or the machine failed
    NOT_RUNNABLE = 126  # the image or command exists and cannot be run
    NOT_FOUND = 127  # the image or command does not exist


def printable(text: str) -> str:
    """As one line that a terminal only shows: what names, files and programs say may have its commands in it."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class UklaunchError(Exception):
    """A failure to show to a person.

    `message` says what and why, in one line; `hint` says what to do; `detail` is for `-v`. The first two are made
    `printable`.
    """

    exit_code = ExitCode.OURS

    def __init__(self, message: str, hint: str = "", detail: str = "") -> None:
        self.message, self.hint = printable(message), printable(hint)
        super().__init__(self.message)
        self.detail = detail


class UsageError(UklaunchError):
    """Bad input: an argument, a manifest, a name that is taken or unknown."""

    exit_code = ExitCode.USAGE


class ImageError(UklaunchError):
    """The image exists and is not one that we can boot."""

    exit_code = ExitCode.NOT_RUNNABLE


class ImageNotFound(UklaunchError):
    exit_code = ExitCode.NOT_FOUND


# What any system call can meet, wherever it is made: errno -> what to do.
EXHAUSTED = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EMFILE: "allow more open files: ulimit -n, or LimitNOFILE= of its unit",
    errno.ENFILE: "allow more open files: sysctl fs.file-max",
    errno.ENOMEM: "free some memory, or raise its limit",
}


def exhausted(exc: BaseException) -> UklaunchError | None:
    """The error to show if this is the machine's, or a limit's, having no more to give."""
    if isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and "can't start new thread" in exc.args):
        exc = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if not isinstance(exc, OSError) or exc.errno not in EXHAUSTED:
        return None
    where = f": {exc.filename}" if exc.filename is not None else ""
    detail = "".join(traceback.format_exception(exc))
    return UklaunchError(f"{os.strerror(exc.errno)}{where}", EXHAUSTED[exc.errno], detail)


def first_error(raised: BaseException) -> UklaunchError | None:
    """The error to show out of what several tasks raised together, or one; None if one of them is a bug of ours.

    What follows from running out of something is no bug. The only place that unwraps exception groups.
    """
    leaves = list(_leaves(raised))
    for leaf in leaves:
        if (error := exhausted(leaf)) is not None:
            return error
    errors = [leaf for leaf in leaves if isinstance(leaf, UklaunchError)]
    return errors[0] if errors and len(errors) == len(leaves) else None


def try_all(*steps: Callable[[], object]) -> None:
    """Each of the steps in turn, also when one before it has failed. Then raises what failed first, if anything did."""
    failure: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as exc:
            failure = failure or exc
    if failure is not None:
        raise failure


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for part in exc.exceptions:
            yield from _leaves(part)
    else:
        yield exc
