"""Twenty commands at once on one pod: each does what it is for or says in a line why not, and nothing is torn."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import router
from launcher import control, net, pod, state

from .. import leaks
from ..cli import COMMAND, uklaunch

pytestmark = pytest.mark.boot

POD = "parallel"
SEED = int(os.environ.get("UKLAUNCH_TEST_SEED", "0"))
RUN = ("run", "default", "--pod", POD, "-d", "--no-wait", "--accel", "tcg", "--stop-timeout", "0")
COMMANDS = [
    *((*RUN, "--name", name) for name in ("a", "a", "a", "b", "b", "c")),
    *((*RUN, "--rm", "--name", name) for name in ("a", "d")),
    *(("stop", "-t", "0", f"{POD}/{name}") for name in ("a", "b", "c")),
    *(("rm", "--force", f"{POD}/{name}") for name in ("a", "b")),
    ("pod", "rm", "--force", POD),
    ("pod", "rm", POD),
    ("pod", "create", POD),
    ("gc",),
    ("gc",),
    ("ps", "-a"),
    ("pod", "ls"),
]
STOPPED = 128 + signal.SIGTERM  # while it was being launched
REFUSALS = (  # what may be said when another came first
    "there is no guest",
    "there is no pod",
    "is running",
    "has running guests",
    f"pod '{POD}' exists",
)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = leaks.ours()
    yield
    for record in state.guests(POD):
        uklaunch("rm", "--force", f"{POD}/{record.name}")
    if state.read_pod(POD) is not None:
        uklaunch("pod", "rm", "--force", POD)
    assert list(control.collect()) == []
    assert not leaks.ours() - before
    assert not list((state.root() / "pods").glob(f"{POD}*"))
    assert not (state.root() / "guests" / POD).exists()


def settle() -> None:
    """Wait for supervisors whose guest has ended, and who are about to leave the pod."""
    staying = {guest.supervisor_pid for guest in pod.running_guests(POD)}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(path.parent.name)
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)
            if pid not in staying and f"\0--pod\0{POD}\0".encode() in path.read_bytes():
                select.select([handle], [], [], 20)
            os.close(handle)


def whole() -> None:
    """What is recorded is there, and what is there is recorded."""
    guests = pod.running_guests(POD)
    record = state.read_pod(POD)
    assert record is not None or not guests
    if record is None:
        return
    links = net.link_indexes(Path(record.netns))
    taps = {name: index for name, index in links.items() if name.startswith("uktap")}
    with router.open_router() as table:
        rows = {row.ifindex for row in table.guests(record.id)}
    assert set(taps) == {guest.tap for guest in guests}
    assert set(taps.values()) == rows
    assert len({guest.index for guest in guests}) == len(guests)


@pytest.mark.parametrize("round", range(3))
def test_twenty_commands_at_once(round: int) -> None:
    assert len(COMMANDS) == 20
    commands = random.Random(SEED + round).sample(COMMANDS, len(COMMANDS))
    processes = [
        subprocess.Popen(
            [*COMMAND, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
        )
        for command in commands
    ]
    words = [process.communicate(timeout=120)[1] for process in processes]
    for command, process, err in zip(commands, processes, words, strict=True):
        said = [line for line in err.splitlines() if "no KVM" not in line]
        why = f"{' '.join(command)}: exit {process.returncode}\n{err}"
        assert process.returncode in (0, 2, STOPPED), why
        if process.returncode == 2:
            assert len(said) == 1, why
            assert any(refusal in said[0] for refusal in REFUSALS), why
    settle()
    whole()


def test_ps_while_guests_come_and_go() -> None:
    """Whoever lists what there is meets directories that are just going."""
    listing = subprocess.Popen(
        ["sh", "-c", 'for i in $(seq 20); do "$@" ps -a >/dev/null || exit 1; done', "sh", *COMMAND],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    record = state.GuestRecord(
        name="x", pod=POD, index=2, mac="", ipv4="", ipv6="", tap="", image="", family="linux", vmm="qemu",
        accel="tcg", memory_mib=1, cpus=1, supervisor_pid=0, started_at=0,
    )  # fmt: skip
    for _ in itertools.count():
        with state.pod_lock(POD):
            state.write_guest(record)
            state.forget_guest(POD, "x")
        if listing.poll() is not None:
            break
    _, err = listing.communicate()
    assert listing.returncode == 0, err
