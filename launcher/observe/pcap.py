"""Packets of a pod or a guest as pcapng, by dumpcap(1): Wireshark's own capture program, which needs no Wireshark.

dumpcap is started in the pod's namespace, writes the file itself and ends it in order on SIGINT.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .. import net, state
from ..errors import UklaunchError, UsageError
from .sample import in_pod

_RECEIVED = re.compile(r"^Packets received/dropped on interface '(?:Loopback: )?(.*)': (\d+)/\d+", re.MULTILINE)
_LOST = re.compile(r"\(pcap:(\d+)/dumpcap:(\d+)/")  # not those beyond --count, which are "flushed"
_GONE = re.compile(r'The network adapter "(.*)" is no longer attached')
_FLUSH_S = 0.5  # dumpcap reads every 250 ms (its CAP_READ_TIMEOUT), and when told to end does not read once more
_READY = "File: "  # said when every interface is open and the filter is set


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`interface` None: all of the pod's."""

    pod: state.PodRecord
    interface: str | None


def find_target(text: str) -> Target:
    """POD or POD/GUEST. Raises UsageError if there is no such pod, or no such guest that runs."""
    name, slash, _ = text.partition("/")
    if not slash:
        return Target(pod=state.get_pod(name), interface=None)
    guest = state.find_guest(text)
    if not state.alive(guest):
        raise UsageError(f"guest {text!r} does not run", "see the guests that do: uklaunch ps")
    return Target(pod=state.get_pod(name), interface=guest.tap)


def _interfaces(record: state.PodRecord) -> list[str]:
    """Those that are up: `lo`, the bridge, then the others."""

    def body() -> str:
        return subprocess.run(["ip", "-j", "link", "show", "up"], capture_output=True, text=True, check=True).stdout

    names = [link["ifname"] for link in json.loads(in_pod(record, body))]
    return sorted(names, key=lambda name: (name != "lo", name != net.BRIDGE, len(name), name))


def capture(target: Target, file: str, *, count: int | None, expression: str, say: Callable[[str], None]) -> None:
    """Until `count` packets, SIGINT or SIGTERM; the file is whole then. `file` may be `-`, stdout.

    Raises UklaunchError if dumpcap is missing, or cannot do it: a bad filter, a file that cannot be written.
    """
    if shutil.which("dumpcap") is None:
        raise UklaunchError("the command dumpcap is missing", "apt-get install wireshark-common")
    if file == "-" and sys.stdout.isatty():
        raise UsageError("pcapng is not for a terminal", "-w FILE, or pipe it: -w - | wireshark -k -i -")
    interfaces = [target.interface] if target.interface else _interfaces(target.pod)
    command = [
        *("nsenter", f"--net={target.pod.netns}"),
        *("setpriv", "--pdeathsig", "INT"),
        *("dumpcap", "-q", "-n", "-w", file),
        *(("-c", str(count)) if count else ()),
        *(("-f", expression) if expression else ()),
        *(word for name in interfaces for word in ("-i", name)),
    ]
    # In a session of its own: Ctrl-C is for us to hand on, once.
    with (
        subprocess.Popen(
            command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True
        ) as dumpcap,
        _handing_on_signals(dumpcap),
    ):
        said = ""
        assert dumpcap.stderr is not None
        for line in dumpcap.stderr:
            said += line
            if line.startswith(_READY):
                say(f"capturing {', '.join(interfaces)}; Ctrl-C ends it")
        dumpcap.wait()
    # A reader of `-` that has gone has what it wanted.
    if dumpcap.returncode and "Broken pipe" not in said:
        raise _failure(said, expression, file)
    if gone := _GONE.search(said):
        say(f"{gone[1]} is gone, and with it the capture ended")
    if not target.interface and (new := set(_interfaces_left(target.pod)) - set(interfaces)):
        say(f"came later, not captured: {', '.join(sorted(new))}")
    counts = ", ".join(f"{name} {count}" for name, count in _RECEIVED.findall(said))
    lost = sum(int(count) for counts in _LOST.findall(said) for count in counts)
    say(f"packets captured: {counts}" + (f"; LOST for want of speed: {lost}" if lost else ""))


def _failure(said: str, expression: str, file: str) -> UklaunchError:
    if "Invalid capture filter" in said:
        why = re.search(r"capture filter \((?:can't parse filter expression: )?(.*)\)\.", said)
        return UsageError(
            f"filter {expression!r} is not valid: {why[1] if why else 'libpcap refuses it'}",
            "see pcap-filter(7); such as: tcp port 80",
        )
    if why := re.search(r"could not be opened: (.*)\.", said):
        return UklaunchError(f"cannot write {file}: {why[1]}")
    errors = [line.partition(": ")[2] for line in said.splitlines() if line.startswith("dumpcap: ")]
    return UklaunchError(f"dumpcap failed: {' '.join(errors[:1]) or 'without a word'}", "-v shows all it said", said)


def _interfaces_left(record: state.PodRecord) -> list[str]:
    try:
        return _interfaces(record)
    except UklaunchError:  # the pod was removed meanwhile
        return []


@contextmanager
def _handing_on_signals(process: subprocess.Popen[str]) -> Iterator[None]:
    """SIGINT and SIGTERM end it in order, once it has read what the kernel has captured up to now."""

    def end(*_: object) -> None:
        threading.Timer(_FLUSH_S, process.send_signal, (signal.SIGINT,)).start()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
