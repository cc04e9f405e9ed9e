"""Archives in cpio's "newc" form, which the Linux kernel unpacks into its initramfs.

Source: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's tree.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file, directory or link. `path` without a leading slash; `mode` with its type bits."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(path: str, data: bytes | str, mode: int = 0o644) -> Entry:
    content = data.encode() if isinstance(data, str) else data
    return Entry(path=path, mode=stat.S_IFREG | mode, data=content)


def directory(path: str, mode: int = 0o755) -> Entry:
    return Entry(path=path, mode=stat.S_IFDIR | mode)


def link(path: str, target: str) -> Entry:
    return Entry(path=path, mode=stat.S_IFLNK | 0o777, data=target.encode())


def character_device(path: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(path=path, mode=stat.S_IFCHR | mode, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries in order, and the trailer; the same entries always give the same bytes."""
    out = bytearray()
    for inode, entry in enumerate((*entries, Entry(path="TRAILER!!!", mode=0)), start=1):
        name = entry.path.encode() + b"\0"
        numbers = (
            inode,
            entry.mode,
            0,  # uid
            0,  # gid
            1,  # links
            0,  # time of last change
            len(entry.data),
            0,
            0,  # the device it is on
            *entry.device,
            len(name),
            0,  # check sum, of another form
        )
        out += b"070701" + b"".join(b"%08X" % number for number in numbers) + name
        out += bytes(-len(out) % 4) + entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)
