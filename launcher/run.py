"""Run one guest: its place in a pod, its configuration, its VMM; then watch it until it ends.

    place in the pod (namespace, TAP)  ─►  QEMU loads, paused  ─┬─►  guest runs  ─►  ready  ─►  ended
                                           bridge and router  ──┘

The pod's network is finished while QEMU loads, and the guest runs only when both are done: its first frame finds
everything in place. Leaving the block takes it all back, in the reverse order, whatever happened inside.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, TypeVar

import trio

from . import net, pod, state
from .console import Console
from .errors import ExitCode, UklaunchError, UsageError
from .guests import FAMILIES
from .healing import heal
from .model import Accel, AddressPlan, Boot, ExitReason, GuestSpec, check_name, format_mac
from .publish import Publish
from .timeline import mark
from .vmm import VMMS
from .vmm.accel import KvmStatus, choose
from .vmm.qemu import Vmm

T = TypeVar("T")

QUIT_TIMEOUT_S = 3.0
CONSOLE_TIMEOUT_S = 5.0  # for a reader of our output who does not read
READY_POLL_S = 0.05
DISCARD_PORT = 9
FILES = 128  # descriptors: a launch takes about fifty, and two for each disk
CRASHED = 134  # as a program that called abort(3)
KILLED = 137  # as a program that got SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How to run a guest, beside what it is."""

    vmm: str = "qemu"
    accel: Accel = Accel.AUTO
    netns: Path | None = None  # adopt this namespace if the pod does not exist
    plan: AddressPlan | None = None
    uplink: str | None = None  # of the pod, if it does not exist: nat (the default), none or cni:NAME
    publish: tuple[Publish, ...] = ()  # ports of the host's that lead to this guest
    ready_port: int | None = None  # ready is when the guest accepts TCP here, not when its NIC answers
    stop_timeout_s: float = 10.0  # how long a guest may take to power down
    remove_when_done: bool = False
    note: Callable[[str], None] = lambda text: None  # is told what a person may want to know
    # is handed the console's output as it comes
    on_console: Callable[[bytes], Awaitable[None]] | None = None


