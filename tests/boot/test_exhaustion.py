"""A machine that has no more to give: one line that says of what, and nothing half-made; a guest that runs, runs on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import pod, state

from .. import leaks
from ..bench import cycles
from ..cli import shown, uklaunch

pytestmark = pytest.mark.boot

POD = "exhausted"
RUN = ("run", "default", "--pod", POD, "--name", "n", "--stop-timeout", "0", "--accel", "tcg")


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    with pod.open_router():
        pass  # loaded: what is tried here is not its compiler
    before = leaks.ours()
    yield
    assert not leaks.ours() - before


@pytest.fixture
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory for the state, on a disk with the mount options of the test's parameter."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", request.param, "tiny", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "tiny", ["size=4k", "size=8k", "size=12k", "nr_inodes=4", "nr_inodes=8", "nr_inodes=9"], indirect=True
)
def test_a_full_disk_is_said_and_leaves_nothing(tiny: Path) -> None:
    result = uklaunch(*RUN, "--cmdline", "true", env={"UKLAUNCH_STATE": str(tiny)}, timeout_s=30)
    lines = [line for line in result.stderr.splitlines() if "no KVM" not in line]
    assert result.returncode == 125, shown(result)
    assert len(lines) == 1, shown(result)
    assert f"{tiny}/" in lines[0]
    assert "No space left on device (free some space there)" in lines[0]
    left = {str(path.relative_to(tiny)) for path in tiny.rglob("*") if path.is_file()}
    assert left <= {"lock", "firewall.lock", "events.log"}


@pytest.mark.parametrize("tiny", ["size=1m"], indirect=True)
def test_a_disk_that_fills_up_ends_no_guest_and_it_can_be_stopped(tiny: Path) -> None:
    env = {"UKLAUNCH_STATE": str(tiny)}
    started = uklaunch(*RUN, "-d", env=env)
    assert started.returncode == 0, shown(started)
    with (tiny / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    stopped = uklaunch("stop", "-t", "0", "n", env=env)
    assert stopped.returncode == 0, shown(stopped)
    said = Path(tiny, "guests", POD, "n", "supervisor.log")
    assert "No space left" in said.read_text() or said.stat().st_size == 0  # there may be no room for that either
    (tiny / "filler").unlink()
    (guest,) = json.loads(uklaunch("ps", "-a", "--json", env=env).stdout)
    assert guest["status"] in ("lost", "exited")
    removed = uklaunch("rm", "n", env=env)
    assert removed.returncode == 0, shown(removed)
    assert not list(tiny.rglob("*.json"))


@pytest.mark.parametrize("limit", [6, 16, 40])
def test_too_few_open_files_are_said_before_anything_is_made(limit: int) -> None:
    result = uklaunch(*RUN, wrap=f'ulimit -n {limit}; exec "$@"')
    lines = [line for line in result.stderr.splitlines() if "no KVM" not in line]
    assert result.returncode == 125, shown(result)
    assert len(lines) == 1, shown(result)
    assert "open files" in lines[0]
    assert "ulimit -n" in lines[0]


def test_too_little_memory_is_said_before_anything_is_made() -> None:
    result = uklaunch(*RUN, wrap='ulimit -v 80000; exec "$@"', timeout_s=30)
    lines = [line for line in result.stderr.splitlines() if "no KVM" not in line]
    assert (result.returncode, len(lines)) == (125, 1), shown(result)
    assert "of address space, and 78 are allowed" in lines[0]


def test_a_low_limit_that_may_be_raised_is() -> None:
    result = uklaunch(*RUN, "--rm", wrap='ulimit -Sn 24; exec "$@"', env={"UKLAUNCH_FAULT": "resumed:SIGTERM"})
    assert result.returncode in (0, 128 + signal.SIGTERM), shown(result)  # stopped, or still being launched


@pytest.mark.parametrize(
    ("step", "code"), [("namespace", "ENOSPC"), ("veth", "ENOMEM"), ("guest-row", "EMFILE"), ("qmp", "ENFILE")]
)
def test_whatever_met_it(step: str, code: str) -> None:
    """Anything may be what the last descriptor was missing for."""
    result = uklaunch(*RUN, env={"UKLAUNCH_FAULT": f"{step}:{code}"})
    lines = [line for line in result.stderr.splitlines() if "no KVM" not in line]
    assert (result.returncode, len(lines)) == (125, 1), shown(result)
    assert lines[0].startswith(f"uklaunch: {os.strerror(getattr(errno, code))} ("), lines[0]


def test_pods_come_and_go_at_an_even_pace_and_leave_nothing() -> None:
    """The bench's question `cycles`, small. Other work takes its time too; what grows with use is looked for."""
    again = cycles.one_after_the_other(50)
    beside = cycles.all_at_once(20)
    for result in (again, beside):
        assert result["left"] == []
        assert result["create"]["ratio"] < 3
        assert result["delete"]["ratio"] < 3
    assert again["held"]["descriptors"] <= 0  # fewer: a thread that has ended since
    assert beside["rows"] >= 20


def test_times_that_jump_confuse_nobody(state_dir: Path) -> None:
    """A clock that was set back: a guest that started in the future is listed all the same."""
    state.write_guest(
        state.GuestRecord(
            name="n", pod=POD, index=2, mac="", ipv4="", ipv6="", tap="", image="", family="linux", vmm="qemu",
            accel="tcg", memory_mib=1, cpus=1, supervisor_pid=0, started_at=9e9,
        )
    )  # fmt: skip
    listed = uklaunch("ps", "-a")
    assert listed.returncode == 0, shown(listed)
    assert " 0s " in listed.stdout
