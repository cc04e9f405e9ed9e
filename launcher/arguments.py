"""The command line's arguments, and nothing else: `cli` does what they say."""

from __future__ import annotations

import argparse
import re
import sys
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, NoReturn

from .errors import ExitCode, UsageError, printable
from .model import Accel, Family, LogDriver, Port

DEFAULT_BUNDLE = Path("/var/lib/uklaunch/default")


PCAP = (
    "A guest's TAP shows its conversations whole, as the guest sees them. What the router redirects passes neither the "
    "bridge nor lo's sending side: lo shows it only as it is delivered there, so of a conversation with a guest lo has "
    "what the guest says, the TAP has both sides. The bridge has what is not redirected (ARP, neighbour discovery, "
    "refusals). Devices are those there are at the start: a guest that joins later is not in the file, and said so at "
    "the end; when a captured one goes, the capture ends."
)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    from_file = False  # there is --config FILE
    intermixed = False  # options may also stand between the positional arguments, whose last is any number of words

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.from_file:
            args = self.expanded(args)
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # argparse does it by calling us again
        return self.parse_known_intermixed_args(args, namespace)

    def expanded(self, args: list[str]) -> list[str]:
        """What the file says, as options before those given: the last one wins, and lists add up. Raises UsageError."""
        only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        only.add_argument("--config", type=Path)
        given, rest = only.parse_known_args(args)
        if given.config is None:
            return args
        from . import config

        of_a_command = ("config", "detach", "no_wait", "rm", "take_over", "help")  # not of a guest
        options = {
            action.dest: config.Option(
                flag=max(action.option_strings[:2], key=len),
                many=isinstance(action, argparse._AppendAction),
                path=action.type is Path,
                switch=isinstance(action, argparse._StoreTrueAction),
            )
            for action in self._actions
            if action.option_strings and action.dest not in of_a_command
        }
        return [*config.arguments(given.config, options), *rest]

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {printable(message)} (see: {self.prog} --help)", file=sys.stderr)
        raise SystemExit(ExitCode.USAGE)


