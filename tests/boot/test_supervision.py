"""Real guests that fail, and what their supervisors do about it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import net, state

from .. import leaks
from ..cli import COMMAND, ok, shown, uklaunch

pytestmark = pytest.mark.boot

POD = "supervised"
TIMEOUT_S = 60


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = leaks.ours()
    yield
    for record in state.guests(POD):
        uklaunch("rm", "--force", f"{record.pod}/{record.name}")
    left = leaks.ours() - before
    assert not left, "left behind:\n" + "\n".join(sorted(left))


class Events:
    """`uklaunch events -f`, from now on."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines = lines
        self.seen: list[tuple[str | None, str]] = []

    def until(self, guest: str, what: str) -> dict[str, Any]:
        for line in self.lines:
            event: dict[str, Any] = json.loads(line)
            self.seen.append((event["guest"], event["what"]))
            if self.seen[-1] == (guest, what):
                return event
        raise AssertionError(f"{what!r} of {guest} never came; these did: {self.seen}")


@pytest.fixture
def events() -> Iterator[Events]:
    command = ["timeout", str(TIMEOUT_S), *COMMAND, "events", "-f", "--json", "--pod", POD, "--since", "0s"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent)
    assert process.stdout is not None
    try:
        yield Events(process.stdout)
    finally:
        process.terminate()
        process.communicate()


def inspect(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("inspect", f"{POD}/{name}"))
    return found


@contextlib.contextmanager
def dialled(port: int) -> Iterator[socket.socket]:
    """A container's connection to the pod's localhost."""
    netns = Path(state.get_pod(POD).netns)
    sock = net.in_netns(netns, lambda: socket.create_connection(("127.0.0.1", port), timeout=10))
    with sock:
        yield sock


def test_a_guest_that_fails_is_started_again_as_often_as_its_policy_says(events: Events) -> None:
    result = uklaunch(
        "run", "default", "--pod", POD, "--name", "n", "--restart", "on-failure:1", "--cmdline", "echo once; exit 3"
    )
    assert result.returncode == 3, shown(result)
    stopped = events.until("n", "stopped")
    assert [what for name, what in events.seen if name == "n" and what != "ready"] == [
        "created", "starting", "restarting", "starting", "stopped",
    ]  # fmt: skip
    assert stopped["detail"] == {"exit_code": 3, "reason": "powered off"}
    assert inspect("n")["restarts"] == 1
    assert ok("logs", "n").count("once") == 2  # the last words of both runs, which ended at once
    assert result.stdout.count("once") == 2


def test_a_guest_that_does_its_work_is_not_started_again() -> None:
    ok("run", "default", "--pod", POD, "--name", "n", "--restart", "on-failure", "--cmdline", "true")
    assert inspect("n")["restarts"] == 0


