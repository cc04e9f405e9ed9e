"""bpf(2) by ctypes, as far as the router needs it: a warm host must not import bcc, which costs 50 ms and 70 MB.

Bytes in, bytes out; what they mean is known to `tables`. Errors are OSErrors as the kernel gave them.
Sources: include/uapi/linux/bpf.h (union bpf_attr), bpf(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

_NR_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT = 0, 1, 2, 3, 4
_PROG_LOAD, _OBJ_PIN, _OBJ_GET, _PROG_TEST_RUN = 5, 6, 7, 10
_MAP_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _MAP_LOOKUP_BATCH = 14, 15, 24

MAP_TYPE_LRU_HASH = 9
MAP_TYPE_RINGBUF = 27
PROG_TYPE_SCHED_CLS = 3
ANY, NOEXIST = 0, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _bpf(command: int, attr: bytes) -> tuple[int, bytes]:
    """Returns what the call returned and the attributes as the kernel left them."""
    buffer = ctypes.create_string_buffer(attr.ljust(128, b"\0"), 128)
    result = _libc.syscall(
        ctypes.c_long(_NR_BPF[platform.machine()]), ctypes.c_int(command), buffer, ctypes.c_uint(128)
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result, buffer.raw


def create_map(
    kind: int, key_size: int, value_size: int, entries: int, name: str, flags: int = 0, inner: int | None = None
) -> int:
    """`inner`: of a map of maps, one that looks like those."""
    attr = struct.pack("5I2I16s", kind, key_size, value_size, entries, flags, inner or 0, 0, name.encode()[:15])
    return _bpf(_MAP_CREATE, attr)[0]


def map_fd_by_id(identifier: int) -> int:
    return _bpf(_MAP_FD_BY_ID, struct.pack("I", identifier))[0]


def _map_info(fd: int) -> tuple[int, ...]:
    """The head of struct bpf_map_info: type, id, key_size, value_size, max_entries, map_flags."""
    info = ctypes.create_string_buffer(88)
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("IIQ", fd, len(info), ctypes.addressof(info)))
    return struct.unpack_from("6I", info)


def map_id(fd: int) -> int:
    return _map_info(fd)[1]


def map_shape(fd: int) -> dict[str, int]:
    """What create_map() needs to make another one of its kind."""
    kind, _, key_size, value_size, entries, flags = _map_info(fd)
    return {"kind": kind, "key_size": key_size, "value_size": value_size, "entries": entries, "flags": flags}


def pin(fd: int, path: str) -> None:
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, struct.pack("QI", ctypes.addressof(name), fd))


def open_pin(path: str) -> int:
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, struct.pack("QI", ctypes.addressof(name), 0))[0]


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """`value_size`: of all CPUs together for a per-CPU map. None: no such key."""
    value = ctypes.create_string_buffer(value_size)
    buffer = ctypes.create_string_buffer(key, len(key))
    attr = struct.pack("I4xQQQ", fd, ctypes.addressof(buffer), ctypes.addressof(value), 0)
    try:
        _bpf(_MAP_LOOKUP, attr)
    except FileNotFoundError:
        return None
    return value.raw


def update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> bool:
    """False: the key is there already, and `flags` is NOEXIST."""
    buffers = (
        ctypes.create_string_buffer(key, len(key)),
        ctypes.create_string_buffer(value, len(value)),
    )
    attr = struct.pack("I4xQQQ", fd, *map(ctypes.addressof, buffers), flags)
    try:
        _bpf(_MAP_UPDATE, attr)
    except FileExistsError:
        return False
    return True


def delete(fd: int, key: bytes) -> bool:
    """False: no such key."""
    buffer = ctypes.create_string_buffer(key, len(key))
    try:
        _bpf(_MAP_DELETE, struct.pack("I4xQQQ", fd, ctypes.addressof(buffer), 0, 0))
    except FileNotFoundError:
        return False
    return True


def keys(fd: int, key_size: int) -> Iterator[bytes]:
    """Every key of a small map. One that goes away meanwhile makes the kernel begin again: keys may come twice."""
    following = ctypes.create_string_buffer(key_size)
    current: ctypes.Array[ctypes.c_char] | None = None
    while True:
        at = ctypes.addressof(current) if current is not None else 0
        try:
            _bpf(_MAP_NEXT, struct.pack("I4xQQQ", fd, at, ctypes.addressof(following), 0))
        except FileNotFoundError:
            return
        current = ctypes.create_string_buffer(following.raw, key_size)
        yield following.raw


def items(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes]]:
    """Every entry of a large hash map, thousands a call (Linux 5.6)."""
    capacity = 4096
    cursor = ctypes.create_string_buffer(max(key_size, 8))
    started = False
    while True:
        keys_ = ctypes.create_string_buffer(key_size * capacity)
        values = ctypes.create_string_buffer(value_size * capacity)
        # struct { in_batch, out_batch, keys, values: u64; count, map_fd: u32; elem_flags, flags: u64 }
        attr = struct.pack(
            "QQQQIIQQ",
            ctypes.addressof(cursor) if started else 0,
            *map(ctypes.addressof, (cursor, keys_, values)),
            capacity,
            fd,
            0,
            0,
        )
        done = False
        buffer = ctypes.create_string_buffer(attr.ljust(128, b"\0"), 128)
        result = _libc.syscall(
            ctypes.c_long(_NR_BPF[platform.machine()]),
            ctypes.c_int(_MAP_LOOKUP_BATCH),
            buffer,
            ctypes.c_uint(128),
        )
        if result < 0:
            code = ctypes.get_errno()
            if code == errno.ENOSPC:  # one hash bucket holds more than we asked for
                capacity *= 2
                continue
            if code != errno.ENOENT:
                raise OSError(code, os.strerror(code))
            done = True  # ENOENT: that was the last of it
        (count,) = struct.unpack_from("I", buffer.raw, 32)
        raw_keys, raw_values = keys_.raw, values.raw  # each use of .raw copies the whole of it
        for i in range(count):
            yield (
                raw_keys[i * key_size : (i + 1) * key_size],
                raw_values[i * value_size : (i + 1) * value_size],
            )
        if done:
            return
        started = True


def load_program(instructions: bytes, name: str) -> int:
    """A SCHED_CLS program under the GPL. Raises OSError whose second argument is the verifier's log."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")

    def attempt(log: ctypes.Array[ctypes.c_char] | None) -> int:
        attr = struct.pack(
            "IIQQIIQII16s",
            PROG_TYPE_SCHED_CLS,
            len(instructions) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licence),
            1 if log is not None else 0,
            len(log) if log is not None else 0,
            ctypes.addressof(log) if log is not None else 0,
            0,
            0,
            name.encode()[:15],
        )
        return _bpf(_PROG_LOAD, attr)[0]

    try:
        return attempt(None)  # without a log: writing one slows the verifier down
    except OSError as exc:
        log = ctypes.create_string_buffer(1 << 24)
        try:
            return attempt(log)
        except OSError:
            text = log.value.decode(errors="replace")
            raise OSError(exc.errno, text or exc.strerror) from None


def run_once(fd: int, frame: bytes, context: bytes = b"") -> tuple[int, bytes]:
    """Run the program once on the frame; returns its verdict and the frame as it left it."""
    data = ctypes.create_string_buffer(frame, len(frame))
    out = ctypes.create_string_buffer(len(frame) + 512)
    ctx = ctypes.create_string_buffer(context, len(context))
    # struct { prog_fd, retval, data_size_in, data_size_out: u32; data_in, data_out: u64; repeat, duration,
    #          ctx_size_in, ctx_size_out: u32; ctx_in, ctx_out: u64 }
    attr = struct.pack(
        "IIIIQQIIIIQQ",
        fd,
        0,
        len(frame),
        len(out),
        ctypes.addressof(data),
        ctypes.addressof(out),
        1,
        0,
        len(context),
        0,
        ctypes.addressof(ctx) if context else 0,
        0,
    )
    _, left = _bpf(_PROG_TEST_RUN, attr)
    _, verdict, _, size = struct.unpack_from("IIII", left)
    return verdict, out.raw[:size]
