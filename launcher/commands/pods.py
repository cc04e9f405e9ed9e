"""Pods: `pod create`, `ls`, `inspect`, `rm`, `exec`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .. import state
from ..errors import ExitCode, UsageError
from ..model import check_name
from .needs import require_root
from .output import note, print_json, print_table
from .run import parse_publish

if TYPE_CHECKING:
    pass


def cmd_pod_create(args: argparse.Namespace) -> int:
    from .. import pod
    from ..model import AddressPlan

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

    from .. import pod

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
    from .. import control

    require_root()
    for name in args.pods:
        state.get_pod(name)
        control.remove_pod(name, force=args.force)
    return ExitCode.OK


def cmd_pod_exec(args: argparse.Namespace) -> int:
    from .. import net

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
