"""The files inside an OSv kernel, from which it makes its first root: read to keep what an image has in /etc.

    records   u64 size, u64 offset from the first record, u8 type (1: symbolic link), name[111]; ended by a zero record
    content   of each record in order, packed; of a link its target and a NUL; of a directory (it ends in /) none

Nothing points to it in a stripped kernel, so it is known by its own numbers.
Source: scripts/mkbootfs.py and `unpack_bootfs` in fs/vfs/main.cc in OSv's tree.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Iterator

RECORD = struct.Struct("<QQB111s")
NAME_OFFSET = 17
LINK = 1
RECORDS_LIMIT = 1 << 17
TOTAL_LIMIT_BYTES = 16 << 20


def read(content: mmap.mmap | bytes, end: int, prefix: str) -> dict[str, bytes]:
    """The plain files whose path begins with `prefix`, without it; {} if there is no bootfs, or no such file.

    {} too if looking for it takes more than RECORDS_LIMIT, or TOTAL_LIMIT_BYTES: no honest kernel has as much.
    """
    wanted = prefix.encode()
    left = RECORDS_LIMIT
    for type_ in (0, LINK):
        at = content.find(bytes((type_,)) + wanted, 0, end)
        while at >= 0 and left > 0:
            start, looked_at = _start(content, at - NAME_OFFSET + 1, left)
            left -= looked_at
            if start is not None:
                return _files(content, start, prefix)
            at = content.find(bytes((type_,)) + wanted, at + 1, end)
    return {}


def _files(content: mmap.mmap | bytes, start: int, prefix: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    total = 0
    for size, offset, kind, name in _records(content, start):
        if name.startswith(prefix) and kind != LINK and not name.endswith("/"):
            found[name.removeprefix(prefix)] = data = content[start + offset : start + offset + size]
            total += len(data)
            if total > TOTAL_LIMIT_BYTES:
                return {}
    return found


def _record(content: mmap.mmap | bytes, at: int) -> tuple[int, int, int, str] | None:
    if at < 0 or at + RECORD.size > len(content):
        return None
    size, offset, kind, padded = RECORD.unpack_from(content, at)
    name, _, rest = padded.partition(b"\0")
    if not name.isascii() or rest.strip(b"\0") or kind > LINK:
        return None
    return size, offset, kind, name.decode()


def _start(content: mmap.mmap | bytes, at: int, limit: int) -> tuple[int | None, int]:
    """Where the first record is, from any of them, and how many were looked at.

    Each one's content ends where the next one's begins.
    """
    record = _record(content, at)
    looked_at = 1
    while record is not None and looked_at < limit:
        before = _record(content, at - RECORD.size)
        looked_at += 1
        if before is None or not before[3] or before[0] + before[1] != record[1]:
            break
        at, record = at - RECORD.size, before
    if record is None:
        return None, looked_at
    count = sum(1 for _ in itertools.islice(_records(content, at), limit))
    return (at if record[1] == (count + 1) * RECORD.size else None), looked_at + count


def _records(content: mmap.mmap | bytes, start: int) -> Iterator[tuple[int, int, int, str]]:
    at = start
    while (record := _record(content, at)) is not None and record[3]:
        yield record
        at += RECORD.size
