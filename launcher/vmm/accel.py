"""Is hardware virtualisation to be had? Decided before a VMM runs: a KVM that only pretends hangs guests.

Seen on real machines: /dev/kvm opens though the CPU shows neither vmx nor svm (a KVM that emulates, or a nested one
that is broken); tiny test guests run, a Linux guest hangs for ever without a word.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import UklaunchError
from ..model import Accel

KVM = Path("/dev/kvm")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmStatus:
    """`why` and `remedy` are empty when KVM is usable. `group`: who may open /dev/kvm beside root, if a group may."""

    usable: bool
    why: str = ""
    remedy: str = ""
    group: int | None = None


def kvm_status(device: Path = KVM, cpuinfo: Path = Path("/proc/cpuinfo")) -> KvmStatus:
    """Can a VMM without privileges run guests at the speed of the hardware?"""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        remedy = {
            errno.ENOENT: "load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware",
            errno.ENODEV: "load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware",
            errno.EACCES: "join the group kvm",
            errno.EBUSY: "stop the other hypervisor that holds it",
        }.get(exc.errno or 0, "")
        return KvmStatus(usable=False, why=f"{device}: {exc.strerror}", remedy=remedy)
    if platform.machine() == "x86_64" and not {"vmx", "svm"} & _cpu_flags(cpuinfo):
        return KvmStatus(
            usable=False,
            why=f"{device} opens, but this CPU shows no vmx or svm: such a KVM hangs guests",
            remedy="enable (nested) virtualisation for this machine",
        )
    status = device.stat()
    if status.st_mode & stat.S_IWOTH:
        return KvmStatus(usable=True)
    if status.st_mode & stat.S_IWGRP:
        return KvmStatus(usable=True, group=status.st_gid)
    return KvmStatus(
        usable=False,
        why=f"{device} is for root alone, and a VMM runs without privileges",
        remedy=f"chgrp kvm {device} && chmod 0660 {device}",
    )


def _cpu_flags(cpuinfo: Path) -> set[str]:
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def choose(wanted: Accel) -> tuple[Accel, KvmStatus]:
    """KVM or TCG. Raises UklaunchError if KVM is demanded and not to be had."""
    if wanted is Accel.TCG:
        return Accel.TCG, KvmStatus(usable=False)
    status = kvm_status()
    if status.usable:
        return Accel.KVM, status
    if wanted is Accel.KVM:
        raise UklaunchError(f"no KVM: {status.why}", status.remedy)
    return Accel.TCG, status
