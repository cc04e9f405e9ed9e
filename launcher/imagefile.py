"""A file of an image, opened once: what was looked at is what runs, whatever becomes of its path meanwhile.

All else is derived from the descriptor: headers, digest, overlays, what QEMU gets, and the next run of a guest that is
started again. A change inside the very file shows by its size and time of modification; who may write a file can
hide even that, so a digest says something of a file that nobody but root may write.

A supervisor that takes a guest over has no descriptor of the one before: it opens the path anew, and takes what is
there if it is the same file.
"""

from __future__ import annotations

import os
import stat
import weakref
from io import BufferedReader
from pathlib import Path

from .errors import ImageError

Stamp = tuple[int, int, int, int]  # device, inode, size in bytes, time of modification in ns


class ImageFile:
    """A regular file, open for reading; `path` is where it was found, for people.

    Closed when nobody holds it any more, as Python's own files are: images are handed on, to a fork and to a guest that
    may start again after years, and whoever may still run one holds it.
    """

    __slots__ = ("__weakref__", "fd", "path", "stamp")

    def __init__(self, path: Path) -> None:
        """Raises OSError, and ImageError for what is no regular file: such is not even opened, for a device or a pipe
        may do something, or nothing ever, when it is."""
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                raise ImageError(f"{path} is a device, a pipe or a directory, not an image", "give a file")
            self.fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(place)
        self.path = path
        weakref.finalize(self, os.close, self.fd)
        self.stamp = self._now()

    @classmethod
    def again(cls, path: Path, stamp: Stamp) -> ImageFile:
        """What another process had opened. If it is not there any more, `check` says so, when it is needed."""
        try:
            file = cls(path)
        except (OSError, ImageError):
            file = cls(Path("/proc/self/cmdline"))  # some file: no image's stamp is its
            file.path = path
        file.stamp = stamp
        return file

    def __str__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageFile) and (self.path, self.stamp) == (other.path, other.stamp)

    def __hash__(self) -> int:
        return hash((self.path, self.stamp))

    def __deepcopy__(self, memo: object) -> ImageFile:  # dataclasses.asdict
        return self

    def _now(self) -> Stamp:
        found = os.fstat(self.fd)  # not ctime: that changes when the file is renamed, or replaced by another
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    @property
    def link(self) -> str:
        """A path by which whoever inherits the descriptor can open the file anew."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    @property
    def mode(self) -> int:
        return os.fstat(self.fd).st_mode

    def read(self, length: int, offset: int = 0) -> bytes:
        return os.pread(self.fd, length, offset)

    def open(self) -> BufferedReader:
        """The file with a position of its own, to be closed by the caller."""
        return Path(self.link).open("rb")

    def sha256(self) -> str:
        """Of the whole file, in hexadecimal; some 1.5 ms a MiB on a CPU with instructions for it."""
        import hashlib

        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check(self) -> None:
        """Raises ImageError if the file has been written to since it was looked at, or is another."""
        if self._now() != self.stamp:
            raise ImageError(f"{self.path} has been changed since it was looked at", "run it anew")
