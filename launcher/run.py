"""Run one guest: its place in a pod, its configuration, its VMM; then watch it until it ends.

    place in the pod (namespace, TAP)  ─►  QEMU loads, paused  ─┬─►  guest runs  ─►  ready  ─►  ended
                                           bridge and router  ──┘

The pod's network is finished while QEMU loads, and the guest runs only when both are done: its first frame finds
everything in place. Leaving the block takes it all back, in the reverse order, whatever happened inside.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from . import cgroup, events, journal, pod, rlimits, runfile, state
from .console import Console, open_console
from .errors import UklaunchError, UsageError
from .guest import Guest, RunOptions, StartVmm
from .guests import FAMILIES
from .healing import heal
from .model import Accel, Boot, GuestSpec, LogDriver, check_name, format_mac
from .timeline import mark
from .vmm import VMMS
from .vmm.accel import KvmStatus, choose
from .vmm.qemu import overhead_mib

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Place:
    member: pod.Membership
    record: state.GuestRecord
    lock: int
    vmm_lock: int
    console: Console


def mtu_of(spec: GuestSpec) -> int:
    return spec.mtu or FAMILIES[spec.image.family].MTU


@contextlib.contextmanager
def _taking_place(spec: GuestSpec, options: RunOptions, accel: Accel, home: cgroup.Home | None) -> Iterator[_Place]:
    """A seat in the pod, a directory, a record and the locks, for one guest."""
    with pod.joining(
        spec.pod,
        spec.name,
        netns=options.netns,
        plan=options.plan,
        outside=options.uplink,
        publish=options.publish,
        mtu=mtu_of(spec),
        limits=options.limits,
    ) as member:
        old = state.read_guest(spec.pod, spec.name)
        if old is not None and state.alive(old):
            raise UsageError(
                f"guest {spec.pod}/{spec.name} is running",
                f"stop it first: uklaunch stop {spec.pod}/{spec.name}; or pick another --name"
                if state.supervised(old)
                else f"it has no supervisor; take it over: uklaunch supervise {spec.pod}/{spec.name}",
            )
        if old is not None and (left := cgroup.existing(old.cgroup)) is not None:
            cgroup.remove(left)
        state.forget_guest(spec.pod, spec.name)
        nic = member.nic
        record = state.GuestRecord(
            name=spec.name,
            pod=spec.pod,
            index=member.index,
            mac=format_mac(nic.mac),
            ipv4=str(nic.ipv4.ip),
            ipv6=str(nic.ipv6.ip),
            tap=member.tap,
            image=str(spec.image.path),
            family=spec.image.family.value,
            vmm=options.vmm,
            accel=accel.value,
            memory_mib=spec.memory_mib,
            cpus=spec.cpus,
            limits=asdict(options.limits),
            cgroup=str(home.child(spec.pod, spec.name)) if home is not None else "",
            ports=tuple(str(port) for port in spec.ports),
            published=tuple(str(item) for item in options.publish),
            supervisor_pid=os.getpid(),
            started_at=time.time(),
            remove_when_done=options.remove_when_done,
            restart=str(options.restart),
            log_driver=options.log_driver.value,
        )
        with _guest_directory(record) as (lock, vmm_lock, console):
            remove = True
            try:
                state.write_guest(record)
                events.note("created", spec.pod, spec.name)
                mark("record")
                yield _Place(member, record, lock, vmm_lock, console)
                remove = options.remove_when_done
            finally:
                # A guest that never ran leaves nothing; one that ended keeps its record and its console.
                final = state.read_guest(spec.pod, spec.name)
                if remove and (options.remove_when_done or final is None or final.exited_at is None):
                    state.forget_guest(spec.pod, spec.name)
                    events.note("removed", spec.pod, spec.name)


@contextlib.contextmanager
def _guest_directory(record: state.GuestRecord) -> Iterator[tuple[int, int, Console]]:
    """The guest's directory, new, with its locks held and its console open. Entered under the pod's lock."""
    with contextlib.ExitStack() as held:
        try:
            record.directory.mkdir(mode=0o700, parents=True)
            lock = held.enter_context(state.lock(record.directory / "supervisor.lock"))
            # Not to write: a VMM that has been taken over would fill /run.
            vmm_lock = held.enter_context(state.lock(record.directory / "vmm.lock", os.O_RDONLY))
            console = held.enter_context(open_console(record))
            mark("place")
        except BaseException as exc:
            state.forget_guest(record.pod, record.name)
            if isinstance(exc, OSError):
                raise state.state_error(record.directory, exc) from exc
            raise
        yield lock, vmm_lock, console


@contextlib.asynccontextmanager
async def threaded(context: contextlib.AbstractContextManager[T]) -> AsyncIterator[T]:
    """A blocking context manager, entered and left in worker threads; leaving cannot be cancelled."""
    value = await trio.to_thread.run_sync(context.__enter__)
    try:
        yield value
    except BaseException as exc:
        with trio.CancelScope(shield=True):
            leave = partial(context.__exit__, type(exc), exc, exc.__traceback__)
            if not await trio.to_thread.run_sync(leave):
                raise
    else:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(context.__exit__, None, None, None)


def _say_accel(wanted: Accel, accel: Accel, kvm: KvmStatus, options: RunOptions) -> None:
    if wanted is Accel.AUTO and accel is Accel.TCG:
        remedy = f" (to mend it: {kvm.remedy})" if kvm.remedy else ""
        options.note(f"no KVM, using slow emulation (TCG): {kvm.why}{remedy}")


@contextlib.asynccontextmanager
async def run_guest(spec: GuestSpec, options: RunOptions | None = None) -> AsyncIterator[Guest]:
    """A guest for the length of a block. It has been started on entry; `wait_ready` tells when it serves.

    The pod is made if it does not exist, and goes then with its last guest. Leaving the block, by cancellation
    too, stops the guest in order. Raises UklaunchError (perhaps inside an exception group) if it cannot run.
    """
    options = options or RunOptions()
    check_name("guest", spec.name)
    rlimits.check(spec.memory_mib)
    if options.log_driver is LogDriver.JOURNALD:
        journal.check()
    accel, kvm = choose(options.accel)
    _say_accel(options.accel, accel, kvm, options)
    home = cgroup.check(options.limits)
    # A published port is a declared one.
    ports = tuple(dict.fromkeys((*spec.ports, *(item.guest for item in options.publish))))
    spec = replace(spec, ports=ports)
    async with contextlib.AsyncExitStack() as stack:
        if spec.name in options.after:
            raise UsageError(f"guest {spec.pod}/{spec.name} cannot come after itself")
        if options.after:
            await _others_ready(spec.pod, options)
        place = await stack.enter_async_context(threaded(_taking_place(spec, options, accel, home)))
        member = place.member
        if not spec.nameservers:
            found = member.resolver
            spec = replace(spec, nameservers=found.nameservers, search=found.search, resolver_options=found.options)
        directory = place.record.directory
        wanted = cgroup_settings(spec, options, accel)
        confines = stack.enter_context(cgroup.guest_cgroup(home, Path(place.record.cgroup), wanted))
        boot, start_vmm = starter(spec, options, member, accel, kvm.group, place.vmm_lock, directory, confines)

        def connect() -> None:
            runfile.write(directory, spec, options)
            mark("run-file")
            member.connect(spec.ports, options.publish)
            mark("joined")

        guest = Guest(place.record, boot, options, place.console, member, place.lock, start_vmm)
        await stack.enter_async_context(living(guest, partial(trio.to_thread.run_sync, connect)))
        yield guest


def cgroup_settings(spec: GuestSpec, options: RunOptions, accel: Accel) -> dict[str, str]:
    memory_mib = spec.memory_mib + overhead_mib(accel, spec.memory_mib, spec.cpus)
    return cgroup.settings(options.limits, memory_mib=memory_mib, cpus=spec.cpus)


def starter(
    spec: GuestSpec,
    options: RunOptions,
    member: pod.Membership,
    accel: Accel,
    kvm_group: int | None,
    vmm_lock: int,
    directory: Path,
    confines: Path | None,
) -> tuple[Boot, StartVmm]:
    """What boots, and what starts a VMM for it, for each of its runs. `confines`: the cgroup for it."""
    boot = replace(FAMILIES[spec.image.family].configure(spec, member.nic), watchdog=spec.watchdog)
    return boot, partial(
        VMMS[options.vmm],
        boot,
        tap_fd=member.tap_fd,
        accel=accel,
        kvm_group=kvm_group,
        lock_fd=vmm_lock,
        directory=directory,
        limits=options.limits,
        admit=partial(cgroup.admit, confines),
    )


@contextlib.asynccontextmanager
async def living(
    guest: Guest, connect: Callable[[], Awaitable[None]], adopt: StartVmm | None = None
) -> AsyncIterator[None]:
    """With the guest begun (see `Guest.live`) and its pod's devices looked after; stopped in order at the end."""
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(guest.live, connect, adopt)
            nursery.start_soon(heal, guest.member, guest.say)
            yield
        finally:
            with trio.CancelScope(shield=True):
                if not guest.ended.is_set():
                    await guest.stop()
                await guest.ended.wait()
            nursery.cancel_scope.cancel()


async def _others_ready(name: str, options: RunOptions) -> None:
    """Until the guests that are to come first are ready. Raises UklaunchError when they take too long."""
    with events.watching() as fd, trio.move_on_after(options.after_timeout_s):
        while True:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 1 << 16)  # before we look, so that nothing is missed
            waiting = [other for other in options.after if not _serves(state.read_guest(name, other))]
            if not waiting:
                return
            await trio.lowlevel.wait_readable(fd)
    raise UklaunchError(
        f"guest {name}/{waiting[0]}, which is to come first, was not ready within {options.after_timeout_s:g} s",
        "see: uklaunch ps -a",
    )


def _serves(record: state.GuestRecord | None) -> bool:
    if record is None or record.status != "ready" or not state.supervised(record):
        return False
    return record.health in (None, "healthy")
