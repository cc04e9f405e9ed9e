"""A guest that runs: its lives one after the other, readiness, health, and how it is ended."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import trio

from . import events, pod, probes, state
from .console import Console
from .errors import ExitCode, UklaunchError, first_error
from .guests import FAMILIES
from .health import HealthCheck
from .limits import UNLIMITED, Limits
from .model import Accel, AddressPlan, Boot, ExitReason, LogDriver
from .publish import Publish
from .restart import RestartMode, RestartPolicy, Restarts
from .timeline import mark
from .vmm.qemu import Vmm

QUIT_TIMEOUT_S = 3.0
CONSOLE_PATIENCE_S = 5.0  # for a guest that may poll its console, so that nobody can see whether it has opened it
CONSOLE_TIMEOUT_S = 5.0  # for a reader of our output who does not read
CRASHED = 134  # as a program that called abort(3)
KILLED = 137  # as a program that got SIGKILL
AFTER_TIMEOUT_S = 60.0  # for the guests that are to be ready before

StartVmm = Callable[[], contextlib.AbstractAsyncContextManager[Vmm]]


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
    restart: RestartPolicy = RestartPolicy()
    health: HealthCheck | None = None
    after: tuple[str, ...] = ()  # guests of the pod that are to be ready (healthy, if they are checked) before
    after_timeout_s: float = AFTER_TIMEOUT_S
    limits: Limits = UNLIMITED
    remove_when_done: bool = False
    log_driver: LogDriver = LogDriver.FILE
    note: Callable[[str], None] = lambda text: None  # is told what a person may want to know
    on_change: Callable[[state.GuestRecord], None] = lambda record: None  # is handed the guest's record as it changes
    # is handed the console's output as it comes
    on_console: Callable[[bytes], Awaitable[None]] | None = None


@dataclass
class Guest:
    """A running guest, from `run_guest`. Under a restart policy it may have many runs, each with a VMM of its own."""

    record: state.GuestRecord
    boot: Boot
    options: RunOptions
    console: Console
    member: pod.Membership
    lock_fd: int  # the supervisor's own lock
    start_vmm: StartVmm
    ready: trio.Event = field(default_factory=trio.Event)  # for the first time
    ended: trio.Event = field(default_factory=trio.Event)  # for good
    _restarts: Restarts = field(init=False)
    _stop_asked: bool = False
    _life: trio.CancelScope = field(default_factory=trio.CancelScope)
    _patience: trio.CancelScope | None = None
    # of the present run
    _vmm: Vmm | None = None
    _up: trio.Event = field(default_factory=trio.Event)  # this run is ready
    _over: trio.Event = field(default_factory=trio.Event)  # this run's VMM has ended
    _killed: bool = False
    _unhealthy: bool = False
    _begun_at: float = 0.0  # by trio's clock; for us, who may have taken it over
    _console_open: bool = False

    def __post_init__(self) -> None:
        self._restarts = Restarts(self.options.restart)

    @property
    def vmm(self) -> Vmm:
        """The present run's. Raises UklaunchError between two runs."""
        if self._vmm is None:
            raise UklaunchError(f"guest {self.record.pod}/{self.record.name} is not running now")
        return self._vmm

    @property
    def netns(self) -> Path:
        return self.member.netns

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
        """Type on the guest's console, as soon as it is open. Raises trio.BrokenResourceError when the guest is gone;
        what is typed while a guest is being restarted is lost."""
        try:
            if (vmm := self._vmm) is not None:
                if not self._console_open:
                    patience_s = math.inf if self.boot.console_interrupts else CONSOLE_PATIENCE_S
                    with contextlib.suppress(UklaunchError), trio.move_on_at(self._begun_at + patience_s):
                        await vmm.console_open()
                    self._console_open = self._vmm is vmm
                await vmm.console.send_all(data)
        except trio.BrokenResourceError:
            if self.ended.is_set() or self.options.restart.mode is RestartMode.NO:
                raise

    async def wait(self) -> state.GuestRecord:
        """Wait until the guest has ended; its record says how."""
        await self.ended.wait()
        return self.record

    async def stop(self) -> None:
        """Power button, then QEMU's `quit`, then SIGKILL, each after the one before had its time. No restart follows.

        A second call while the first is waiting cuts that wait short. Cancelling it leaves the guest running.
        """
        self._stop_asked = True
        if self._patience is not None:
            self._patience.cancel()
            return
        if self._vmm is None:  # between two runs
            self._life.cancel()
        else:
            mark("stop")
            self.update(status="stopping")
            await self._end_run()
        await self.ended.wait()

    async def _end_run(self) -> None:
        steps: list[tuple[Callable[[], Awaitable[None]], float]] = [(self.vmm.quit, QUIT_TIMEOUT_S)]
        if self.boot.powers_down:
            steps.insert(0, (self._press_power_button, self.options.stop_timeout_s))
        try:
            for step, timeout_s in steps:
                with trio.move_on_after(timeout_s) as self._patience:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(step)
                        await self._over.wait()
                        nursery.cancel_scope.cancel()
                    return
        finally:
            self._patience = None
        self._killed = True
        self.vmm.kill()
        await self._over.wait()

    async def _press_power_button(self) -> None:
        vmm = self.vmm
        await vmm.power_down()
        if not self._up.is_set():  # it may have been too early for the guest to hear
            await self._up.wait()
            await vmm.power_down()

    def update(self, **changes: Any) -> None:
        """Put down what has changed. A full disk loses what others get to know, not the guest."""
        self.record = replace(self.record, **changes)
        self.options.on_change(self.record)
        try:
            state.write_guest(self.record)
        except UklaunchError as exc:
            self.say(exc.message)

    def say(self, text: str) -> None:
        """Tell a person, who may come to read it later."""
        self.options.note(text)
        with contextlib.suppress(OSError), self.record.supervisor_log.open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")

    def tell(self, what: str, **detail: object) -> None:
        events.note(what, self.record.pod, self.record.name, **detail)

    def hand_over(self) -> tuple[int, int] | None:
        """What the next supervisor goes on with if this process becomes it by execve(2): the descriptors of the lock
        and of the console's connection. None if there is nothing to take over now: between two runs, or at the end."""
        if self._vmm is None or self._stop_asked or self.record.status not in ("running", "ready"):
            return None
        self.console.flush()
        return self.lock_fd, self._vmm.console.socket.fileno()

    # --- its life ---

    async def live(
        self,
        connect: Callable[[], Awaitable[None]],
        adopt: StartVmm | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """One run after the other, for as long as the restart policy wants another one.

        `connect`: to the pod, for the first; `adopt`: the VMM of the first, if it runs already.

        From the first run's start on (`task_status`) it is ended by `stop` alone, never by cancellation.
        Raises what keeps the first run from starting; later ones are tried again.
        """
        prepare, start, started = connect, adopt or self.start_vmm, False

        def begun() -> None:
            nonlocal started
            if not started:
                started = True
                task_status.started()
                self._life.shield = True

        try:
            with self._life:
                while True:
                    try:
                        exit_code, ready_s = await self._run(prepare, start, begun)
                    except (UklaunchError, BaseExceptionGroup) as exc:
                        error = exc if isinstance(exc, UklaunchError) else first_error(exc)
                        if not started or error is None:
                            raise
                        self.say(error.message)
                        exit_code, ready_s = int(ExitCode.OURS), 0.0
                        self.update(reason=ExitReason.VMM_FAILED.value, exit_code=exit_code)
                    delay_s = None if self._stop_asked else self._restarts.delay_s(exit_code, ready_s)
                    if delay_s is None:
                        break
                    self.update(status="restarting", restarts=self.record.restarts + 1, health=None)
                    self.tell("restarting", exit_code=exit_code, reason=self.record.reason, delay_s=delay_s)
                    await trio.to_thread.run_sync(self.member.withdraw)
                    await trio.sleep(delay_s)
                    prepare, start = self._rejoin, self.start_vmm
        finally:
            if started:
                self.update(status="exited", exited_at=time.time(), health=None)
                self.tell("stopped", exit_code=self.record.exit_code, reason=self.record.reason)
            self.ended.set()

    async def _rejoin(self) -> None:
        await trio.to_thread.run_sync(self.member.rejoin)

    async def _run(
        self, prepare: Callable[[], Awaitable[None]], start: StartVmm, begun: Callable[[], None]
    ) -> tuple[int, float]:
        """One run, from the VMM's start to its end: (exit code, seconds that it was ready)."""
        self._up, self._over, self._killed, self._unhealthy = trio.Event(), trio.Event(), False, False
        prepared = trio.Event()

        async def prepare_meanwhile() -> None:
            await prepare()
            prepared.set()

        if start is self.start_vmm:
            self.tell("starting")
            self.console.tail = b""  # the last run's exit code is not this one's
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prepare_meanwhile)
            async with start() as vmm:
                await prepared.wait()
                if vmm.adopted:
                    self.update(supervisor_pid=os.getpid())
                    self.tell("taken over")
                    mark("adopted")
                else:
                    # Not `update`: a guest that is known as "starting" has nothing to lose, as `gc` sees it.
                    self.record = state.update_guest(
                        self.record,
                        status="running",
                        vmm_pid=vmm.pid,
                        machine=vmm.machine.value,
                        resumed_at=time.time(),
                    )
                    await vmm.resume()
                    mark("resumed")
                self._vmm, vmm.ours = vmm, True
                self._begun_at, self._console_open = trio.current_time(), self.record.status == "ready"
                begun()
                try:
                    async with trio.open_nursery() as tasks:
                        copied = trio.Event()
                        tasks.start_soon(self._copy_console, vmm, copied)
                        tasks.start_soon(self._or_killed, vmm, self._await_ready)
                        if self.options.health is not None:
                            watch = partial(self._watch_health, self.options.health, tasks)
                            tasks.start_soon(self._or_killed, vmm, watch)
                        exit_code = await self._await_end(vmm, copied)
                        tasks.cancel_scope.cancel()
                finally:
                    self._vmm = None
                    self._over.set()
        ready_s = time.time() - self.record.ready_at if self._up.is_set() and self.record.ready_at else 0.0
        return exit_code, ready_s

    async def _or_killed(self, vmm: Vmm, watch: Callable[[], Awaitable[None]]) -> None:
        """A guest does not outlive what watches it: nobody would know how it is."""
        try:
            await watch()
        except Exception:
            self._killed = True
            vmm.kill()
            raise

    # These two end when the VMM ends, which is sure to: cancelling them would only lose what they have to tell.

    async def _copy_console(self, vmm: Vmm, copied: trio.Event) -> None:
        sink = self.options.on_console
        with trio.CancelScope(shield=True):
            with contextlib.suppress(trio.BrokenResourceError):
                async for data in vmm.console:
                    await self.console.write(bytes(data))
                    if sink is not None:
                        try:
                            await sink(bytes(data))
                        except OSError:  # nobody reads our output any more; the log goes on
                            sink = None
            await self.console.end_line()
        copied.set()

    async def _await_end(self, vmm: Vmm, copied: trio.Event) -> int:
        with trio.CancelScope(shield=True):
            code = await vmm.wait()
            mark("vmm-gone")
            asked = self._stop_asked  # not later: what has ended cannot be stopped
            qmp_reason = await vmm.shutdown_reason()
            with trio.move_on_after(CONSOLE_TIMEOUT_S):
                await copied.wait()
            reason, exit_code = self._outcome(code, qmp_reason, asked)
            if reason is ExitReason.VMM_FAILED:
                self.say(vmm.failure("QEMU ended").message)
            self.update(reason=reason.value, exit_code=exit_code, vmm_pid=0)
        return exit_code

    async def _await_ready(self) -> None:
        if self.record.status == "ready":  # it was before we came
            pass
        elif self.options.ready_port is not None:
            await probes.accepts(self.netns, str(self.ipv4), self.options.ready_port)
        else:
            await probes.answers(self.netns, {self.ipv4, self.ipv6} if self.boot.ipv6 else {self.ipv4})
        if not self._stop_asked and self.record.status != "ready":
            self.update(status="ready", ready_at=time.time())
            self.tell("ready")
        mark("ready")
        self._up.set()
        self.ready.set()
        if self.boot.ipv6 is None:
            # The router serves ::1 by this guest from its first answer on; one that has no IPv6 never gives it.
            await probes.answers(self.netns, {self.ipv6})

    async def _watch_health(self, what: HealthCheck, tasks: trio.Nursery) -> None:
        def tell(healthy: bool) -> None:
            if self._stop_asked:
                return
            self.update(health="healthy" if healthy else "unhealthy")
            self.tell("healthy" if healthy else "unhealthy")
            if not healthy and self.options.restart.mode is not RestartMode.NO:
                self._unhealthy = True
                self.say("unhealthy: ended, to be started again")
                tasks.start_soon(self._end_run)

        self.update(health="starting")
        await probes.watch_health(partial(probes.check, self.netns, what), what, tell)

    def _outcome(self, vmm_code: int, qmp_reason: str, asked: bool) -> tuple[ExitReason, int]:
        """Why the guest ended, and the exit code that says so."""
        own = FAMILIES[self.record.family].exit_status(self.console.tail)
        if self._unhealthy:
            return ExitReason.UNHEALTHY, KILLED
        if self._killed:
            return ExitReason.KILLED, KILLED
        if asked:
            return ExitReason.STOPPED, 0
        if vmm_code != 0:
            return ExitReason.VMM_FAILED, ExitCode.OURS
        if qmp_reason == "watchdog":
            return ExitReason.HUNG, CRASHED
        if own is not None:
            return ExitReason.POWERED_OFF, own
        if qmp_reason == "guest-panic":
            return ExitReason.PANICKED, CRASHED
        if qmp_reason == "guest-reset":  # a panic too, where the guest cannot tell the VMM of it
            return ExitReason.RESET, CRASHED
        return ExitReason.POWERED_OFF, 0


def last_line(console: bytes) -> str:
    """` (it said last: "...")`, or nothing."""
    lines = [line.strip() for line in console.decode(errors="replace").splitlines() if line.strip()]
    printable = "".join(c for c in lines[-1] if c.isprintable())[:120] if lines else ""
    return f' (it said last: "{printable}")' if printable else ""
