"""A guest's console: kept in a file of bounded size, and its last bytes at hand.

A guest may write as much as it likes: the file is under /run, which is memory, so at `LIMIT_BYTES` it becomes
`console.log.1` and a new one begins.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT_BYTES = 4 << 20
TAIL_BYTES = 16 << 10


@dataclass
class Console:
    path: Path
    tail: bytes = b""
    _fd: int = -1
    _size: int = 0

    def write(self, data: bytes) -> None:
        """Append what the guest said. A full disk loses text, not the guest."""
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        if self._size + len(data) > LIMIT_BYTES:
            self._rotate()
        with contextlib.suppress(OSError):
            self._size += os.write(self._fd, data)

    def _rotate(self) -> None:
        os.close(self._fd)
        self.path.replace(self.path.with_suffix(".log.1"))
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[Console]:
        console = cls(path)
        console._open()
        try:
            yield console
        finally:
            os.close(console._fd)
