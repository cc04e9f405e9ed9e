"""Guests that there are: `ps`, `logs`, `events`, `stop`, `rm`, `inspect`. Imports neither trio nor pyroute2."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from .. import state
from ..errors import ExitCode, UklaunchError, UsageError
from ..model import LogDriver
from .output import print_json, print_json_line, print_table

PACKAGES = {"tail": "coreutils", "journalctl": "systemd"}


def status_of(record: state.GuestRecord) -> str:
    if record.exited_at is not None:
        return "exited"
    if state.supervised(record):
        return record.status
    return "unsupervised" if state.vmm_runs(record) else "lost"


def status_text(record: state.GuestRecord, status: str) -> str:
    if status in ("exited", "restarting"):
        return f"{status} ({record.exit_code}, {record.reason})"
    return f"{status} ({record.health})" if record.health else status


def age(seconds: float) -> str:
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def cmd_ps(args: argparse.Namespace) -> int:
    import time
    from dataclasses import asdict

    records = [(record, status_of(record)) for record in state.guests(args.pod)]
    if not args.all:
        records = [(record, status) for record, status in records if status not in ("exited", "lost")]
    if args.json:
        print_json([{**asdict(record), "status": status} for record, status in records])
        return ExitCode.OK
    now = time.time()
    print_table(
        ("POD", "GUEST", "STATUS", "RESTARTS", "AGE", "FAMILY", "ACCEL", "MEMORY", "IPV4", "IPV6", "PORTS"),
        (
            (
                record.pod,
                record.name,
                status_text(record, status),
                record.restarts,
                age(max(0, now - record.started_at)),  # clocks are set back
                record.family,
                record.accel,
                f"{record.memory_mib}M",
                record.ipv4,
                record.ipv6,
                ",".join(record.ports) or "-",
            )
            for record, status in records
        ),
    )
    return ExitCode.OK


def cmd_logs(args: argparse.Namespace) -> int:
    record = state.find_guest(args.guest)
    match LogDriver(record.log_driver):
        case LogDriver.FILE:
            command = _logs_from_file(args, record)
        case LogDriver.JOURNALD:
            command = _logs_from_journal(args, record)
        case LogDriver.NONE:
            raise UsageError(
                f"the console of {record.pod}/{record.name} is kept nowhere", "it was started with --log-driver none"
            )
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise UklaunchError(f"the command {command[0]} is missing", f"apt-get install {PACKAGES[command[0]]}") from None


def _logs_from_file(args: argparse.Namespace, record: state.GuestRecord) -> list[str]:
    """The command that goes on with it."""
    start = f"--lines={args.lines}" if args.lines is not None else "--lines=+1"
    files = []
    if args.since is not None:
        from .. import console

        older, offset = console.since(record.console_log, args.since)
        start = f"--bytes=+{offset + 1}"
        sys.stdout.buffer.write(older)
        sys.stdout.buffer.flush()
    elif args.lines is None and not args.follow:
        files = [path for path in [record.console_log.with_suffix(".log.1")] if path.exists()]
    if args.follow and state.supervised(record):
        # tail waits by inotify, follows over a rotation, and ends with the guest.
        return ["tail", start, "--follow=name", f"--pid={record.supervisor_pid}", "-q", str(record.console_log)]
    return ["tail", start, "-q", *map(str, files), str(record.console_log)]


def _logs_from_journal(args: argparse.Namespace, record: state.GuestRecord) -> list[str]:
    """Of this guest, and none that had its name before; not what others say in its name."""
    import subprocess

    from ..console import journal_fields

    lines = "all" if args.lines is None else args.lines
    command = ["journalctl", "--quiet", "--no-pager", "--output=cat", f"--lines={lines}"]
    if args.since is not None:
        command.append(f"--since=@{args.since:.6f}")
    if args.follow:
        command.append("--follow")
    else:  # what has been sent is on its way
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["journalctl", "--sync"], stderr=subprocess.DEVNULL, check=False)
    return [*command, f"_UID={os.geteuid()}", *journal_fields(record)]


def cmd_events(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .. import events

    for event in events.follow() if args.follow else events.read():
        if args.pod not in (None, event.pod) or event.time < (args.since or 0):
            continue
        if args.json:
            print_json_line(asdict(event))
        else:
            print(events.line(event), flush=args.follow)
    return ExitCode.OK


def cmd_reload(args: argparse.Namespace) -> int:
    from .. import control

    for record in [state.find_guest(guest) for guest in args.guests]:
        control.reload(record)
    return ExitCode.OK


def cmd_stop(args: argparse.Namespace) -> int:
    from .. import control

    for record in [state.find_guest(guest) for guest in args.guests]:
        control.stop(record, args.time)
    return ExitCode.OK


def cmd_rm(args: argparse.Namespace) -> int:
    from .. import control

    for record in [state.find_guest(guest) for guest in args.guests]:
        control.remove(record, force=args.force)
    return ExitCode.OK


def cmd_inspect(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    record = state.find_guest(args.guest)
    log = str(record.console_log) if record.log_driver == LogDriver.FILE else None
    shown = {**asdict(record), "status": status_of(record), "log": log}
    if record.cgroup:
        from .. import cgroup

        shown["cgroup_limits"] = cgroup.in_force(Path(record.cgroup))
    print_json(shown)
    return ExitCode.OK
