"""What goes on in pods: `flows`, `drops`, `stats`, `ports`, `pcap`, `metrics`, `pod graph`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .. import state
from ..errors import ExitCode, UklaunchError
from .needs import require_root
from .output import note, print_json, print_json_line, print_table, table_lines

if TYPE_CHECKING:
    import router


def cmd_pod_graph(args: argparse.Namespace) -> int:
    from ..observe import graph, svg

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

    from .. import pod

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

    from .. import pod
    from ..observe import follow

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
    from .. import pod

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

    from .. import pod
    from ..observe import drops

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

    from ..observe import stats

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

    from ..observe import ports

    record = state.get_pod(args.pod)
    require_root()
    served = ports.look(record)
    if args.json:
        print_json([asdict(one) for one in served])
    else:
        print_table(*ports.port_rows(served))
    return ExitCode.OK


def cmd_pcap(args: argparse.Namespace) -> int:
    from ..observe import pcap

    target = pcap.find_target(args.target)
    require_root()
    pcap.capture(target, args.write, count=args.count, expression=" ".join(args.filter), say=note)
    return ExitCode.OK


def cmd_metrics(args: argparse.Namespace) -> int:
    from ..observe import metrics

    require_root()
    if args.once:
        print(metrics.text(), end="")
    else:
        metrics.serve(*args.listen, say=note)
    return ExitCode.OK
