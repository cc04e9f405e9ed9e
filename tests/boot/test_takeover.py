"""Supervisors that die, or are replaced, under guests that do not notice."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from launcher import control, fault, net, state
from launcher.vmm.qemu import CONSOLE_SOCKET

from .. import leaks
from ..cli import COMMAND, ok, shown, uklaunch

pytestmark = pytest.mark.boot

POD = "takeover"
GUEST = f"{POD}/n"
TIMEOUT_S = 30
# Echoes on port 7, counts on its console; a word on port 9 ends it, with that exit code.
SCRIPT = """
mkfifo /f; (while true; do netcat -l 7 </f | cat >/f; done) &
(n=0; while true; do echo count $n; n=$((n + 1)); sleep 0.02; done) &
(until grep -q :0009 /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done; netcat -l 8) &
exit $(netcat -l 9)
"""


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = leaks.ours()
    yield
    for record in state.guests(POD):
        if control.unsupervised(record):
            control.kill_vmm(record)
        uklaunch("rm", "--force", f"{record.pod}/{record.name}")
    for _ in control.collect():
        pass
    left = leaks.ours() - before
    assert not left, "left behind:\n" + "\n".join(sorted(left))


def start(*args: str) -> state.GuestRecord:
    run = ("run", "default", "--pod", POD, "--name", "n", "-d", "--stop-timeout", "5", "--ready-port", "8")
    ok(*run, "--cmdline", SCRIPT, *args)
    return state.find_guest(GUEST)


def kill_supervisor(record: state.GuestRecord) -> None:
    pidfd = os.pidfd_open(record.supervisor_pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert control._ends_within(pidfd, TIMEOUT_S)
    os.close(pidfd)


def dial(port: int) -> socket.socket:
    netns = Path(state.get_pod(POD).netns)
    sock = net.in_netns(netns, partial(socket.create_connection, ("127.0.0.1", port), TIMEOUT_S))
    return sock


def echoes(connection: socket.socket) -> None:
    word = os.urandom(8)
    connection.sendall(word)
    assert connection.recv(8, socket.MSG_WAITALL) == word


def end_guest(code: int) -> None:
    with dial(9) as sock:
        sock.sendall(b"%d\n" % code)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def counts() -> list[int]:
    return [int(n) for n in re.findall(r"^count (\d+)\r?$", state.find_guest(GUEST).console_log.read_text(), re.M)]


def test_a_new_supervisor_takes_over_what_a_dead_one_left() -> None:
    """The guest, an open connection to it, its console, its exit code, its restart policy."""
    before = start("--restart", "on-failure:1")
    with dial(7) as connection:
        echoes(connection)
        kill_supervisor(before)
        assert "unsupervised" in ok("ps")
        assert "supervise" in ok("gc")
        echoes(connection)
        assert ok("supervise", "-d", GUEST) == f"{GUEST}\n"
        echoes(connection)
        now = state.find_guest(GUEST)
        assert (now.vmm_pid, now.status, now.ready_at) == (before.vmm_pid, "ready", before.ready_at)
        assert now.supervisor_pid != before.supervisor_pid
        heard = len(counts())
        until(lambda: len(counts()) > heard)  # it goes on
    end_guest(3)
    until(lambda: state.find_guest(GUEST).restarts == 1)
    assert state.find_guest(GUEST).exit_code == 3
    until(lambda: state.find_guest(GUEST).status == "ready")
    ok("stop", GUEST)
    assert state.find_guest(GUEST).reason == "stopped"


def test_a_supervisor_starts_anew_and_loses_nothing() -> None:
    """Also not a byte of the console, and no signal that comes while it is not there to hear it."""
    before = start("--rm")
    with dial(7) as connection:
        for _ in range(3):
            ok("reload", GUEST)
            echoes(connection)
        now = state.find_guest(GUEST)
        assert (now.vmm_pid, now.supervisor_pid) == (before.vmm_pid, before.supervisor_pid)
        heard = len(counts())
        until(lambda: len(counts()) > heard + 10)
        assert counts() == list(range(len(counts())))
        os.kill(now.supervisor_pid, signal.SIGHUP)
        os.kill(now.supervisor_pid, signal.SIGTERM)
        pidfd = os.pidfd_open(now.supervisor_pid)
        assert control._ends_within(pidfd, TIMEOUT_S)
        os.close(pidfd)
    assert state.read_guest(POD, "n") is None  # as --rm has it; a supervisor killed by SIGTERM would not have


def test_what_cannot_be_taken_over_is_refused() -> None:
    start()
    for command, why in (("supervise", "has a supervisor"), ("run", "is running")):
        args = (
            (command, GUEST)
            if command == "supervise"
            else ("run", "default", "--pod", POD, "--name", "n", "--accel", "tcg")
        )
        refused = uklaunch(*args)
        assert (refused.returncode, why in refused.stderr, refused.stderr.count("\n")) == (2, True, 1), shown(refused)
    ok("stop", GUEST)
    for command, why in (("supervise", "does not run"), ("reload", "has no supervisor")):
        refused = uklaunch(command, GUEST)
        assert (refused.returncode, why in refused.stderr) == (2, True), shown(refused)
    refused = uklaunch("supervise", f"{POD}/nobody")
    assert (refused.returncode, "there is no guest" in refused.stderr) == (2, True), shown(refused)


@pytest.mark.parametrize("action", ["raise", "SIGKILL"])
@pytest.mark.parametrize("step", ["found", "adopted"])
def test_a_takeover_that_fails_harms_nothing(step: str, action: str) -> None:
    """... before it is done; one that fails afterwards ends the guest in order, as any supervisor's end does."""
    record = start()
    kill_supervisor(record)
    with dial(7) as connection:
        failed = subprocess.run(
            [*COMMAND, "supervise", GUEST],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, fault.VARIABLE: f"{step}:{action}"},
            cwd=Path(__file__).parent.parent.parent,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert failed.returncode != 0
        assert "Traceback" not in failed.stderr
        echoes(connection)
        assert control.unsupervised(record)
        ok("supervise", "-d", GUEST)
        echoes(connection)
    assert state.find_guest(GUEST).vmm_pid == record.vmm_pid