class Version(argparse.Action):
    """Prints the version and ends. It is the installed distribution's; to look for that takes time: when asked only."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"{parser.prog} {version('uklaunch')}")
        parser.exit()


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


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def moment(text: str) -> float:
    """Seconds since the epoch: so long ago (`90s`, `10m`, `2h`, `1d`), today (`09:30`), or as ISO 8601 says."""
    now = datetime.now()
    if match := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd])", text):
        return now.timestamp() - float(match[1]) * _UNITS[match[2]]
    if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?", text):
        text = f"{now:%Y-%m-%d}T{text:0>5}"
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 10m, 2h, 09:30, 2026-01-31T09:30") from None


def interval(text: str) -> float:
    value = seconds(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.05 to 3600")
    return value


def listen_address(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    address, _, port = text.rpartition(":")
    try:
        return ip_address(re.sub(r"^\[(.*)\]$", r"\1", address or "127.0.0.1")), port_number(port)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: {address!r} is not an IP address") from None


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def descriptors(text: str) -> tuple[int, int]:
    lock, console = map(int, text.split(":"))
    return lock, console


def outside(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--uplink", "--network", metavar="nat|none|cni:NAME", help="the way out of a pod that is made (default: nat)"
    )
    parser.add_argument(
        "-p",
        "--publish",
        action="append",
        default=[],
        metavar="[IP:]HOST:GUEST[/udp]",
        help="lead a port of this host to one of the guest or pod",
    )


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="uklaunch",
        description="Unikernels and microVMs that share localhost with the containers of their pod.",
        epilog="Exit codes: the guest's own; 125 uklaunch or the VMM failed; 126 not runnable; 127 not found; "
        "134 the guest crashed; 137 it was killed; 130 Ctrl-C; 2 bad arguments.",
    )
    top.add_argument("-v", "--verbose", action="store_true", help="say more about errors")
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    top.add_argument("--version", action=Version, nargs=0, help="show the version, and end")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, text: str, *, to: Any = commands, as_json: bool = False) -> Parser:
        sub: Parser = to.add_parser(name, help=text, description=text)
        if as_json:
            sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    def add_interval(sub: Parser, text: str) -> None:
        sub.add_argument("--interval", type=interval, default=1.0, metavar="SECONDS", help=f"{text} (default: 1)")

    run = add("run", "run a guest in a pod")
    run.from_file = True
    run.add_argument("--config", metavar="FILE.toml", help="IMAGE and options from there; those given here come after")
    run.add_argument(
        "image",
        metavar="IMAGE",
        help="disk image, kernel or bundle; `default`: ours; @sha256:HEX behind it: exactly this one",
    )
    run.add_argument("--pod", required=True, metavar="POD", help="made if it does not exist, and goes with its guests")
    run.add_argument("--name", help="the guest's name and host name (default: the image's)")
    run.add_argument("-m", "--memory", metavar="SIZE", help="such as 128M or 1G")
    run.add_argument("--cpus", metavar="N", help="vCPUs; 0.5: one, and half a CPU's time")
    run.add_argument("--disk-rate", metavar="SIZE", help="of its disks, a second, read and written: such as 10M")
    run.add_argument("--disk-iops", type=positive, metavar="N", help="of its disks, requests a second")
    run.add_argument("--net-rate", metavar="IN[:OUT]", help="of its network, such as 50mbit; one for both directions")
    run.add_argument("--expose", action="append", default=[], metavar="PORT[/udp]", help="a port that this guest has")
    run.add_argument("--mtu", metavar="BYTES", help="of the guest's link, up to 65535 (default: 1500; linux: 32768)")
    run.add_argument(
        "-e", "--env", action="append", default=[], metavar="KEY[=VALUE]", help="KEY alone: with our value"
    )
    run.add_argument(
        "--env-file", action="append", default=[], type=Path, metavar="FILE", help="KEY=VALUE lines; `-`: from stdin"
    )
    run.add_argument("--cmdline", help="what the guest runs, instead of what its image says")
    run.add_argument("--family", choices=[family.value for family in Family], help="instead of what the content says")
    run.add_argument("--vmm", choices=["qemu"], default="qemu")
    run.add_argument("--accel", choices=[accel.value for accel in Accel], default="auto")
    run.add_argument("--netns", type=Path, metavar="PATH", help="adopt this namespace as the pod's")
    outside(run)
    run.add_argument("-d", "--detach", action="store_true", help="return when the guest is ready")
    run.add_argument("--no-wait", action="store_true", help="with -d: return when the guest has been started")
    run.add_argument("--ready-port", type=port_number, metavar="PORT", help="ready is when this TCP port accepts")
    run.add_argument("--ready-timeout", type=seconds, default=60.0, metavar="SECONDS")
    run.add_argument("--stop-timeout", type=seconds, default=10.0, metavar="SECONDS", help="to power down in")
    run.add_argument("--restart", default="no", metavar="no|on-failure[:N]|always", help="start it again when it ends")
    run.add_argument("--health", metavar="CHECK", help="tcp:PORT, http:PORT/PATH or cmd:COMMAND, from inside the pod")
    run.add_argument("--health-interval", type=interval, default=10.0, metavar="SECONDS", help="(default: 10)")
    run.add_argument("--health-retries", type=positive, default=3, metavar="N", help="failures in a row (default: 3)")
    run.add_argument("--health-start", type=seconds, default=30.0, metavar="SECONDS", help="no failure counts before")
    run.add_argument("--take-over", action="store_true", help="if it runs without a supervisor, go on with that one")
    run.add_argument("--after", action="append", default=[], metavar="GUEST", help="wait until it is ready, or healthy")
    run.add_argument("--watchdog", action="store_true", help="a device that the guest must attend to, or it has hung")
    run.add_argument(
        "--log-driver", choices=[driver.value for driver in LogDriver], default="file", help="keeps the console"
    )
    run.add_argument("--rm", action="store_true", help="forget the guest and its console when it ends")

    supervise = add("supervise", "take over a guest that runs without a supervisor")
    supervise.add_argument("guest", metavar="GUEST", help="NAME or POD/NAME")
    supervise.add_argument("-d", "--detach", action="store_true", help="return when it is taken over, and ready")
    supervise.add_argument("--handed", type=descriptors, help=argparse.SUPPRESS)  # by the supervisor that we were

    reload = add("reload", "start guests' supervisors anew, from the code now installed; the guests run on")
    reload.add_argument("guests", nargs="+", metavar="GUEST")

    ps = add("ps", "list guests", as_json=True)
    ps.add_argument("-a", "--all", action="store_true", help="those that have ended, too")
    ps.add_argument("--pod", default=None)

    logs = add("logs", "show a guest's console")
    logs.add_argument("guest", metavar="GUEST", help="NAME or POD/NAME")
    logs.add_argument("-f", "--follow", action="store_true")
    part = logs.add_mutually_exclusive_group()
    part.add_argument("-n", "--lines", type=int, metavar="N", help="only the last N lines")
    part.add_argument("--since", type=moment, metavar="WHEN", help="such as 10m, 2h, 09:30, 2026-01-31T09:30")

    stop = add("stop", "stop guests in order: power button, quit, kill")
    stop.add_argument("guests", nargs="+", metavar="GUEST")
    stop.add_argument("-t", "--time", type=seconds, metavar="SECONDS", help="to power down in")

    rm = add("rm", "forget ended guests and their consoles")
    rm.add_argument("guests", nargs="+", metavar="GUEST")
    rm.add_argument("-f", "--force", action="store_true", help="stop them first")

    add("inspect", "all that is known of a guest, as JSON").add_argument("guest", metavar="GUEST")

    pods = commands.add_parser("pod", help="create, list, inspect and remove pods; run commands in them")
    pod_commands = pods.add_subparsers(dest="subcommand", required=True, metavar="COMMAND", parser_class=Parser)

    create = add("create", "make a pod that stays until it is removed", to=pod_commands)
    create.add_argument("pod", metavar="POD")
    create.add_argument("--netns", type=Path, metavar="PATH", help="adopt this namespace")
    outside(create)
    unused = "forget a flow after so long without a packet (default: "
    create.add_argument("--udp-timeout", type=positive, default=30, metavar="SECONDS", help=unused + "30)")
    create.add_argument("--tcp-timeout", type=positive, default=432000, metavar="SECONDS", help=unused + "five days)")
    create.add_argument("--ipv4", metavar="ADDRESS/PREFIX", help="the bridge's, instead of 169.254.77.1/24")
    create.add_argument("--ipv6", metavar="ADDRESS/PREFIX", help="the bridge's, instead of fd00:77::1/64")
    add("ls", "list pods", to=pod_commands, as_json=True)
    add("inspect", "all that is known of a pod, as JSON", to=pod_commands).add_argument("pod", metavar="POD")
    pod_rm = add("rm", "remove pods", to=pod_commands)
    pod_rm.add_argument("pods", nargs="+", metavar="POD")
    pod_rm.add_argument("-f", "--force", action="store_true", help="stop their guests first")
    pod_exec = add("exec", "run a command in a pod's namespace", to=pod_commands)
    pod_exec.add_argument("pod", metavar="POD")
    pod_exec.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")

    graph = add("graph", "draw a pod: containers, guests, ports, flows with their rates", to=pod_commands)
    graph.add_argument("pod", metavar="POD")
    graph.add_argument("-o", "--output", type=Path, metavar="FILE.svg", help="instead of stdout")
    add_interval(graph, "what rates are taken over")

    flows = add("flows", "a pod's flows, and what the router dropped and why", as_json=True)
    flows.add_argument("pod", metavar="POD")
    flows.add_argument("-f", "--follow", action="store_true", help="a line when a flow opens, changes state, ends")
    add_interval(flows, "with -f: the flow table is sampled this often; states in between are not seen")

    drops = add("drops", "what the router dropped and why", as_json=True)
    drops.add_argument("pod", metavar="POD")
    drops.add_argument("-f", "--follow", action="store_true", help="each packet as it is dropped; one watches a pod")
    drops.add_argument("--limit", type=positive, default=100, metavar="N", help="lines a second (default: 100)")

    add("ports", "who serves what in a pod, and conflicts", as_json=True).add_argument("pod", metavar="POD")

    stats = add("stats", "a live table of traffic, flows, drops, CPU and memory", as_json=True)
    stats.add_argument("pod", nargs="?", metavar="POD", help="only this one and its guests")
    stats.add_argument("--once", action="store_true", help="print totals instead of rates, and end")
    add_interval(stats, "what rates are taken over")

    pcap = add("pcap", "capture packets into a pcapng file, until Ctrl-C")
    pcap.intermixed = True
    pcap.epilog = PCAP
    pcap.add_argument(
        "target", metavar="POD[/GUEST]", help="a pod's devices: lo, bridge, TAPs, uplink; or a guest's TAP"
    )
    pcap.add_argument("-w", "--write", required=True, metavar="FILE", help="pcapng; `-` is stdout")
    pcap.add_argument("--count", type=positive, metavar="N", help="end after N packets")
    pcap.add_argument("filter", nargs="*", metavar="FILTER", help="as in pcap-filter(7), such as: tcp port 80")

    metrics = add("metrics", "all that can be counted, for Prometheus")
    how = metrics.add_mutually_exclusive_group(required=True)
    how.add_argument("--listen", type=listen_address, metavar="[ADDRESS:]PORT", help="serve it (ADDRESS: 127.0.0.1)")
    how.add_argument("--once", action="store_true", help="print it, for the textfile collector")
    told = add("events", "what happens to pods and guests", as_json=True)
    told.add_argument("-f", "--follow", action="store_true", help="go on, as it happens")
    told.add_argument("--pod", default=None)
    told.add_argument("--since", type=moment, metavar="WHEN", help="such as 10m, 2h, 09:30, 2026-01-31T09:30")
    routers = commands.add_parser("router", help="load, show and unload this host's router")
    router_commands = routers.add_subparsers(dest="subcommand", required=True, metavar="COMMAND", parser_class=Parser)
    load = add("load", "load and pin the router now, so that no pod waits for it", to=router_commands)
    status = add(
        "status", "which versions of the router are loaded (exit code 1: not ours)", to=router_commands, as_json=True
    )
    unload = add("unload", "unload the router, unless a pod needs it", to=router_commands)
    for each in (load, status, unload):
        each.add_argument("--user", metavar="USER", help="one of that user's own, who then needs no root")
    load.add_argument("--pods", type=positive, default=8, metavar="N", help="with --user: so many (8; each costs 8 MB)")
    gc = add("gc", "clean up after crashes", as_json=True)
    gc.add_argument("--kill", action="store_true", help="end guests that run without a supervisor")
    add("doctor", "check what this machine offers, with remedies", as_json=True)
    build = add("build-default", "build the default image from Debian packages")
    build.add_argument("directory", nargs="?", type=Path, default=DEFAULT_BUNDLE)
    add("demo", "show a pod whose guests and containers share localhost")
    return top
