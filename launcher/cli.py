"""The command line: parse, print, exit. The only place that prints; every command's work is elsewhere.

stdout carries the guest's console, tables and `--json`; everything else goes to stderr. Imports are made by the
commands that need them: `ps`, `logs` and `stop` load neither trio nor pyroute2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import state
from .errors import ExitCode, ImageNotFound, UklaunchError, UsageError
from .model import Accel, Family, Port, check_name, parse_memory_mib
from .timeline import mark

DEFAULT_BUNDLE = Path("/var/lib/uklaunch/default")
DEFAULT_MEMORY_MIB = 128
NETNS_HINT = "see: ip netns list"

verbosity = 0
debug = False


def complain(error: UklaunchError) -> int:
    """Show an error as people want it: one line, and more only when asked."""
    hint = f" ({error.hint})" if error.hint else ""
    print(f"uklaunch: {error.message}{hint}", file=sys.stderr)
    if verbosity and error.detail:
        print(error.detail.rstrip(), file=sys.stderr)
    return int(error.exit_code)


def note(text: str) -> None:
    print(f"uklaunch: {text}", file=sys.stderr)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, default=str)
    print()


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = [tuple(headings), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# --- run ---


def find_image(argument: str) -> Path:
    path = Path(argument)
    if argument == "default" and not path.exists():
        if not DEFAULT_BUNDLE.exists():
            raise ImageNotFound("the default image has not been built", "build it: uklaunch build-default")
        return DEFAULT_BUNDLE
    return path


def default_name(image: Path, pod: str) -> str:
    """The image's own name, made usable, with a number behind it while a guest of that name runs."""
    base = re.sub(r"[^a-z0-9]+", "-", image.resolve().stem.lower()).strip("-")[:40].strip("-") or "guest"
    name, number = base, 1
    while (old := state.read_guest(pod, name)) is not None and state.alive(old):
        number += 1
        name = f"{base}-{number}"
    return name


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    env = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise UsageError(f"-e {pair!r}: {key!r} is not a variable's name", "write it as -e KEY=VALUE")
        if not equals and key not in os.environ:
            raise UsageError(f"-e {key}: no value, and {key} is not in our own environment", f"-e {key}=VALUE")
        env[key] = value if equals else os.environ[key]
    return env


def cmd_run(args: argparse.Namespace) -> int:
    """All that can be wrong with the arguments is found here, before anything is made."""
    from .image import identify
    from .model import GuestSpec

    check_name("pod", args.pod)
    path = find_image(args.image)
    ports = tuple(Port.parse(text) for text in args.expose)
    memory_mib = parse_memory_mib(args.memory) if args.memory else None
    env = parse_env(args.env)
    if args.cpus is not None and not 1 <= args.cpus <= 255:
        raise UsageError(f"--cpus {args.cpus} is not between 1 and 255")
    image = identify(path, Family(args.family) if args.family else None)
    name = check_name("guest", args.name) if args.name else default_name(path, args.pod)
    require_root()
    spec = GuestSpec(
        name=name,
        pod=args.pod,
        image=image,
        memory_mib=memory_mib or image.memory_mib or DEFAULT_MEMORY_MIB,
        cpus=args.cpus or image.cpus or 1,
        env={**image.env, **env},
        cmdline=args.cmdline,
        ports=tuple(dict.fromkeys((*image.ports, *ports))),
    )
    mark("args")
    from . import foreground

    if args.detach:
        return foreground.run_detached(spec, args, note)
    return foreground.run_attached(spec, args, note)


def require_root() -> None:
    if os.geteuid() != 0:
        raise UklaunchError("namespaces, TAPs and BPF programs need root", "run it with sudo")


# --- guests ---


