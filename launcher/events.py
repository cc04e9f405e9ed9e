"""What happened to pods and guests, one JSON object a line: written by whoever does it, read by `uklaunch events`.

    events.log          appended to under its own lock (see state.lock), which every line is written whole under
    events.log.1        the one before, when that had grown to LIMIT_BYTES; the first line of the next has the counts
                        of all events until then

An event is news, never the truth: that is in the records and the kernel. So one that cannot be written is let go.

Sources: inotify(7).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from . import state
from .errors import UklaunchError

LIMIT_BYTES = 1 << 20
KINDS = ("created", "starting", "ready", "healthy", "unhealthy", "restarting", "taken over", "stopped", "removed")
TIME_LIMIT_S = 1 << 36  # in the year 4147: localtime(3) takes no more than some 2^55
_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x80, 0x100


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`what`: one of KINDS. `guest` None: the pod's."""

    time: float  # seconds since the epoch
    what: str
    pod: str
    guest: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)  # of `stopped`: exit_code, reason; of `restarting`: delay_s


def line(event: Event) -> str:
    """For a person."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    who = event.pod if event.guest is None else f"{event.pod}/{event.guest}"
    detail = " ".join(f"{key}={json.dumps(value)}" for key, value in event.detail.items())
    return f"{when}  {'pod' if event.guest is None else 'guest':5}  {who:24}  {event.what:10}  {detail}".rstrip()


def path() -> Path:
    return state.root() / "events.log"


def note(what: str, pod: str, guest: str | None = None, **detail: Any) -> None:
    """Put it down that this has happened, now."""
    event = {"time": round(time.time(), 3), "what": what, "pod": pod, "guest": guest, "detail": detail}
    line = json.dumps(event).encode() + b"\n"
    with contextlib.suppress(OSError, UklaunchError), state.lock(path()) as fd:
        size = os.fstat(fd).st_size
        written = 0
        try:
            written = os.pwrite(fd, line, size)
        finally:
            if written < len(line):  # the disk is full
                os.ftruncate(fd, size)
        if size + written > LIMIT_BYTES:
            _begin_anew()


def _begin_anew() -> None:
    """Under the file's lock: who waits for it will see that it has been set aside."""
    head = json.dumps({"counts": counts()}).encode() + b"\n"
    new = path().with_suffix(".new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_bytes(head)
    _older().unlink(missing_ok=True)
    os.link(path(), _older())
    new.replace(path())  # in one step: there is always a file to lock


def counts() -> dict[str, int]:
    """How often each kind of event has happened, since the state directory was made."""
    found = Counter[str]()
    with contextlib.suppress(FileNotFoundError):
        head, *_ = lines = path().read_bytes().splitlines() or [b""]
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found.update(json.loads(head)["counts"])
        found.update(event.what for event in _parse(b"\n".join(lines)))
    return dict(found)


def _older() -> Path:
    return path().with_suffix(".log.1")


def _parse(lines: bytes) -> Iterator[Event]:
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # of another version, or damaged
            event = state.structure(Event, json.loads(line))
            if 0 <= event.time < TIME_LIMIT_S:
                yield event


def read() -> Iterator[Event]:
    """All that is known, the oldest first."""
    for file in (_older(), path()):
        with contextlib.suppress(FileNotFoundError):
            yield from _parse(file.read_bytes())


def follow() -> Iterator[Event]:
    """All that is known, and then what happens, as it does; never ends. Blocks.

    Who comes back to it so seldom that the file was set aside twice in between misses what was in it.
    """
    with watching() as fd, contextlib.ExitStack() as stack:
        os.set_blocking(fd, True)
        current = stack.enter_context(contextlib.ExitStack())
        log = _open(current)
        with contextlib.suppress(FileNotFoundError), _older().open("rb") as older:
            if log is None or not os.path.sameopenfile(older.fileno(), log.fileno()):
                yield from _parse(older.read())
        while True:
            # Asked before it is read: what is written after the file was set aside is written to the next.
            aside = log is not None and _set_aside(log.fileno())
            if log is not None:
                yield from _parse(log.read())  # lines are written whole
            if aside:
                current.close()
            if aside or log is None:
                log = _open(current)
                if log is not None:
                    continue  # what was said of it may have been taken already: read before waiting
            os.read(fd, 1 << 16)


def _open(stack: contextlib.ExitStack) -> BinaryIO | None:
    with contextlib.suppress(FileNotFoundError):
        return stack.enter_context(path().open("rb"))
    return None


def _set_aside(fd: int) -> bool:
    try:
        return not os.path.samestat(os.fstat(fd), path().stat())
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def watching() -> Iterator[int]:
    """A descriptor, non-blocking, that is readable when something may have happened since it was last read."""
    import ctypes

    state.root().mkdir(mode=0o755, parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise UklaunchError(f"cannot watch {state.root()}: {os.strerror(ctypes.get_errno())}", "see inotify(7)")
    try:
        mask = _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE
        if libc.inotify_add_watch(fd, os.fsencode(state.root()), mask) < 0:
            raise UklaunchError(f"cannot watch {state.root()}: {os.strerror(ctypes.get_errno())}", "see inotify(7)")
        yield fd
    finally:
        os.close(fd)
