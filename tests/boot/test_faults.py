"""What dies, and when: every step of a launch and of a stop fails once, the supervisor is killed there, QEMU is, both.

Afterwards nothing is left, `uklaunch gc` has nothing more to do, the same names can be used again, and another guest
of the pod has not noticed: connections to it and from it that were open before are open still, and carry what they
carried, and so does one between containers.

A guest that is to die before it runs costs no boot. Those that do run are stopped where they begin to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from launcher import GuestSpec, RunOptions, control, fault, identify, net, pod, run_guest, state
from launcher.arguments import DEFAULT_BUNDLE

from .. import leaks
from ..cli import COMMAND, shown, uklaunch

pytestmark = pytest.mark.boot

OLD, NEW = "faults-old", "faults-new"  # the pod with the witness; one that comes and goes with its guest
ECHO = """
mkfifo /f; netcat -l 7 </f | cat >/f &
mkfifo /g; (while :; do netcat localhost 9 </g | cat >/g; sleep 0.1; done) &
until grep -q :0007 /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
netcat -l 8; sleep 100000
"""

# Of a pod that `run` makes, in their order; then of a guest that joins one. The last of a launch: the guest may run.
MAKING = (
    "pod-record",
    "namespace",
    "pod-id",
    "bridge",
    "veth",
    "uplink",
    "pod-row",
    "loopback",
    "uplink-row",
    "pod-made",
)
JOINING = (
    *("tap", "place", "record", "cgroup", "run-file", "vmm-fork", "vmm-exec", "qmp"),
    *("rate-link", "guest-row", "attached", "joined", "resumed"),
)
STOPPING = ("stop", "vmm-gone", "leave", "guest-row-gone")
REMOVING = ("remove", "uplink-gone", "namespace-gone", "pod-row-gone", "pod-forgotten")
STOP = "resumed:SIGTERM,"  # it runs, and is stopped at once

LAUNCH = [*((NEW, step) for step in MAKING), *((OLD, step) for step in JOINING)]
END = [*((OLD, step) for step in STOPPING), *((NEW, step) for step in (*STOPPING, *REMOVING))]


class Witness:
    """A guest that runs all the while, and open connections: to it, from it, and between two containers."""

    def __init__(self, record: state.GuestRecord, stack: contextlib.ExitStack) -> None:
        self.record = record
        netns = Path(state.get_pod(OLD).netns)

        def container() -> socket.socket:
            sock = stack.enter_context(net.in_netns(netns, partial(socket.socket, socket.AF_INET, socket.SOCK_STREAM)))
            sock.settimeout(20)
            return sock

        def listening(port: int) -> socket.socket:
            sock = container()
            sock.bind(("127.0.0.1", port))
            sock.listen()
            return sock

        to_guest, to_container, servers = container(), container(), [listening(9), listening(10)]
        to_guest.connect(("127.0.0.1", 7))
        to_container.connect(("127.0.0.1", 10))
        from_guest, from_container = (stack.enter_context(server.accept()[0]) for server in servers)
        self.ends = [(to_guest, to_guest), (from_guest, from_guest), (to_container, from_container)]
        for sock in (from_guest, from_container):
            sock.settimeout(20)

    def check(self) -> None:
        for talker, listener in self.ends:
            word = os.urandom(8)
            talker.sendall(word)
            assert listener.recv(8, socket.MSG_WAITALL) == word
        (now,) = [guest for guest in pod.running_guests(OLD) if guest.name == self.record.name]
        assert now == self.record
        with pod.open_router() as table:
            assert [row.index for row in table.guests(state.get_pod(OLD).id)] == [now.index]


@pytest.fixture(scope="module")
def witness() -> Iterator[Witness]:
    run = ("run", "default", "--pod", OLD, "--name", "witness", "-d", "--rm", "--ready-port", "8", "--cmdline", ECHO)
    started = uklaunch(*run)
    assert started.returncode == 0, shown(started)
    with contextlib.ExitStack() as stack:
        yield Witness(state.find_guest(f"{OLD}/witness"), stack)
    stopped = uklaunch("stop", "-t", "0", f"{OLD}/witness")
    assert stopped.returncode == 0, shown(stopped)
    assert state.read_pod(OLD) is None


@pytest.fixture
def before(witness: Witness) -> Iterator[set[str]]:
    """What there is of ours; after the test, also when it fails, all else is gone."""
    found = leaks.ours()
    yield found
    for _ in control.collect(kill=True):
        pass
    witness.check()


@contextlib.contextmanager
def launched(name: str, faults: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """`uklaunch run` in the foreground: the supervisor is this process."""
    process = subprocess.Popen(
        [
            *COMMAND,
            "run",
            "default",
            "--pod",
            name,
            "--name",
            "n",
            "--stop-timeout",
            "0",
            "--accel",
            "tcg",
            "--net-rate",
            "1gbit",
            *args,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, fault.VARIABLE: faults},
        cwd=Path(__file__).parent.parent.parent,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, err


def leaked(before: set[str]) -> set[str]:
    inside = net.link_indexes(Path(state.get_pod(OLD).netns))
    return leaks.ours() - before | {name for name in inside if name.startswith(net.RATE_LINK)}


def clean_up(before: set[str]) -> None:
    """gc, as a timer would call it, and again."""
    for _ in control.collect(kill=True):
        pass
    assert not leaked(before)
    assert list(control.collect()) == []
    assert not any((state.root() / "pods").glob(f"{NEW}*"))


def runs_again(name: str, before: set[str]) -> None:
    """The next run of the same names gets as far as to let its guest run, and leaves nothing."""

    async def brief() -> None:
        spec = GuestSpec(name="n", pod=name, image=identify(DEFAULT_BUNDLE))
        async with run_guest(spec, RunOptions(stop_timeout_s=0, remove_when_done=True)):
            pass

    trio.run(brief)
    assert not leaked(before)


def vmm_of(supervisor: int) -> list[int]:
    """Its QEMU, if it has one, also before it has become QEMU."""
    tasks = Path(f"/proc/{supervisor}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


@contextlib.contextmanager
def held_still(process: subprocess.Popen[str]) -> Iterator[None]:
    """It has stopped itself at its step; it goes on at the end, if it still lives."""
    stopped = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert stopped is not None
    assert stopped.si_code == os.CLD_STOPPED, end(process)
    yield
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(("name", "step"), LAUNCH)
def test_a_launch_that_fails_takes_itself_back(name: str, step: str, before: set[str]) -> None:
    with launched(name, f"{step}:raise") as process:
        code, err = end(process)
    assert (code, f"made to fail at step '{step}'" in err) == (125, True), err
    assert not leaked(before)
    clean_up(before)
    runs_again(name, before)


@pytest.mark.parametrize(("name", "step"), LAUNCH)
def test_a_supervisor_killed_while_it_launches(name: str, step: str, before: set[str]) -> None:
    with launched(name, f"{step}:SIGKILL", "--rm") as process:
        assert end(process)[0] == -signal.SIGKILL
    clean_up(before)
    runs_again(name, before)


@pytest.mark.parametrize(
    ("name", "step"),
    [case for case in LAUNCH if case[1] in ("bridge", "vmm-fork", "vmm-exec", "qmp", "attached", "joined", "resumed")],
)
def test_qemu_killed_while_it_is_launched(name: str, step: str, before: set[str]) -> None:
    with launched(name, f"{step}:SIGSTOP", "--rm") as process:
        with held_still(process):
            for pid in vmm_of(process.pid):
                os.kill(pid, signal.SIGKILL)
        code, err = end(process)
    assert (code, "SIGKILL" in err) == (125, True), err
    assert not leaked(before)
    runs_again(name, before)


@pytest.mark.parametrize(("name", "step"), END)
def test_a_stop_that_fails(name: str, step: str, before: set[str], witness: Witness) -> None:
    with launched(name, f"{STOP}{step}:raise", "--rm") as process:
        code, err = end(process)
    assert (code, f"made to fail at step '{step}'" in err) == (125, True), err
    # All else has been done; a pod's record stays, to be looked after by whoever comes next: gc, or the next run.
    record = f"file {state.pod_file(NEW)}"
    assert leaked(before) == ({record} if step in ("namespace-gone", "pod-row-gone") else set())
    witness.check()
    runs_again(name, before)
    clean_up(before)


@pytest.mark.parametrize(("name", "step"), END)
def test_a_supervisor_killed_while_it_stops(name: str, step: str, before: set[str]) -> None:
    with launched(name, f"{STOP}{step}:SIGKILL", "--rm") as process:
        assert end(process)[0] == -signal.SIGKILL
    clean_up(before)
    runs_again(name, before)


@pytest.mark.parametrize("action", ["raise", "EMFILE"])
def test_a_guest_that_cannot_be_watched_is_ended(action: str, before: set[str]) -> None:
    with launched(NEW, f"ready:{action}", "--rm") as process:
        code, err = end(process)
    assert (code, ("step 'ready'" if action == "raise" else "Too many open files") in err) == (125, True), err
    assert not leaked(before)


def test_a_supervisor_killed_when_its_guest_is_ready(before: set[str]) -> None:
    with launched(NEW, "ready:SIGKILL", "--rm") as process:
        assert end(process)[0] == -signal.SIGKILL
    (left,) = control.collect()
    assert left.action.startswith("runs without a supervisor; left")
    clean_up(before)
    runs_again(NEW, before)


@pytest.mark.parametrize("step", ["vmm-exec", "qmp", "attached", "stop"])
def test_supervisor_and_qemu_killed_together(step: str, before: set[str]) -> None:
    with launched(OLD, f"{STOP}{step}:SIGSTOP", "--rm") as process:
        with held_still(process):
            victims = vmm_of(process.pid)
            process.kill()
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
        assert end(process)[0] == -signal.SIGKILL
    clean_up(before)
    runs_again(OLD, before)


def test_a_launch_cut_off_before_its_guest_ran_is_collected_without_being_told(before: set[str]) -> None:
    with launched(OLD, "qmp:SIGKILL") as process:
        end(process)
    said = [f"{item.name}: {item.action}" for item in control.collect()]
    assert f"{OLD}/n: ran without a supervisor; ended" in said
    assert not leaked(before)


def test_a_second_guest_of_a_name_is_refused_and_the_first_keeps_its_pod(before: set[str]) -> None:
    """Also where it is the pod's only guest: its pod must not go with the one that was refused."""
    run = ("run", "default", "--pod", NEW, "--name", "n", "-d", "--rm", "--no-wait")
    assert uklaunch(*run).returncode == 0
    refused = uklaunch(*run)
    assert (refused.returncode, "is running" in refused.stderr) == (2, True), shown(refused)
    assert state.read_pod(NEW) is not None
    assert [guest.name for guest in pod.running_guests(NEW)] == ["n"]
    assert uklaunch("stop", "-t", "0", f"{NEW}/n").returncode == 0
    assert not leaked(before)
