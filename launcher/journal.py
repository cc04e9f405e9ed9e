"""A guest's console in the host's journal: an entry for each line, by journald's own protocol.

    MESSAGE=...  PRIORITY=6  SYSLOG_IDENTIFIER=uklaunch  UKLAUNCH_POD=shop  UKLAUNCH_GUEST=web
    UKLAUNCH_STARTED_AT=1795258800.25

The binding is python3-systemd, systemd's own, which Debian has; imported only when it is asked for. It sends by
sendmsg(2), which blocks, and all of Python with it, while journald has no room for more: so we ask for room before, by
a socket of ours that is connected to the same queue. A journald that hangs costs lines, which are counted; never a
guest.

Sources: systemd.journal-fields(7); sd_journal_sendv(3); https://systemd.io/JOURNAL_NATIVE_PROTOCOL/; JOURNAL_STREAM in
systemd.exec(5); unix_dgram_poll() in the kernel's net/unix/af_unix.c.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from .console import Console, journal_fields
from .errors import UklaunchError
from .state import GuestRecord

QUEUE = Path("/run/systemd/journal/socket")
LINE_BYTES = 16 << 10  # of one entry. journald's queue has 512: as much as its senders' buffers hold (8 MiB)
PATIENCE_S = 3.0  # for journald, when it takes nothing; less than a guest's end waits for its console

INFO, WARNING = 6, 4


def check() -> None:
    """Raises UklaunchError where there is no journal to write to."""
    _binding()
    if not QUEUE.is_socket():
        raise UklaunchError(f"no journald listens here ({QUEUE})", "start it, or take --log-driver file")


def _binding() -> Callable[..., None]:
    try:
        from systemd.journal import sendv
    except ImportError as exc:
        raise UklaunchError(
            f"the log driver journald needs systemd's Python binding: {exc}",
            "apt-get install python3-systemd, or take --log-driver file",
        ) from exc
    return sendv  # type: ignore[no-any-return]


def is_ours(fd: int) -> bool:
    """Does what is written there go to the journal anyway?"""
    status = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def pieces(line: bytes) -> Iterator[bytes]:
    """At most LINE_BYTES each, and no character cut in two."""
    while len(line) > LINE_BYTES:
        end = LINE_BYTES
        while end > LINE_BYTES - 4 and line[end] & 0xC0 == 0x80:  # it goes on what came before
            end -= 1
        yield line[:end]
        line = line[end:]
    yield line


@dataclass
class JournalConsole(Console):
    sendv: Callable[..., None] = lambda *fields: None
    fields: tuple[str, ...] = ()
    _rest: bytes = b""  # of a line
    _lost: int = 0

    @classmethod
    def of(cls, record: GuestRecord) -> JournalConsole:
        """Raises UklaunchError."""
        return cls(sendv=_binding(), fields=journal_fields(record))

    async def write(self, data: bytes) -> None:
        await super().write(data)
        *lines, rest = (self._rest + data).split(b"\n")
        *begun, self._rest = pieces(rest)
        with _queue() as queue:
            for line in lines:
                for piece in pieces(line.rstrip(b"\r")):
                    await self._send(queue, piece)
            for piece in begun:
                await self._send(queue, piece)

    async def end_line(self) -> None:
        rest, self._rest = self._rest, b""
        if rest:
            with _queue() as queue:
                await self._send(queue, rest)

    def flush(self) -> None:
        rest, self._rest = self._rest, b""
        with _queue() as queue, contextlib.suppress(OSError):
            if rest and _has_room(queue):
                self.sendv(b"MESSAGE=" + rest, f"PRIORITY={INFO}", *self.fields)

    async def _send(self, queue: socket.socket | None, line: bytes) -> None:
        try:
            if self._lost and await self._room(queue):
                self.sendv(f"MESSAGE=journald did not take {self._lost} lines", f"PRIORITY={WARNING}", *self.fields)
                self._lost = 0
            if await self._room(queue):
                self.sendv(b"MESSAGE=" + line, f"PRIORITY={INFO}", *self.fields)
                return
        except OSError:
            pass
        self._lost += 1

    async def _room(self, queue: socket.socket | None) -> bool:
        """Waits for it, but only if it was there before."""
        await trio.lowlevel.checkpoint()
        if _has_room(queue):
            return True
        if queue is not None and not self._lost:
            with trio.move_on_after(PATIENCE_S):
                await trio.lowlevel.wait_writable(queue)
                return True
        return False


def _has_room(queue: socket.socket | None) -> bool:
    if queue is None:
        return False
    poll = select.poll()
    poll.register(queue, select.POLLOUT)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _queue() -> Iterator[socket.socket | None]:
    """Connected anew each time: journald may have another by now. None: it has none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as queue:
        try:
            queue.connect(str(QUEUE))
        except OSError:
            yield None
        else:
            yield queue
