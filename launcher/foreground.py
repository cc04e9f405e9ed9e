"""`uklaunch run` on a terminal, and behind one's back.

Attached: the console on stdout, stdin to the guest, signals to `Guest.stop`. Detached: the same supervisor in a
process of its own session, which tells the command that started it when the guest is ready, through a pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import rootless
from .errors import ExitCode, UklaunchError, first_error
from .model import Accel, GuestSpec, LogDriver
from .timeline import mark

if TYPE_CHECKING:
    from .guest import Guest, RunOptions
    from .notify import ServiceManager
    from .state import GuestRecord

STDIN, STDOUT = 0, 1
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _ourselves() -> list[str]:
    """The command that this process is, without our arguments. Asked early: the working directory changes."""
    *words, script = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv[1:])]
    return [sys.executable, *words, str(Path(script).absolute()) if Path(script).is_file() else script]


_OURSELVES = _ourselves()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A guest to be supervised, and how it begins: none of it imports trio before it is called."""

    pod: str
    name: str
    options: Callable[[Callable[[str], None]], RunOptions]  # from what a person is to be told with
    begin: Callable[[RunOptions], contextlib.AbstractAsyncContextManager[Guest]]
    ready_timeout_s: float = 60.0
    wait: bool = True  # detached: until the guest is ready
    runs_already: bool = False


def launch(spec: GuestSpec, args: argparse.Namespace) -> Job:
    """What `uklaunch run` does."""

    def options(note: Callable[[str], None]) -> RunOptions:
        from .guest import RunOptions

        return RunOptions(
            vmm=args.vmm,
            accel=Accel(args.accel),
            netns=args.netns,
            uplink=args.uplink,
            publish=args.publish,
            ready_port=args.ready_port,
            stop_timeout_s=args.stop_timeout,
            restart=args.restart,
            health=args.health,
            after=tuple(args.after),
            after_timeout_s=args.ready_timeout,
            limits=args.limits,
            remove_when_done=args.rm,
            log_driver=LogDriver(args.log_driver),
            note=note,
        )

    def begin(options: RunOptions) -> contextlib.AbstractAsyncContextManager[Guest]:
        from .run import run_guest

        return run_guest(spec, options)

    return Job(
        pod=spec.pod,
        name=spec.name,
        options=options,
        begin=begin,
        ready_timeout_s=args.ready_timeout,
        wait=not args.no_wait,
    )


def takeover(pod: str, name: str, handed: tuple[int, int] | None = None) -> Job:
    """What `uklaunch supervise` does. `handed`: descriptors of a supervisor that has become us, see `_start_anew`."""

    def options(note: Callable[[str], None]) -> RunOptions:
        from . import runfile, state

        return replace(runfile.read(state.guest_dir(pod, name))[1], note=note)

    def begin(options: RunOptions) -> contextlib.AbstractAsyncContextManager[Guest]:
        from .takeover import Handed, take_over

        return take_over(pod, name, options, handed=None if handed is None else Handed(*handed))

    return Job(pod=pod, name=name, options=options, begin=begin, runs_already=True)


def stop_left_behind(record: GuestRecord, timeout_s: float | None) -> None:
    """Stop, in order, a guest that runs without a supervisor. Raises UklaunchError if it cannot be taken over."""
    import trio

    from .takeover import take_over

    async def stop() -> None:
        async with take_over(record.pod, record.name, stop_timeout_s=timeout_s):
            pass  # whose end is to stop it

    try:
        trio.run(stop)
    except BaseExceptionGroup as exc:
        raise (first_error(exc) or exc) from exc


# --- attached ---


def run_attached(job: Job, note: Callable[[str], None]) -> int:
    """Until the guest ends; returns the exit code to end with."""
    import trio

    options = job.options(note)
    with _raw_terminal():
        if "NOTIFY_SOCKET" in os.environ:
            return trio.run(_as_service, job, options)
        return trio.run(_attached, job, options)


async def _as_service(job: Job, options: RunOptions) -> int:
    from . import notify

    if (manager := notify.ServiceManager.take()) is None:
        return await _attached(job, options)
    async with notify.telling(
        manager, ready_timeout_s=job.ready_timeout_s, stop_timeout_s=options.stop_timeout_s
    ) as on_change:
        return await _attached(job, replace(options, on_change=on_change), manager)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """The guest echoes and edits what is typed; Ctrl-C stays ours."""
    if not os.isatty(STDIN):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(STDIN)
    tty.setcbreak(STDIN, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)


async def _attached(job: Job, options: RunOptions, manager: ServiceManager | None = None) -> int:
    import trio

    from . import journal

    async def to_stdout(data: bytes) -> None:
        while data:
            # In a thread: a reader that does not read must not stop the supervisor.
            written = await trio.to_thread.run_sync(os.write, STDOUT, data, abandon_on_cancel=True)
            data = data[written:]

    # What goes to the journal anyway would be there twice.
    if options.log_driver is not LogDriver.JOURNALD or not journal.is_ours(STDOUT):
        options = replace(options, on_console=to_stdout)
    return await _supervise(job, options, beside=type_stdin, manager=manager)


async def type_stdin(guest: Guest) -> None:
    """What is typed, or piped, into stdin goes to the guest's console, until either ends."""
    import trio

    while True:
        try:
            await trio.lowlevel.wait_readable(STDIN)
        except OSError:  # a regular file or /dev/null: epoll does not take it, and it never blocks
            await trio.lowlevel.checkpoint()
        data = os.read(STDIN, 4096)
        if not data:
            return
        try:
            await guest.send(data)
        except trio.BrokenResourceError:
            return