@dataclass
class Guest:
    """A running guest, from `run_guest`."""

    record: state.GuestRecord
    boot: Boot
    vmm: Vmm
    netns: Path
    options: RunOptions
    console: Console
    ready: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    _stop_asked: bool = False
    _patience: trio.CancelScope | None = None
    _killed: bool = False

    @property
    def ipv4(self) -> IPv4Address:
        return self.boot.nic.ipv4.ip

    @property
    def ipv6(self) -> IPv6Address:
        return self.boot.nic.ipv6.ip

    async def wait_ready(self, timeout_s: float = math.inf) -> None:
        """Wait until the guest is ready. Raises UklaunchError if it ends first, or takes too long."""
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:

                async def first(event: trio.Event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(first, self.ready)
                nursery.start_soon(first, self.ended)
        if self.ready.is_set():
            return
        name = f"{self.record.pod}/{self.record.name}"
        said = last_line(self.console.tail)
        detail = self.console.tail.decode(errors="replace")
        if self.ended.is_set():
            raise UklaunchError(f"guest {name} ended before it was ready{said}", "-v shows its console", detail)
        wanted = f"accept port {self.options.ready_port}" if self.options.ready_port else "answer ARP"
        raise UklaunchError(
            f"guest {name} did not {wanted} within {timeout_s:g} s{said}",
            "-v shows its console; --no-wait does not wait; --ready-timeout waits longer",
            detail,
        )

    async def send(self, data: bytes) -> None:
        """Type on the guest's console. Raises trio.BrokenResourceError when the guest is gone."""
        await self.vmm.console.send_all(data)

    async def wait(self) -> state.GuestRecord:
        """Wait until the guest has ended; its record says how."""
        await self.ended.wait()
        return self.record

    async def stop(self) -> None:
        """Power button, then QEMU's `quit`, then SIGKILL, each after the one before had its time.

        A second call while the first is waiting cuts that wait short. Cancelling it leaves the guest running.
        """
        if self._patience is not None:
            self._patience.cancel()
            return
        self._stop_asked = True
        mark("stop")
        self.update(status="stopping")
        steps: list[tuple[Callable[[], Awaitable[None]], float]] = [(self.vmm.quit, QUIT_TIMEOUT_S)]
        if self.boot.powers_down:
            steps.insert(0, (self._press_power_button, self.options.stop_timeout_s))
        try:
            for step, timeout_s in steps:
                with trio.move_on_after(timeout_s) as self._patience:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(step)
                        await self.ended.wait()
                        nursery.cancel_scope.cancel()
                    return
        finally:
            self._patience = None
        self._killed = True
        self.vmm.kill()
        await self.ended.wait()

    async def _press_power_button(self) -> None:
        await self.vmm.power_down()
        if not self.ready.is_set():  # it may have been too early for the guest to hear
            await self.ready.wait()
            await self.vmm.power_down()

    def update(self, **changes: Any) -> None:
        """Put down what has changed. A full disk loses what others get to know, not the guest."""
        self.record = replace(self.record, **changes)
        try:
            state.write_guest(self.record)
        except UklaunchError as exc:
            self.say(exc.message)

    def say(self, text: str) -> None:
        """Tell a person, who may come to read it later."""
        self.options.note(text)
        with contextlib.suppress(OSError), self.record.supervisor_log.open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")

    # --- tasks ---

    @contextlib.asynccontextmanager
    async def _tended(self, member: pod.Membership) -> AsyncIterator[None]:
        """Watch the guest for the length of a block; stop it at the block's end, unless it has ended by itself."""
        async with trio.open_nursery() as nursery:
            copied = trio.Event()
            nursery.start_soon(self._copy_console, copied)
            nursery.start_soon(self._watch, copied)
            nursery.start_soon(self._await_ready)
            nursery.start_soon(heal, member, self.say)
            try:
                yield
            finally:
                with trio.CancelScope(shield=True):
                    if not self.ended.is_set():
                        await self.stop()
                    await self.ended.wait()
                nursery.cancel_scope.cancel()

    # These two end when the VMM ends, which is sure to: cancelling them would only lose what they have to tell.

    async def _copy_console(self, copied: trio.Event) -> None:
        sink = self.options.on_console
        with trio.CancelScope(shield=True), contextlib.suppress(trio.BrokenResourceError):
            async for data in self.vmm.console:
                self.console.write(bytes(data))
                if sink is not None:
                    try:
                        await sink(bytes(data))
                    except OSError:  # nobody reads our output any more; the log goes on
                        sink = None
        copied.set()

    async def _watch(self, copied: trio.Event) -> None:
        with trio.CancelScope(shield=True):
            try:
                code = await self.vmm.wait()
                mark("vmm-gone")
                qmp_reason = await self.vmm.shutdown_reason()
                with trio.move_on_after(CONSOLE_TIMEOUT_S):
                    await copied.wait()
                reason, exit_code = self._outcome(code, qmp_reason)
                if reason is ExitReason.VMM_FAILED:
                    self.say(self.vmm.failure("QEMU ended").message)
                self.update(
                    status="exited",
                    reason=reason.value,
                    exit_code=exit_code,
                    exited_at=time.time(),
                    vmm_pid=0,
                )
            finally:
                self.ended.set()

    async def _await_ready(self) -> None:
        if self.options.ready_port is not None:
            await _accepts(self.netns, str(self.ipv4), self.options.ready_port)
        else:
            await _answers(self.netns, {self.ipv4, self.ipv6} if self.boot.ipv6 else {self.ipv4})
        if not self._stop_asked:
            self.update(status="ready", ready_at=time.time())
        mark("ready")
        self.ready.set()
        if self.boot.ipv6 is None:
            # The router serves ::1 by this guest from its first answer on; one that has no IPv6 never gives it.
            await _answers(self.netns, {self.ipv6})

    def _outcome(self, vmm_code: int, qmp_reason: str) -> tuple[ExitReason, int]:
        """Why the guest ended, and the exit code that says so."""
        own = FAMILIES[self.record.family].exit_status(self.console.tail)
        if self._killed:
            return ExitReason.KILLED, KILLED
        if self._stop_asked:
            return ExitReason.STOPPED, 0
        if vmm_code != 0:
            return ExitReason.VMM_FAILED, ExitCode.OURS
        if own is not None:
            return ExitReason.POWERED_OFF, own
        if qmp_reason in ("guest-panic", "guest-reset"):
            return ExitReason.PANICKED, CRASHED
        return ExitReason.POWERED_OFF, 0


def last_line(console: bytes) -> str:
    """` (it said last: "...")`, or nothing."""
    lines = [line.strip() for line in console.decode(errors="replace").splitlines() if line.strip()]
    printable = "".join(c for c in lines[-1] if c.isprintable())[:120] if lines else ""
    return f' (it said last: "{printable}")' if printable else ""


# --- readiness ---


async def _answers(netns: Path, wanted: set[IPv4Address | IPv6Address]) -> None:
    """Until each address has answered ARP or neighbour discovery; the kernel asks, and tells when it knows."""
    missing = set(wanted)
    with contextlib.ExitStack() as stack:
        events = trio.socket.from_stdlib_socket(stack.enter_context(net.open_neighbour_events(netns)))
        probes = {
            4: stack.enter_context(net.open_socket(netns, socket.AF_INET, socket.SOCK_DGRAM)),
            6: stack.enter_context(net.open_socket(netns, socket.AF_INET6, socket.SOCK_DGRAM)),
        }

        def ask(address: IPv4Address | IPv6Address) -> None:
            with contextlib.suppress(OSError):  # no route (the bridge is down), or an answer to an earlier one
                probes[address.version].sendto(b"", (str(address), DISCARD_PORT))

        for address in missing:
            ask(address)
        while missing:
            for address, answered in net.parse_neighbour_events(await events.recv(1 << 16)):
                if answered:
                    missing.discard(address)
                elif address in missing:
                    ask(address)


async def _accepts(netns: Path, address: str, port: int) -> None:
    """Until a TCP connection is accepted. A refusal is no event, so this asks again and again."""
    while True:
        with net.open_socket(netns, socket.AF_INET, socket.SOCK_STREAM) as sock:
            try:
                await trio.socket.from_stdlib_socket(sock).connect((address, port))
            except OSError:
                await trio.sleep(READY_POLL_S)
            else:
                return


# --- the run ---


def _allow_files() -> None:
    """Room for the descriptors of a launch, or an error while nothing has been made yet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= FILES or soft == resource.RLIM_INFINITY:
        return
    if hard < FILES and hard != resource.RLIM_INFINITY:
        raise UklaunchError(
            f"a launch may need {FILES} open files, and {hard} are allowed",
            "ulimit -n, or LimitNOFILE= of its unit",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))


@dataclass(frozen=True, slots=True)
class _Place:
    member: pod.Membership
    record: state.GuestRecord
    vmm_lock: int
    console: Console


@contextlib.contextmanager
def _taking_place(spec: GuestSpec, options: RunOptions, accel: Accel) -> Iterator[_Place]:
    """A seat in the pod, a directory, a record and the locks, for one guest."""
    mtu = spec.mtu or FAMILIES[spec.image.family].MTU
    with pod.joining(
        spec.pod,
        spec.name,
        netns=options.netns,
        plan=options.plan,
        outside=options.uplink,
        publish=options.publish,
        mtu=mtu,
    ) as member:
        old = state.read_guest(spec.pod, spec.name)
        if old is not None and state.alive(old):
            raise UsageError(
                f"guest {spec.pod}/{spec.name} is running",
                f"stop it first: uklaunch stop {spec.pod}/{spec.name}; or pick another --name",
            )
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
            ports=tuple(str(port) for port in spec.ports),
            published=tuple(str(item) for item in options.publish),
            supervisor_pid=os.getpid(),
            started_at=time.time(),
            remove_when_done=options.remove_when_done,
        )
        with _guest_directory(record) as (vmm_lock, console):
            remove = True
            try:
                state.write_guest(record)
                mark("record")
                yield _Place(member, record, vmm_lock, console)
                remove = options.remove_when_done
            finally:
                # A guest that never ran leaves nothing; one that ended keeps its record and its console.
                final = state.read_guest(spec.pod, spec.name)
                if remove and (options.remove_when_done or final is None or final.exited_at is None):
                    state.forget_guest(spec.pod, spec.name)


@contextlib.contextmanager
def _guest_directory(record: state.GuestRecord) -> Iterator[tuple[int, Console]]:
    """The guest's directory, new, with its locks held and its console open. Entered under the pod's lock."""
    with contextlib.ExitStack() as held:
        try:
            record.directory.mkdir(mode=0o700, parents=True)
            held.enter_context(state.lock(record.directory / "supervisor.lock"))
            vmm_lock = held.enter_context(state.lock(record.directory / "vmm.lock"))
            console = held.enter_context(Console.open(record.console_log))
            mark("place")
        except BaseException as exc:
            state.forget_guest(record.pod, record.name)
            if isinstance(exc, OSError):
                raise state.state_error(record.directory, exc) from exc
            raise
        yield vmm_lock, console


@contextlib.asynccontextmanager
async def _threaded(context: contextlib.AbstractContextManager[T]) -> AsyncIterator[T]:
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
    _allow_files()
    accel, kvm = choose(options.accel)
    _say_accel(options.accel, accel, kvm, options)
    start = VMMS[options.vmm]
    # A published port is a declared one.
    ports = tuple(dict.fromkeys((*spec.ports, *(item.guest for item in options.publish))))
    spec = replace(spec, ports=ports)
    async with contextlib.AsyncExitStack() as stack:
        place = await stack.enter_async_context(_threaded(_taking_place(spec, options, accel)))
        member = place.member
        if not spec.nameservers:
            found = member.resolver
            spec = replace(spec, nameservers=found.nameservers, search=found.search, resolver_options=found.options)
        boot = FAMILIES[spec.image.family].configure(spec, member.nic)
        connected = trio.Event()

        async def connect() -> None:
            await trio.to_thread.run_sync(member.connect, spec.ports, options.publish)
            mark("joined")
            connected.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            async with start(
                boot,
                tap_fd=member.tap_fd,
                accel=accel,
                kvm_group=kvm.group,
                lock_fd=place.vmm_lock,
            ) as vmm:
                await connected.wait()
                guest = Guest(place.record, boot, vmm, member.netns, options, place.console)
                guest.update(status="running", vmm_pid=vmm.pid, machine=vmm.machine.value)
                await vmm.resume()
                mark("resumed")
                async with guest._tended(member):
                    yield guest
