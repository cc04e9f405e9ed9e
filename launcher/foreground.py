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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from .errors import ExitCode, UklaunchError, first_error
from .model import Accel, GuestSpec
from .timeline import mark

if TYPE_CHECKING:
    from .guest import Guest, RunOptions

STDIN, STDOUT = 0, 1
STDIN_PATIENCE_S = 5
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def _options(args: argparse.Namespace, note: Callable[[str], None]) -> RunOptions:
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
        remove_when_done=args.rm,
        note=note,
    )


# --- attached ---


def run_attached(spec: GuestSpec, args: argparse.Namespace, note: Callable[[str], None]) -> int:
    """Until the guest ends; returns the exit code to end with."""
    import trio

    options = _options(args, note)
    with _raw_terminal():
        if "NOTIFY_SOCKET" in os.environ:
            return trio.run(_as_service, spec, options, args.ready_timeout)
        return trio.run(_attached, spec, options)


async def _as_service(spec: GuestSpec, options: RunOptions, ready_timeout_s: float) -> int:
    from dataclasses import replace

    from . import notify

    if (manager := notify.ServiceManager.take()) is None:
        return await _attached(spec, options)
    async with notify.telling(
        manager, ready_timeout_s=ready_timeout_s, stop_timeout_s=options.stop_timeout_s
    ) as on_change:
        return await _attached(spec, replace(options, on_change=on_change))


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


async def _attached(spec: GuestSpec, options: RunOptions) -> int:
    from dataclasses import replace

    import trio

    async def to_stdout(data: bytes) -> None:
        while data:
            # In a thread: a reader that does not read must not stop the supervisor.
            written = await trio.to_thread.run_sync(os.write, STDOUT, data, abandon_on_cancel=True)
            data = data[written:]

    options = replace(options, on_console=to_stdout)
    return await _supervise(spec, options, beside=type_stdin)


async def type_stdin(guest: Guest) -> None:
    """What is typed, or piped, into stdin goes to the guest's console, until either ends."""
    import trio

    with trio.move_on_after(STDIN_PATIENCE_S):
        await guest.ready.wait()  # a kernel that opens its console throws away what has come before
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
    spec: GuestSpec,
    options: RunOptions,
    *,
    first: Callable[[Guest], Awaitable[None]] | None = None,
    beside: Callable[[Guest], Awaitable[None]] | None = None,
) -> int:
    """Run the guest until it ends; SIGINT and SIGTERM stop it in order. Returns the exit code to end with.

    `first` is awaited to its end, `beside` runs until the guest ends. A signal that comes while the guest is being
    launched takes the launch back.
    """
    import trio

    from .run import run_guest

    mark("trio")

    received: list[int] = []
    guest: Guest | None = None
    code = 0

    async def on_signals(signals: AsyncIterator[int], whole: trio.CancelScope) -> None:
        async with trio.open_nursery() as stopping:
            async for number in signals:
                received.append(number)
                if guest is None:
                    whole.cancel()
                else:
                    stopping.start_soon(guest.stop)

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on_signals, signals, nursery.cancel_scope)
            async with run_guest(spec, options) as guest, trio.open_nursery() as work:
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


# --- detached ---


def run_detached(spec: GuestSpec, args: argparse.Namespace, note: Callable[[str], None]) -> int:
    """Start a supervisor of its own session; returns when it says that the guest is ready, or why it is not."""
    reader, writer = os.pipe()
    child = os.fork()  # before trio and pyroute2 are imported: the parent needs neither
    if child == 0:
        os.close(reader)
        os._exit(_detached(spec, args, writer))
    os.close(writer)
    with os.fdopen(reader, "rb") as report:
        lines = _read_report(report, child)
    for line in lines:
        if "note" in line:
            note(line["note"])
        elif "error" in line:
            raise _error(line)
        elif "ready" in line:
            print(f"{spec.pod}/{spec.name}")
            return ExitCode.OK
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (INTERRUPTED, TERMINATED):
        return code
    if code == -signal.SIGTERM:  # once more, while it was on its way out
        return TERMINATED
    raise UklaunchError(
        f"the supervisor of {spec.pod}/{spec.name} ended without a word (code {code})", "clean up: uklaunch gc"
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


def _detached(spec: GuestSpec, args: argparse.Namespace, writer: int) -> int:
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

        options = _options(args, lambda text: tell(note=text))

        async def report(guest: Guest) -> None:
            nonlocal writer
            if not args.no_wait:
                await guest.wait_ready(args.ready_timeout)
            tell(ready=True)
            os.close(writer)  # the parent has heard all it waits for
            writer = -1

        return trio.run(partial(_supervise, spec, options, first=report))
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