def status_of(record: state.GuestRecord) -> str:
    if record.exited_at is not None:
        return "exited"
    if state.supervised(record):
        return record.status
    return "unsupervised" if state.vmm_runs(record) else "lost"


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
        ("POD", "GUEST", "STATUS", "AGE", "FAMILY", "ACCEL", "MEMORY", "IPV4", "IPV6", "PORTS"),
        (
            (
                record.pod,
                record.name,
                f"exited ({record.exit_code}, {record.reason})" if status == "exited" else status,
                age(now - record.started_at),
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
    command = ["tail", "-n", str(args.lines) if args.lines is not None else "+1"]
    if args.follow and state.supervised(record):
        # tail waits by inotify, follows over a rotation, and ends with the guest.
        command += ["--follow=name", f"--pid={record.supervisor_pid}", "-q", str(record.console_log)]
    else:
        older = record.console_log.with_suffix(".log.1")
        files = [older] if older.exists() and args.lines is None else []
        command += ["-q", *map(str, files), str(record.console_log)]
    sys.stdout.flush()
    os.execvp(command[0], command)


def cmd_stop(args: argparse.Namespace) -> int:
    from . import control

    for record in [state.find_guest(guest) for guest in args.guests]:
        control.stop(record, args.time)
    return ExitCode.OK


def cmd_rm(args: argparse.Namespace) -> int:
    from . import control

    for record in [state.find_guest(guest) for guest in args.guests]:
        control.remove(record, force=args.force)
    return ExitCode.OK


def cmd_inspect(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    record = state.find_guest(args.guest)
    print_json({**asdict(record), "status": status_of(record), "log": str(record.console_log)})
    return ExitCode.OK


# --- pods ---


def cmd_pod_create(args: argparse.Namespace) -> int:
    from . import pod
    from .model import AddressPlan

    plan = AddressPlan.parse(args.ipv4, args.ipv6)
    check_name("pod", args.pod)
    require_root()
    record = pod.create(args.pod, plan=plan, netns=args.netns)
    note(f"pod {args.pod} is namespace {record.netns}")
    return ExitCode.OK


def cmd_pod_ls(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    rows = [(record, [g.name for g in state.guests(record.name) if state.alive(g)]) for record in state.pods()]
    if args.json:
        print_json([{**asdict(record), "guests": guests} for record, guests in rows])
        return ExitCode.OK
    print_table(
        ("POD", "NAMESPACE", "LOCALHOST FOR GUESTS", "GUESTS"),
        (
            (
                record.name,
                record.netns,
                f"{record.ipv4.partition('/')[0]} {record.ipv6.partition('/')[0]}",
                ",".join(guests) or "-",
            )
            for record, guests in rows
        ),
    )
    return ExitCode.OK


def cmd_pod_inspect(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from . import pod

    record = state.get_pod(args.pod)
    require_root()
    with pod.open_router() as table:
        flows = table.flows(record.id)
        print_json(
            {
                **asdict(record),
                "guests": [asdict(guest) for guest in pod.running_guests(args.pod)],
                "ports": [asdict(port) for port in table.ports(record.id)],
                "flows": len(flows),
                "counters": {str(reason): count for reason, count in table.counters(record.id).items()},
            }
        )
    return ExitCode.OK


def cmd_pod_rm(args: argparse.Namespace) -> int:
    from . import control

    require_root()
    for name in args.pods:
        state.get_pod(name)
        control.remove_pod(name, force=args.force)
    return ExitCode.OK


def cmd_pod_exec(args: argparse.Namespace) -> int:
    from . import net

    record = state.get_pod(args.pod)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("no command to run in the pod", f"uklaunch pod exec {args.pod} -- COMMAND")
    require_root()
    net.enter_pod(Path(record.netns))
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        note(f"{command[0]}: no such command")
        return ExitCode.NOT_FOUND
    except OSError as exc:
        note(f"{command[0]}: {exc.strerror}")
        return ExitCode.NOT_RUNNABLE


def cmd_flows(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from . import pod

    record = state.get_pod(args.pod)
    require_root()
    with pod.open_router() as table:
        flows, counters = table.flows(record.id), table.counters(record.id)
        names = {guest.index: guest.name for guest in pod.running_guests(args.pod)}
    if args.json:
        print_json(
            {
                "flows": [asdict(flow) for flow in flows],
                "counters": {str(reason): count for reason, count in counters.items()},
            }
        )
        return ExitCode.OK
    from router.trace import counter_rows, flow_rows

    headings, rows = flow_rows(flows, names)
    print_table(headings, rows)
    print()
    print_table(*counter_rows(counters))
    return ExitCode.OK


# --- the host ---


def cmd_gc(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from . import control

    require_root()
    done = list(control.collect(kill=args.kill))
    if args.json:
        print_json([asdict(item) for item in done])
    else:
        for item in done:
            print(f"{item.what} {item.name}: {item.action}")
    return ExitCode.OK


def cmd_doctor(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .doctor import examine

    findings = examine()
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            mark = "ok  " if finding.ok else ("FAIL" if finding.required else "note")
            remedy = f"; remedy: {finding.remedy}" if finding.remedy and not finding.ok else ""
            print(f"{mark}  {finding.need}: {finding.found}{remedy}")
    return ExitCode.OK if all(finding.ok or not finding.required for finding in findings) else ExitCode.FAILURE


def cmd_build_default(args: argparse.Namespace) -> int:
    from .bundle import build_default

    build_default(args.directory)
    return ExitCode.OK


def cmd_demo(args: argparse.Namespace) -> int:
    from .demo import demo

    require_root()
    return ExitCode.OK if demo(find_image("default"), print) else ExitCode.FAILURE


# --- arguments ---


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see: {self.prog} --help)", file=sys.stderr)
        raise SystemExit(ExitCode.USAGE)


def port_number(text: str) -> int:
    try:
        return Port.parse(text).number
    except UsageError as exc:
        raise argparse.ArgumentTypeError(exc.message) from None


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return value


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="uklaunch",
        description="Unikernels and microVMs that share localhost with the containers of their pod.",
        epilog="Exit codes: the guest's own; 125 uklaunch or the VMM failed; 126 not runnable; 127 not found; "
        "134 the guest crashed; 137 it was killed; 130 Ctrl-C; 2 bad arguments.",
    )
    top.add_argument("-v", "--verbose", action="store_true", help="say more about errors")
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(
        function: Callable[[argparse.Namespace], int], text: str, *, to: Any = commands, as_json: bool = False
    ) -> argparse.ArgumentParser:
        name = function.__name__.removeprefix("cmd_").removeprefix("pod_").replace("_", "-")
        sub: argparse.ArgumentParser = to.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        if as_json:
            sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    run = add(cmd_run, "run a guest in a pod")
    run.add_argument("image", metavar="IMAGE", help="disk image, kernel or bundle directory; `default`: ours")
    run.add_argument("--pod", required=True, metavar="POD", help="made if it does not exist, and goes with its guests")
    run.add_argument("--name", help="the guest's name and host name (default: the image's)")
    run.add_argument("-m", "--memory", metavar="SIZE", help="such as 128M or 1G")
    run.add_argument("--cpus", type=int, metavar="N")
    run.add_argument("--expose", action="append", default=[], metavar="PORT[/udp]", help="a port that this guest has")
    run.add_argument("-e", "--env", action="append", default=[], metavar="KEY[=VALUE]")
    run.add_argument("--cmdline", help="what the guest runs, instead of what its image says")
    run.add_argument("--family", choices=[family.value for family in Family], help="instead of what the content says")
    run.add_argument("--vmm", choices=["qemu"], default="qemu")
    run.add_argument("--accel", choices=[accel.value for accel in Accel], default="auto")
    run.add_argument("--netns", type=Path, metavar="PATH", help="adopt this namespace as the pod's")
    run.add_argument("-d", "--detach", action="store_true", help="return when the guest is ready")
    run.add_argument("--no-wait", action="store_true", help="with -d: return when the guest has been started")
    run.add_argument("--ready-port", type=port_number, metavar="PORT", help="ready is when this TCP port accepts")
    run.add_argument("--ready-timeout", type=seconds, default=60.0, metavar="SECONDS")
    run.add_argument("--stop-timeout", type=seconds, default=10.0, metavar="SECONDS", help="to power down in")
    run.add_argument("--rm", action="store_true", help="forget the guest and its console when it ends")

    ps = add(cmd_ps, "list guests", as_json=True)
    ps.add_argument("-a", "--all", action="store_true", help="those that have ended, too")
    ps.add_argument("--pod", default=None)

    logs = add(cmd_logs, "show a guest's console")
    logs.add_argument("guest", metavar="GUEST", help="NAME or POD/NAME")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("-n", "--lines", type=int, metavar="N", help="only the last N lines")

    stop = add(cmd_stop, "stop guests in order: power button, quit, kill")
    stop.add_argument("guests", nargs="+", metavar="GUEST")
    stop.add_argument("-t", "--time", type=seconds, metavar="SECONDS", help="to power down in")

    rm = add(cmd_rm, "forget ended guests and their consoles")
    rm.add_argument("guests", nargs="+", metavar="GUEST")
    rm.add_argument("-f", "--force", action="store_true", help="stop them first")

    add(cmd_inspect, "all that is known of a guest, as JSON").add_argument("guest", metavar="GUEST")

    pods = commands.add_parser("pod", help="create, list, inspect and remove pods; run commands in them")
    pod_commands = pods.add_subparsers(dest="pod_command", required=True, metavar="COMMAND", parser_class=Parser)

    create = add(cmd_pod_create, "make a pod that stays until it is removed", to=pod_commands)
    create.add_argument("pod", metavar="POD")
    create.add_argument("--netns", type=Path, metavar="PATH", help="adopt this namespace")
    create.add_argument("--ipv4", metavar="ADDRESS/PREFIX", help="the bridge's, instead of 169.254.77.1/24")
    create.add_argument("--ipv6", metavar="ADDRESS/PREFIX", help="the bridge's, instead of fd00:77::1/64")
    add(cmd_pod_ls, "list pods", to=pod_commands, as_json=True)
    add(cmd_pod_inspect, "all that is known of a pod, as JSON", to=pod_commands).add_argument("pod", metavar="POD")
    pod_rm = add(cmd_pod_rm, "remove pods", to=pod_commands)
    pod_rm.add_argument("pods", nargs="+", metavar="POD")
    pod_rm.add_argument("-f", "--force", action="store_true", help="stop their guests first")
    pod_exec = add(cmd_pod_exec, "run a command in a pod's namespace", to=pod_commands)
    pod_exec.add_argument("pod", metavar="POD")
    pod_exec.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")

    add(cmd_flows, "a pod's flows, and what the router dropped and why", as_json=True).add_argument(
        "pod", metavar="POD"
    )
    gc = add(cmd_gc, "clean up after crashes", as_json=True)
    gc.add_argument("--kill", action="store_true", help="end guests that run without a supervisor")
    add(cmd_doctor, "check what this machine offers, with remedies", as_json=True)
    build = add(cmd_build_default, "build the default image from Debian packages")
    build.add_argument("directory", nargs="?", type=Path, default=DEFAULT_BUNDLE)
    add(cmd_demo, "show a pod whose guests and containers share localhost")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    global verbosity, debug
    mark("cli")
    args = parser().parse_args(argv)
    verbosity, debug = int(args.verbose), args.debug
    try:
        return int(args.function(args))
    except UklaunchError as exc:
        if debug:
            raise
        return complain(exc)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read our output has gone; leave nothing in the buffer for the interpreter to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except BaseExceptionGroup as group:
        from .errors import first_error

        if debug or (error := first_error(group)) is None:
            raise
        return complain(error)