async def _supervise(
    job: Job,
    options: RunOptions,
    *,
    first: Callable[[Guest], Awaitable[None]] | None = None,
    beside: Callable[[Guest], Awaitable[None]] | None = None,
    manager: ServiceManager | None = None,
) -> int:
    """Supervise the guest until it ends; SIGINT and SIGTERM stop it in order. Returns the exit code to end with.

    `first` is awaited to its end, `beside` runs until the guest ends. A signal that comes while the guest is being
    launched takes the launch back; while it is being taken over, it stops it afterwards. SIGHUP: the terminal has gone,
    which is as SIGTERM; a supervisor that has none starts anew.
    """
    import trio

    mark("trio")

    received: list[int] = []
    guest: Guest | None = None
    code = 0

    async def on_signals(signals: AsyncIterator[int], whole: trio.CancelScope) -> None:
        async with trio.open_nursery() as stopping:
            async for number in signals:
                if number == signal.SIGHUP and not _has_terminal():
                    if guest is not None:
                        await _start_anew(guest, manager, signals)
                    continue
                received.append(number)
                if guest is not None:
                    stopping.start_soon(guest.stop)
                elif not job.runs_already or len(received) > 1:
                    whole.cancel()

    with trio.open_signal_receiver(*_SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see `_start_anew`
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on_signals, signals, nursery.cancel_scope)
            async with job.begin(options) as guest, trio.open_nursery() as work:
                if received:
                    work.start_soon(guest.stop)
                if beside is not None:
                    work.start_soon(beside, guest)
                if first is not None:
                    await first(guest)
                record = await guest.wait()
                code = record.exit_code or 0
                work.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
    if signal.SIGINT in received:
        return INTERRUPTED
    if guest is None and received:
        return TERMINATED
    return code


def _has_terminal() -> bool:
    """Is there a controlling terminal, which can hang up?"""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def _start_anew(guest: Guest, manager: ServiceManager | None, signals: AsyncIterator[int]) -> None:
    """Become a new supervisor, of the code that is installed now, which takes the guest over; returns if that cannot
    be. In this same process, so QEMU stays a child of ours, and a service manager's main process remains what it is.

    The lock is never released, no byte of the console is lost, and a signal that comes in between waits.
    """
    import trio

    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with trio.move_on_after(0.05):  # those that have come already are to come again, to this thread, after execve
        async for number in signals:
            signal.pthread_kill(threading.get_ident(), number)
    handed = guest.hand_over()
    if handed is None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        guest.say("asked to start anew, and did not: the guest is not running now")
        return
    command = [*_OURSELVES, "supervise", f"{guest.record.pod}/{guest.record.name}"]
    environ = dict(os.environ)
    if manager is not None:
        environ |= manager.environ()
        manager.tell_now(RELOADING=1)
    try:
        for fd in handed:
            os.set_inheritable(fd, True)
        os.execve(command[0], [*command, "--handed", ":".join(map(str, handed))], environ)
    except OSError as exc:
        for fd in handed:
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        guest.say(f"cannot start anew: {command[0]}: {exc.strerror}")


# --- detached ---


def run_detached(job: Job, note: Callable[[str], None]) -> int:
    """Start a supervisor of its own session; returns when it says that the guest is ready, or why it is not."""
    reader, writer = os.pipe()
    child = os.fork()  # before trio and pyroute2 are imported: the parent needs neither
    if child == 0:
        os.close(reader)
        code = _detached(job, writer)
        rootless.leave()  # os._exit forgets what is to be done at the end
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as report:
        lines = _read_report(report, child)
    for line in lines:
        if "note" in line:
            note(line["note"])
        elif "error" in line:
            raise _error(line)
        elif "ready" in line:
            print(f"{job.pod}/{job.name}")
            return ExitCode.OK
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (INTERRUPTED, TERMINATED):
        return code
    if code == -signal.SIGTERM:  # once more, while it was on its way out
        return TERMINATED
    raise UklaunchError(
        f"the supervisor of {job.pod}/{job.name} ended without a word (code {code})", "clean up: uklaunch gc"
    )


def _read_report(report: object, child: int) -> list[dict[str, str]]:
    """What the child says until it says that it is done. Ctrl-C goes on to the child, which takes the launch back."""
    lines: list[dict[str, str]] = []
    while True:
        try:
            for raw in report:  # type: ignore[attr-defined]
                lines.append(json.loads(raw))
            return lines
        except KeyboardInterrupt:
            os.kill(child, signal.SIGINT)  # our own child, not yet waited for: the pid is its


def _error(line: dict[str, str]) -> UklaunchError:
    error = UklaunchError(line["error"], line["hint"], line["detail"])
    error.exit_code = ExitCode(int(line["code"]))
    return error


def _detached(job: Job, writer: int) -> int:
    """The child. Never raises: its parent's report is all that it can say."""
    import traceback

    def tell(**line: object) -> None:
        with contextlib.suppress(OSError):
            os.write(writer, json.dumps(line).encode() + b"\n")

    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        import trio

        options = job.options(lambda text: tell(note=text))

        async def report(guest: Guest) -> None:
            nonlocal writer
            if job.wait:
                await guest.wait_ready(job.ready_timeout_s)
            tell(ready=True)
            os.close(writer)  # the parent has heard all it waits for
            writer = -1

        return trio.run(partial(_supervise, job, options, first=report))
    except BaseException as exc:
        exc = first_error(exc) or exc
        if isinstance(exc, UklaunchError):
            tell(error=exc.message, hint=exc.hint, detail=exc.detail, code=int(exc.exit_code))
        else:
            tell(
                error=f"a bug: {exc!r}",
                hint="-v shows where; please report it",
                detail="".join(traceback.format_exception(exc)),
                code=int(ExitCode.OURS),
            )
        return ExitCode.OURS
