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
from typing import TYPE_CHECKING, Any

from . import state
from .arguments import DEFAULT_BUNDLE, parser
from .errors import ExitCode, ImageNotFound, UklaunchError, UsageError
from .model import Family, Port, check_name, parse_memory_mib, parse_mtu
from .timeline import mark

if TYPE_CHECKING:
    import router

    from .health import HealthCheck
    from .publish import Publish

DEFAULT_MEMORY_MIB = 128

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


def print_json_line(value: Any) -> None:
    """For what goes on: one object a line, at once."""
    print(json.dumps(value, default=str), flush=True)


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    table = [tuple(headings), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print("\n".join(table_lines(headings, rows)))


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

    if args.config is not None:
        raise UsageError("write --config in full")  # abbreviated, it has not been read
    check_name("pod", args.pod)
    path = find_image(args.image)
    ports = tuple(Port.parse(text) for text in args.expose)
    args.publish = parse_publish(args)
    memory_mib = parse_memory_mib(args.memory) if args.memory else None
    mtu = parse_mtu(args.mtu) if args.mtu else None
    env = parse_env(args.env)
    if args.cpus is not None and not 1 <= args.cpus <= 255:
        raise UsageError(f"--cpus {args.cpus} is not between 1 and 255")
    from .restart import RestartPolicy

    args.restart = RestartPolicy.parse(args.restart)
    args.health = parse_health(args) if args.health else None
    args.after = [check_name("guest", other) for other in args.after]
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
        mtu=mtu,
    )
    mark("args")
    from . import foreground

    if args.detach:
        return foreground.run_detached(spec, args, note)
    return foreground.run_attached(spec, args, note)


def parse_publish(args: argparse.Namespace) -> tuple[Publish, ...]:
    """What -p asks for; --uplink is checked on the way."""
    from . import uplink
    from .publish import Publish

    if args.uplink is not None:
        uplink.parse(args.uplink)
    return tuple(Publish.parse(text) for text in args.publish)


def parse_health(args: argparse.Namespace) -> HealthCheck:
    from .health import HealthCheck

    return HealthCheck.parse(
        args.health, interval_s=args.health_interval, retries=args.health_retries, start_s=args.health_start
    )


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
    start = f"--lines={args.lines}" if args.lines is not None else "--lines=+1"
    files = []
    if args.since is not None:
        from . import console

        older, offset = console.since(record.console_log, args.since)
        start = f"--bytes=+{offset + 1}"
        sys.stdout.buffer.write(older)
        sys.stdout.buffer.flush()
    elif args.lines is None and not args.follow:
        files = [path for path in [record.console_log.with_suffix(".log.1")] if path.exists()]
    if args.follow and state.supervised(record):
        # tail waits by inotify, follows over a rotation, and ends with the guest.
        command = ["tail", start, "--follow=name", f"--pid={record.supervisor_pid}", "-q", str(record.console_log)]
    else:
        command = ["tail", start, "-q", *map(str, files), str(record.console_log)]
    sys.stdout.flush()
    os.execvp(command[0], command)


