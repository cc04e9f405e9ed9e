"""A guest's console: its last bytes at hand, and, if it is to be, kept in a file of bounded size or in the journal.

A guest may write as much as it likes: the file is under /run, which is memory, so at `LIMIT_BYTES` it becomes
`console.log.1` and a new one begins. Beside it, `console.times` says when which byte came, for `logs --since`: pairs of
(offset, seconds since the epoch), at most one a second. It is bounded as the console is: when it is full, both go.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .model import LogDriver
from .state import TAG, GuestRecord

LIMIT_BYTES = 4 << 20
TAIL_BYTES = 16 << 10
_TIME = struct.Struct("=Qd")
STEP_S = 1.0


@dataclass
class Console:
    """Nothing is kept but the last bytes."""

    tail: bytes = b""

    async def write(self, data: bytes) -> None:
        """Take what the guest has said; an `OSError` is nobody's but ours."""
        self.tail = (self.tail + data)[-TAIL_BYTES:]

    async def end_line(self) -> None:
        """The guest has ended, perhaps within a line."""

    def flush(self) -> None:
        """Nothing is to be left in this process, which becomes another."""

    def recall(self) -> None:
        """Have its last bytes at hand again, of what a supervisor before us has written, if it is to be had."""


@dataclass
class FileConsole(Console):
    path: Path = Path()
    _fd: int = -1
    _size: int = 0
    _times_fd: int = -1
    _times_size: int = 0
    _timed_at: float = -math.inf  # when the last time was put down

    async def write(self, data: bytes) -> None:
        """Append it. A full disk loses text, not the guest."""
        await super().write(data)
        if max(self._size + len(data), self._times_size) > LIMIT_BYTES:
            self._rotate()
        with contextlib.suppress(OSError):
            now = time.time()
            if abs(now - self._timed_at) >= STEP_S:  # abs: the clock may be set back
                self._times_size += os.write(self._times_fd, _TIME.pack(self._size, now))
                self._timed_at = now
            self._size += os.write(self._fd, data)

    def recall(self) -> None:
        with self.path.open("rb") as file:
            file.seek(max(0, self._size - TAIL_BYTES))
            self.tail = file.read()

    def _rotate(self) -> None:
        self._close()
        for path in (self.path, _times(self.path)):
            path.replace(_older(path))
        self._open()

    def _open(self) -> None:
        self._fd, self._times_fd = (
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            for path in (self.path, _times(self.path))
        )
        self._size, self._times_size = (os.fstat(fd).st_size for fd in (self._fd, self._times_fd))
        self._timed_at = -math.inf

    def _close(self) -> None:
        os.close(self._fd)
        os.close(self._times_fd)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[FileConsole]:
        console = cls(path=path)
        console._open()
        try:
            yield console
        finally:
            console._close()


def open_console(record: GuestRecord) -> contextlib.AbstractContextManager[Console]:
    """Where this guest's console is kept, for the length of a block. Raises OSError."""
    match LogDriver(record.log_driver):
        case LogDriver.FILE:
            return FileConsole.open(record.console_log)
        case LogDriver.JOURNALD:
            from .journal import JournalConsole

            return contextlib.nullcontext(JournalConsole.of(record))
        case LogDriver.NONE:
            return contextlib.nullcontext(Console())


def journal_fields(record: GuestRecord) -> tuple[str, ...]:
    """By which a guest's entries in the journal are found; the last one tells it from others that had its name."""
    guest = {"POD": record.pod, "GUEST": record.name, "STARTED_AT": record.started_at}
    return f"SYSLOG_IDENTIFIER={TAG}", *(f"UKLAUNCH_{key}={value}" for key, value in guest.items())


def _times(log: Path) -> Path:
    return log.with_suffix(".times")


def _older(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".1")


def since(log: Path, moment: float) -> tuple[bytes, int]:
    """What a console said from that moment on (seconds since the epoch), and at most what it said in the second before:
    (what of it is in the file that was set aside, the offset at which it goes on in the present one)."""
    older = _older(log)
    offset = _offset(older, _older(_times(log)), moment)
    with contextlib.suppress(FileNotFoundError), older.open("rb") as file:
        file.seek(offset)
        return file.read(), _offset(log, _times(log), moment)
    return b"", _offset(log, _times(log), moment)


def _offset(file: Path, times: Path, moment: float) -> int:
    try:
        known = times.read_bytes()
        end = file.stat().st_size
    except FileNotFoundError:
        return 0
    for offset, when in _TIME.iter_unpack(known[: len(known) // _TIME.size * _TIME.size]):
        if when + STEP_S > moment:  # what came within a second after it has no time of its own
            return int(offset)
    return end
