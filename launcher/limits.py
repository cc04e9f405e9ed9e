"""How much of the host a guest may take. Parsing and arithmetic; who holds a guest to it is told below.

    CPU       cpu.max of its VMM's cgroup                                          cgroup.py
    memory    memory.max of the same: the guest's, and what the VMM needs beside   cgroup.py
    threads   pids.max of the same                                                 cgroup.py
    disks     QEMU's throttle filter, one bucket for all of them                   vmm/qemu.py
    network   tbf qdiscs: on its TAP; on a detour of what it sends                 net.py, shaped() in bpf/localhost.c

Sources: Documentation/admin-guide/cgroup-v2.rst; the forms are docker's (`--cpus`) and tc's (`10mbit`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import UsageError

CPUS_MAX = 255
CPU_SHARE_MIN = 0.01  # cpu.max takes no less than a millisecond of its period of 100
_CPUS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3})?")

_BITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(kbit|mbit|gbit)", re.IGNORECASE)
RATE_MIN_BPS, RATE_MAX_BPS = 10**5, 32 * 10**9  # a tbf of more needs 64 bits, in bytes

_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"([0-9]{1,9})([KMG])(?:i?B)?", re.IGNORECASE)
DISK_MIN_BPS = 64 << 10
_NUMBER_MAX = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None: as much as there is. Rates are per second, those of the network in bits; disks' count reads and writes of
    all of the guest's disks together."""

    cpus: float | None = None  # CPUs' worth of time, of its vCPUs and all else that its VMM does
    disk_bytes: int | None = None
    disk_iops: int | None = None
    net_in_bits: int | None = None  # to the guest
    net_out_bits: int | None = None  # from it

    @classmethod
    def parse(
        cls,
        *,
        cpus: str | None = None,
        disk_rate: str | None = None,
        disk_iops: int | None = None,
        net_rate: str | None = None,
    ) -> Limits:
        """As on the command line: `0.5`, `10M`, `1000`, `50mbit` or `50mbit:10mbit`. Raises UsageError."""
        share = parse_cpus(cpus)[1] if cpus else None
        into, out = parse_net_rate(net_rate) if net_rate else (None, None)
        return cls(
            cpus=share,
            disk_bytes=_parse_disk_rate(disk_rate) if disk_rate else None,
            disk_iops=disk_iops,
            net_in_bits=into,
            net_out_bits=out,
        )


UNLIMITED = Limits()


def parse_cpus(text: str) -> tuple[int, float | None]:
    """(vCPUs, limit of CPU time). `2` is two vCPUs, which cannot take more than two CPUs; `0.5` is one vCPU, and half a
    CPU's time for all that its VMM does. Raises UsageError."""
    if not _CPUS.fullmatch(text) or not CPU_SHARE_MIN <= float(text) <= CPUS_MAX:
        raise UsageError(f"--cpus {text} is not between {CPU_SHARE_MIN:g} and {CPUS_MAX}", "write it as 2 or 0.5")
    number = float(text)
    return math.ceil(number), None if number.is_integer() else number


def parse_net_rate(text: str) -> tuple[int | None, int | None]:
    """(to the guest, from it) of `50mbit`, `50mbit:10mbit`, `50mbit:` or `:10mbit`, in bits. Raises UsageError."""
    into, colon, out = text.partition(":")
    if not colon:
        out = into
    if not into and not out:
        raise UsageError(f"--net-rate {text!r} is no rate", "write it as 50mbit or IN:OUT, such as 50mbit:10mbit")
    return _parse_bits(into), _parse_bits(out)


def _parse_bits(text: str) -> int | None:
    if not text:
        return None
    match = _RATE.fullmatch(text)
    if match is None:
        raise UsageError(f"--net-rate: {text!r} is no rate", "write it as 500kbit, 50mbit or 1gbit")
    bits = round(float(match[1]) * _BITS[match[2].lower()])
    if not RATE_MIN_BPS <= bits <= RATE_MAX_BPS:
        raise UsageError(f"--net-rate: {text} is not between 100kbit and 32gbit")
    return bits


def _parse_disk_rate(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or int(match[1]) * _BYTES[match[2].upper()] < DISK_MIN_BPS:
        raise UsageError(f"--disk-rate {text!r} is not a rate from 64K up", "write it as 512K or 10M, bytes a second")
    return int(match[1]) * _BYTES[match[2].upper()]


def burst_bytes(bits: int) -> int:
    """How much may go at once at a rate. TCP hands over up to 64 KiB in one packet, and has to have the next one on its
    way when the first is through; a rate that is high is kept by timers that are not that fine: 10 ms of it."""
    return max(128 << 10, bits // 8 // 100)
