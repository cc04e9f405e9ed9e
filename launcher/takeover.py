"""A guest whose supervisor has died, or is being replaced: a new one takes it over, guest and flows untouched.

All that a supervisor has of its guest can be had again: QMP and the console are sockets that QEMU listens on, in the
guest's private directory; the TAP and the lock are open files that QEMU shares with us (pidfd_getfd(2)); what is to be
run after the next failure is in `run.json`, beside the record. The kernel holds the rest: bridge, router, rules.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from . import cgroup, events, pod, runfile, state
from .console import Console, open_console
from .errors import UklaunchError, UsageError
from .guest import Guest, RunOptions
from .model import Accel, GuestSpec, Machine
from .run import cgroup_settings, living, mtu_of, starter, threaded
from .timeline import mark
from .vmm import ADOPTERS
from .vmm.accel import kvm_status

TUN = Path("/dev/net/tun")
_PIDFD_GETFD = 438  # on every architecture: include/uapi/asm-generic/unistd.h


@dataclass(frozen=True, slots=True)
class Handed:
    """What a supervisor hands over that becomes its successor by execve(2): open descriptors."""

    lock: int
    console: int


@dataclass(frozen=True, slots=True)
class _Place:
    """What a supervisor has of its guest."""

    record: state.GuestRecord
    spec: GuestSpec
    options: RunOptions
    member: pod.Membership
    lock: int
    vmm_pidfd: int
    vmm_lock: int
    console: Console


@contextlib.contextmanager
def _retaking_place(pod_name: str, name: str, handed: Handed | None) -> Iterator[_Place]:
    """At the end, if the VMM has ended by then, all of it is given back; as long as it runs, nothing is."""
    with contextlib.ExitStack() as stack:
        with state.pod_lock(pod_name):
            record = state.read_guest(pod_name, name)
            if record is None:
                raise UsageError(f"there is no guest {pod_name}/{name}", "see the guests there are: uklaunch ps -a")
            stack.callback(_give_back, record, members := list[pod.Membership]())
            lock = _own_lock(record, handed, stack)
            vmm_lock_file = record.directory / "vmm.lock"
            vmm = state.holder(record.vmm_pid, vmm_lock_file, stack)
            if vmm is None or record.status not in ("running", "ready", "stopping"):
                raise UsageError(f"guest {pod_name}/{name} does not run", "clean up after it: uklaunch gc")
            spec, options = runfile.read(record.directory)
            vmm_lock, tap = (_shared(record.vmm_pid, vmm, path, stack) for path in (vmm_lock_file, TUN))
            mark("found")
            members.append(member := pod.rejoin(record, tap, spec.ports, mtu_of(spec), options.limits))
        console = stack.enter_context(open_console(record))
        if record.restarts == 0:  # else what it says of an exit code may be the last run's
            console.recall()
        yield _Place(record, spec, options, member, lock, vmm, vmm_lock, console)


def _own_lock(record: state.GuestRecord, handed: Handed | None, stack: contextlib.ExitStack) -> int:
    path = record.directory / "supervisor.lock"
    if handed is None:
        if state.supervised(record):
            raise UsageError(f"guest {record.pod}/{record.name} has a supervisor (pid {record.supervisor_pid})")
        return stack.enter_context(state.lock(path))
    os.set_inheritable(handed.lock, False)
    os.set_inheritable(handed.console, False)
    stack.callback(os.close, handed.lock)
    if not os.path.samestat(os.fstat(handed.lock), path.stat()):
        raise UklaunchError(f"descriptor {handed.lock} is not {path}")
    fcntl.flock(handed.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handed.lock


def _shared(pid: int, pidfd: int, path: Path, stack: contextlib.ExitStack) -> int:
    """A descriptor for the very open file that the process has of `path`: with its lock, with the TAP behind it.

    Raises UklaunchError if it has none. Source: pidfd_getfd(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(entry.stat(), path.stat()):
                fd: int = libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)  # close-on-exec
                if fd < 0:
                    raise UklaunchError(
                        f"cannot share {path} with QEMU (pid {pid}): {os.strerror(ctypes.get_errno())}",
                        "it needs Linux 5.6, and root with CAP_SYS_PTRACE",
                    )
                stack.callback(os.close, fd)
                return fd
    raise UklaunchError(f"QEMU (pid {pid}) does not have {path} open")


def _give_back(record: state.GuestRecord, members: list[pod.Membership]) -> None:
    """When all its descriptors are closed, and its locks with them."""
    if not members or state.alive(record):  # it could not be taken over, or another has the name by now
        return
    if record.remove_when_done:
        with state.pod_lock(record.pod):
            if not state.alive(record):
                state.forget_guest(record.pod, record.name)
                events.note("removed", record.pod, record.name)
    if (left := cgroup.existing(record.cgroup)) is not None:
        cgroup.remove(left)
    for member in members:
        member.leave()


@contextlib.asynccontextmanager
async def take_over(
    pod_name: str,
    name: str,
    options: RunOptions | None = None,
    *,
    stop_timeout_s: float | None = None,
    handed: Handed | None = None,
) -> AsyncIterator[Guest]:
    """A guest that runs without a supervisor, for the length of a block, as from `run_guest`: leaving it stops it.

    Of `options`, only the callables count: all else is as it was, but for `stop_timeout_s`.
    Raises UsageError if the guest has a supervisor, or does not run; UklaunchError if it cannot be taken over: then
    it runs on as it did.
    """
    listener = options or RunOptions()
    async with contextlib.AsyncExitStack() as stack:
        place = await stack.enter_async_context(threaded(_retaking_place(pod_name, name, handed)))
        record = place.record
        options = replace(
            place.options, note=listener.note, on_change=listener.on_change, on_console=listener.on_console
        )
        if stop_timeout_s is not None:
            options = replace(options, stop_timeout_s=stop_timeout_s)
        accel = Accel(record.accel)
        confines = cgroup.existing(record.cgroup)
        if confines is not None:
            try:
                cgroup.hold(confines, cgroup_settings(place.spec, options, accel))
            except OSError as exc:
                options.note(f"the guest's limits are not in force: {exc.filename}: {exc.strerror}")
        boot, start_vmm = starter(
            place.spec,
            options,
            place.member,
            accel,
            kvm_status().group,
            place.vmm_lock,
            record.directory,
            confines,
        )
        adopt = partial(
            ADOPTERS[record.vmm],
            pid=record.vmm_pid,
            pidfd=place.vmm_pidfd,
            directory=record.directory,
            machine=Machine(record.machine),
            console_fd=None if handed is None else handed.console,
        )
        guest = Guest(record, boot, options, place.console, place.member, place.lock, start_vmm)
        await stack.enter_async_context(living(guest, trio.lowlevel.checkpoint, adopt))
        yield guest