def test_a_restart_keeps_the_guests_place_and_harms_no_other(events: Events) -> None:
    serve = ("--cmdline", "mkdir /w; hostname >/w/index.html; httpd -f -p $PORT -h /w")
    for name, port in (("a", "8001"), ("b", "8002")):
        ok("run", "default", "--pod", POD, "--name", name, "-d", "--restart", "always", "-e", f"PORT={port}",
           "--expose", port, "--ready-port", port, *serve)  # fmt: skip
    events.until("b", "ready")
    before, netns = inspect("a"), Path(state.get_pod(POD).netns)
    links = net.link_indexes(netns)
    with dialled(8001) as to_a, dialled(8002) as to_b:
        os.kill(before["vmm_pid"], signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            to_a.recv(1)
        assert events.until("a", "restarting")["detail"] == {
            "exit_code": 125, "reason": "VMM failed", "delay_s": 0.5,
        }  # fmt: skip
        with pytest.raises(ConnectionRefusedError), dialled(8001):  # nobody has it now: refused, not a hang
            pass
        events.until("a", "ready")
        to_b.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert to_b.makefile("rb").read().endswith(b"b\n")
    with dialled(8001) as to_a:
        to_a.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert to_a.makefile("rb").read().endswith(b"a\n")
    after = inspect("a")
    assert (after["restarts"], after["status"]) == (1, "ready")
    assert [after[key] for key in ("index", "tap", "ipv4", "ipv6")] == [
        before[key] for key in ("index", "tap", "ipv4", "ipv6")
    ]
    assert net.link_indexes(netns) == links

    os.kill(after["vmm_pid"], signal.SIGKILL)
    assert events.until("a", "restarting")["detail"]["delay_s"] == 1.0
    assert "restarting (125, VMM failed)" in ok("ps")
    ok("stop", "a")  # ends the wait
    assert events.until("a", "stopped")["detail"]["reason"] == "VMM failed"
    ok("stop", "b")  # `always` does not mean after `stop`
    assert state.read_pod(POD) is None


def test_an_unhealthy_guest_is_started_again_and_another_waits_for_it(events: Events) -> None:
    waiting = subprocess.Popen(
        [*COMMAND, "run", "default", "--pod", POD, "--name", "second", "-d", "--after", "first",
         "--cmdline", "sleep 99"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        ok("run", "default", "--pod", POD, "--name", "first", "-d", "--restart", "on-failure",
           "--health", "http:8080/well", "--health-interval", "0.2", "--health-retries", "2", "--cmdline",
           "mkdir /w; sleep 1; echo >/w/well; (sleep 5; rm /w/well) & httpd -f -p 8080 -h /w")  # fmt: skip
        assert events.until("second", "starting")
        assert ("first", "healthy") in events.seen
        assert events.until("first", "unhealthy")
        assert events.until("first", "restarting")["detail"]["reason"] == "unhealthy"
        events.until("first", "healthy")
        assert waiting.wait(TIMEOUT_S) == 0
        assert inspect("first")["health"] == "healthy"
    finally:
        waiting.kill()
        waiting.communicate()


@pytest.mark.parametrize(("how", "reason"), [("echo c >/proc/sysrq-trigger", "panicked"), ("reboot -f", "reset")])
def test_a_panic_is_told_from_a_reset(how: str, reason: str) -> None:
    result = uklaunch("run", "default", "--pod", POD, "--name", "n", "--cmdline", how)
    assert result.returncode == 134, shown(result)
    found = inspect("n")
    assert found["reason"] == (reason if found["machine"] != "microvm" else "reset")  # which has no PCI, so no pvpanic


# Debian's cloud kernels have no driver for it: a word and a byte of the device's PCI configuration space make it count
# down at 1 MHz, twice 2^20 / 33 MHz * 2^5 = 1 s, and enable it (QEMU's hw/watchdog/wdt_i6300esb.c). Nobody reloads it.
HANG = """
cd "$(dirname "$(grep -l 0x25ab /sys/bus/pci/devices/*/device)")"
printf '\\007\\000' | dd of=config bs=2 seek=48 conv=notrunc
printf '\\002' | dd of=config bs=1 seek=104 conv=notrunc
echo I hang; sleep 1000
"""


def test_a_guest_that_its_watchdog_finds_hung_is_started_again(events: Events) -> None:
    result = uklaunch(
        "run", "default", "--pod", POD, "--name", "n", "--watchdog", "--restart", "on-failure:1", "--cmdline", HANG
    )
    assert result.returncode == 134, shown(result)
    assert result.stdout.count("I hang") == 2
    assert events.until("n", "restarting")["detail"] == {"exit_code": 134, "reason": "hung", "delay_s": 0.5}
    assert events.until("n", "stopped")["detail"] == {"exit_code": 134, "reason": "hung"}
    assert "exited (134, hung)" in ok("ps", "-a", "--pod", POD)


def test_who_is_to_come_first_and_does_not_is_an_error_in_time() -> None:
    began = time.monotonic()
    result = uklaunch("run", "default", "--pod", POD, "-d", "--after", "godot", "--ready-timeout", "0.5")
    assert result.returncode == 125, shown(result)
    assert "supervised/godot, which is to come first, was not ready within 0.5 s" in result.stderr
    assert time.monotonic() - began < 10
    assert state.read_pod(POD) is None