def cmd_events(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from . import events

    for event in events.follow() if args.follow else events.read():
        if args.pod not in (None, event.pod) or event.time < (args.since or 0):
            continue
        if args.json:
            print_json_line(asdict(event))
        else:
            print(events.line(event), flush=args.follow)
    return ExitCode.OK


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
    publish = parse_publish(args)
    require_root()
    from router import Timeouts

    timeouts = Timeouts(udp_s=args.udp_timeout, tcp_s=args.tcp_timeout)
    record = pod.create(args.pod, plan=plan, netns=args.netns, outside=args.uplink, publish=publish, timeouts=timeouts)
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
    command = args.words[1:] if args.words[:1] == ["--"] else args.words
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


def cmd_pod_graph(args: argparse.Namespace) -> int:
    from .observe import graph, svg

    record = state.get_pod(args.pod)
    require_root()
    picture = svg.draw(graph.look(record, args.interval))
    if args.output is None:
        print(picture, end="")
        return ExitCode.OK
    try:
        args.output.write_text(picture)
    except OSError as exc:
        raise UklaunchError(f"cannot write {args.output}: {exc.strerror}") from exc
    return ExitCode.OK


def cmd_flows(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from . import pod

    record = state.get_pod(args.pod)
    require_root()
    if args.follow:
        return follow_flows(record, args)
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


def follow_flows(record: state.PodRecord, args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from . import pod
    from .observe import follow

    with pod.open_router() as table:
        if not args.json:
            print(follow.heading(), flush=True)
        for event in follow.follow(record, table, args.interval):
            if args.json:
                print_json_line(asdict(event))
            else:
                names = {guest.index: guest.name for guest in pod.running_guests(record.name)}
                print(follow.event_line(event, names), flush=True)
    return ExitCode.OK


def cmd_drops(args: argparse.Namespace) -> int:
    from . import pod

    record = state.get_pod(args.pod)
    require_root()
    with pod.open_router() as table:
        if args.follow:
            follow_drops(record, table, args)
            return ExitCode.OK
        counters = table.counters(record.id)
    from router.model import PASSED, REDIRECTED
    from router.trace import counter_rows

    dropped = {reason: count for reason, count in counters.items() if reason not in (PASSED, REDIRECTED)}
    if args.json:
        print_json({str(reason): count for reason, count in dropped.items()})
    else:
        print_table(*counter_rows(dropped))
    return ExitCode.OK


def follow_drops(record: state.PodRecord, table: router.Router, args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from . import pod
    from .observe import drops

    with table.watch_drops(record.id) as watch:
        if not args.json:
            print(drops.heading(), flush=True)
        names = {guest.index: guest.name for guest in pod.running_guests(record.name)}
        for drop in drops.follow(record, watch, args.limit):
            if isinstance(drop, int):
                print(f"{drop:,} more in that second" if not args.json else f'{{"more": {drop}}}', flush=True)
            elif args.json:
                print_json_line({**asdict(drop), "reason": str(drop.reason)})
            else:
                if drop.guest is not None and drop.guest not in names:
                    names = {guest.index: guest.name for guest in pod.running_guests(record.name)}
                print(drops.line(drop, names), flush=True)


def cmd_stats(args: argparse.Namespace) -> int:
    import shutil
    from dataclasses import asdict

    from .observe import stats

    require_root()
    if args.once:
        usages = stats.usage_once(args.pod)
        if args.json:
            print_json([asdict(usage) for usage in usages])
        else:
            print_table(*stats.total_rows(usages))
        return ExitCode.OK
    in_place = sys.stdout.isatty() and not args.json
    if in_place:
        print("\x1b[2J", end="", flush=True)
    for usages in stats.usage_rates(args.pod, args.interval):
        lines = table_lines(*stats.rate_rows(usages))
        if args.json:
            print_json_line([asdict(usage) for usage in usages])
        elif in_place:
            print(stats.redraw(lines, shutil.get_terminal_size()), end="", flush=True)
        else:
            print("\n".join(lines), end="\n\n", flush=True)
    return ExitCode.OK


def cmd_ports(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .observe import ports

    record = state.get_pod(args.pod)
    require_root()
    served = ports.look(record)
    if args.json:
        print_json([asdict(one) for one in served])
    else:
        print_table(*ports.port_rows(served))
    return ExitCode.OK


def cmd_pcap(args: argparse.Namespace) -> int:
    from .observe import pcap

    target = pcap.find_target(args.target)
    require_root()
    pcap.capture(target, args.write, count=args.count, expression=" ".join(args.filter), say=note)
    return ExitCode.OK


# --- the host ---


def cmd_metrics(args: argparse.Namespace) -> int:
    from .observe import metrics

    require_root()
    if args.once:
        print(metrics.text(), end="")
    else:
        metrics.serve(*args.listen, say=note)
    return ExitCode.OK


def cmd_router_load(args: argparse.Namespace) -> int:
    from . import pod

    require_root()
    with pod.open_router():
        return ExitCode.OK


def cmd_router_status(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    import router

    require_root()
    versions = router.loaded()
    if args.json:
        print_json([asdict(version) for version in versions])
    else:
        for version in versions:
            ours = "" if version.ours else ", of another version of uklaunch"
            print(f"{version.directory}: {version.pods} pods{ours}")
    return ExitCode.OK if any(version.ours for version in versions) else ExitCode.FAILURE


def cmd_router_unload(args: argparse.Namespace) -> int:
    import router

    require_root()
    router.unload_all()
    if left := router.loaded():
        raise UklaunchError(f"{sum(version.pods for version in left)} pods need the router", "see: uklaunch pod ls")
    return ExitCode.OK


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


COMMANDS: dict[tuple[str, str | None], Callable[[argparse.Namespace], int]] = {
    ("run", None): cmd_run,
    ("ps", None): cmd_ps,
    ("logs", None): cmd_logs,
    ("events", None): cmd_events,
    ("stop", None): cmd_stop,
    ("rm", None): cmd_rm,
    ("inspect", None): cmd_inspect,
    ("pod", "create"): cmd_pod_create,
    ("pod", "ls"): cmd_pod_ls,
    ("pod", "inspect"): cmd_pod_inspect,
    ("pod", "rm"): cmd_pod_rm,
    ("pod", "exec"): cmd_pod_exec,
    ("pod", "graph"): cmd_pod_graph,
    ("drops", None): cmd_drops,
    ("flows", None): cmd_flows,
    ("stats", None): cmd_stats,
    ("ports", None): cmd_ports,
    ("pcap", None): cmd_pcap,
    ("metrics", None): cmd_metrics,
    ("router", "load"): cmd_router_load,
    ("router", "status"): cmd_router_status,
    ("router", "unload"): cmd_router_unload,
    ("gc", None): cmd_gc,
    ("doctor", None): cmd_doctor,
    ("build-default", None): cmd_build_default,
    ("demo", None): cmd_demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    global verbosity, debug
    mark("cli")
    try:
        args = parser().parse_args(argv)
        verbosity, debug = int(args.verbose), args.debug
        return COMMANDS[args.command, getattr(args, "subcommand", None)](args)
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
    except (BaseExceptionGroup, OSError, MemoryError) as exc:
        from .errors import first_error

        if debug or (error := first_error(exc)) is None:
            raise
        return complain(error)
