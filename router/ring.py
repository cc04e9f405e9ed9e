"""A BPF ring buffer, read through shared memory.

    page 0          how far we have read, ours to write
    page 1          how far the kernel has written
    data, twice     so that a record which wraps round lies in one piece

A record: u32 length, with two flags on top, u32 of the kernel's own, then the data, padded to 8 bytes.
Sources: kernel/bpf/ringbuf.c; include/uapi/linux/bpf.h, BPF_RINGBUF_HDR_SZ.
"""

from __future__ import annotations

import mmap
import os
import struct

from . import syscall

SIZE = 256 << 10  # bytes: a power of two, of whole pages; 3,400 dropped packets
_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER = 8


class Ring:
    """Made and owned by its one reader. `fd` is the map's, and readable in the sense of poll(2)."""

    def __init__(self, size: int = SIZE) -> None:
        self.fd = syscall.create_map(syscall.MAP_TYPE_RINGBUF, 0, 0, size, "uk_drops")
        self._size = size
        try:
            self._ours = mmap.mmap(self.fd, mmap.PAGESIZE)
            self._theirs = mmap.mmap(self.fd, mmap.PAGESIZE + 2 * size, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
        os.close(self.fd)

    def read(self) -> list[bytes]:
        """Every record that is complete."""
        (at,) = struct.unpack_from("Q", self._ours, 0)
        (end,) = struct.unpack_from("Q", self._theirs, 0)
        records = []
        while at < end:
            where = mmap.PAGESIZE + at % self._size
            (length,) = struct.unpack_from("I", self._theirs, where)
            if length & _BUSY:
                break
            size = length & ~(_BUSY | _DISCARDED)
            if not length & _DISCARDED:
                records.append(self._theirs[where + _HEADER : where + _HEADER + size])
            at += _HEADER + (size + 7 & ~7)
        struct.pack_into("Q", self._ours, 0, at)
        return records
