"""Records and locks."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from pathlib import Path

import pytest

from launcher import state
from launcher.errors import UklaunchError, UsageError


def guest(name: str = "web", pod: str = "p") -> state.GuestRecord:
    return state.GuestRecord(
        name=name,
        pod=pod,
        index=2,
        mac="02:00:00:00:77:02",
        ipv4="169.254.77.2",
        ipv6="fd00:77::2",
        tap="uktap2",
        image="/x",
        family="linux",
        vmm="qemu",
        accel="tcg",
        memory_mib=128,
        cpus=1,
        supervisor_pid=os.getpid(),
        started_at=1.0,
    )


def test_a_record_comes_back_as_it_was(state_dir: Path) -> None:
    record = state.write_guest(guest())
    assert state.read_guest("p", "web") == record
    assert state.guests() == state.guests("p")
    with state.pod_lock("p"):
        state.forget_guest("p", "web")
    assert state.guests() == []
    assert not (state_dir / "guests" / "p").exists()
    assert list((state_dir / "pods").iterdir()) == []


def test_a_record_that_cannot_be_written_leaves_the_old_one_alone(state_dir: Path) -> None:
    record = state.write_guest(guest())
    (record.directory / "guest.new").mkdir()  # stands in the way of the new file
    with pytest.raises(UklaunchError, match="cannot use"):
        state.update_guest(record, status="ready")
    assert state.read_guest("p", "web") == record


def test_who_holds_a_lock_is_found_and_who_asks_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.touch()
    with path.open() as _, state.holders(path) as nobody:
        assert nobody == []
    with state.lock(path), state.holders(path) as found:
        assert len(found) == 1
        assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{found[0]}").read_text()


def test_fields_of_a_newer_version_are_passed_over(state_dir: Path) -> None:
    record = state.write_guest(guest())
    file = record.directory / "guest.json"
    file.write_text(file.read_text().replace("{", '{"from_the_future": 1,', 1))
    assert state.read_guest("p", "web") is not None


def test_a_damaged_record_is_an_error_with_its_path(state_dir: Path) -> None:
    record = state.write_guest(guest())
    (record.directory / "guest.json").write_text("{")
    with pytest.raises(UklaunchError, match=r"guest\.json is damaged"):
        state.guests()


def test_references(state_dir: Path) -> None:
    for pod in ("p", "q"):
        state.write_guest(guest(pod=pod))
    state.write_guest(guest("db"))
    assert state.find_guest("db").pod == "p"
    assert state.find_guest("q/web").pod == "q"
    with pytest.raises(UsageError, match="more than one guest"):
        state.find_guest("web")
    with pytest.raises(UsageError, match="no guest"):
        state.find_guest("q/db")


def _hold(path: Path, held: object, release: object) -> None:
    with state.lock(path):
        held.set()  # type: ignore[attr-defined]
        release.wait()  # type: ignore[attr-defined]


def test_a_lock_tells_of_a_living_holder_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.lock"
    assert not state.is_held(path)
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(path, held, release))
    holder.start()
    assert held.wait(30)
    assert state.is_held(path)
    holder.kill()
    holder.join()
    assert not state.is_held(path)
    with state.lock(path):
        assert state.is_held(path)


def test_a_lock_whose_file_was_removed_while_waiting_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with state.lock(path):
        path.unlink()
        with state.lock(path):  # not a deadlock: it is another file
            assert state.is_held(path)


def test_a_lock_is_awaited_until_its_holder_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert state.released_within(path, 1)  # there is none
    with subprocess.Popen(["flock", path, "cat"], stdin=subprocess.PIPE) as holder:
        while not state.is_held(path):
            assert holder.poll() is None
        assert not state.released_within(path, 0.1)
        assert holder.stdin is not None
        holder.stdin.close()
        assert state.released_within(path, 10)
    assert not state.is_held(path)