def test_run_goes_on_with_a_guest_that_was_left_behind() -> None:
    """As a service manager starts it again after it was killed; and starts it if there is none."""
    run = ("run", "default", "--pod", POD, "--name", "n", "--take-over", "-d", "--stop-timeout", "5")
    ok(*run)
    first = state.find_guest(GUEST)
    kill_supervisor(first)
    ok(*run)
    assert state.find_guest(GUEST).vmm_pid == first.vmm_pid
    assert state.supervised(first)


def test_a_guest_left_behind_is_stopped_in_order() -> None:
    record = start()
    kill_supervisor(record)
    ok("stop", GUEST)
    now = state.find_guest(GUEST)
    assert (now.status, now.reason, now.exit_code) == ("exited", "stopped", 0)
    stopped = json.loads(ok("events", "--pod", POD, "--json").splitlines()[-1])
    assert stopped["what"] in ("stopped", "removed")


def test_a_guest_that_ends_while_nobody_looks() -> None:
    record = start()
    kill_supervisor(record)
    with state.holders(record.directory / "vmm.lock") as pidfds:
        end_guest(0)
        assert all(control._ends_within(pidfd, TIMEOUT_S) for pidfd in pidfds)
    refused = uklaunch("supervise", GUEST)
    assert (refused.returncode, "does not run" in refused.stderr) == (2, True), shown(refused)
    assert "recorded as ended" in ok("gc")


def test_its_sockets_are_for_root_alone() -> None:
    record = start()
    console = record.directory / CONSOLE_SOCKET
    assert console.is_socket()
    nobody = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "test", "-e", str(console)], check=False
    )  # fmt: skip
    assert nobody.returncode == 1
