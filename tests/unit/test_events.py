"""Events, and the times of what a console says."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from argparse import ArgumentTypeError
from datetime import datetime
from pathlib import Path

import pytest

from launcher import console, events
from launcher.arguments import moment

WRITERS, EACH = 4, 100


def test_an_event_comes_back_as_it_was(state_dir: Path) -> None:
    events.note("created", "p")
    events.note("stopped", "p", "web", exit_code=3, reason="powered off")
    created, stopped = events.read()
    assert (created.what, created.pod, created.guest, created.detail) == ("created", "p", None, {})
    assert stopped.detail == {"exit_code": 3, "reason": "powered off"}
    assert "p/web" in events.line(stopped)


def test_an_event_that_cannot_be_written_is_let_go(state_dir: Path) -> None:
    state_dir.write_text("a file where the directory should be")
    events.note("created", "p")


def _write(number: int) -> None:
    for count in range(EACH):
        events.note("ready", "p", f"w{number}", count=count)


def test_many_write_at_once_and_every_line_is_whole(state_dir: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(number,)) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [(event.guest, event.detail["count"]) for event in events.read()]
    assert len(events.path().read_bytes().splitlines()) == len(found) == WRITERS * EACH
    for number in range(WRITERS):
        assert [count for guest, count in found if guest == f"w{number}"] == list(range(EACH))


def test_who_follows_sees_everything_over_rotations(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LIMIT_BYTES", 2000)
    heard: queue.Queue[int] = queue.Queue()

    def listen() -> None:
        for event in events.follow():
            heard.put(event.detail["count"])
            if event.detail["count"] == EACH - 1:
                return

    events.note("ready", "p", count=0)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    for count in range(EACH):
        if count:
            events.note("ready", "p", count=count)
        assert heard.get(timeout=10) == count
    listener.join(10)
    assert events.path().with_suffix(".log.1").exists()
    assert sum(path.stat().st_size for path in state_dir.glob("events.log*")) < 2 * 2200


def test_events_are_counted_over_rotations(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LIMIT_BYTES", 2000)
    assert events.counts() == {}

    def write(what: str) -> None:
        for _ in range(EACH):
            events.note(what, "p", "g")

    threads = [threading.Thread(target=write, args=(what,)) for what in ("ready", "stopped")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events.path().with_suffix(".log.1").exists()
    assert events.counts() == {"ready": EACH, "stopped": EACH}
    assert {path.stat().st_mode & 0o777 for path in state_dir.glob("events.log*")} == {0o600}


# --- logs --since ---


class Clock:
    """`time`, for a console."""

    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def said_since(log: Path, when: float) -> bytes:
    older, offset = console.since(log, when)
    return older + log.read_bytes()[offset:]


async def test_what_was_said_since(tmp_path: Path, clock: Clock) -> None:
    log = tmp_path / "console.log"
    with console.FileConsole.open(log) as out:
        for clock.now, text in ((1000.0, b"a\n"), (1000.4, b"b\n"), (1001.0, b"c\n"), (1060.0, b"d\n")):
            await out.write(text)
    assert said_since(log, 0) == b"a\nb\nc\nd\n"
    assert said_since(log, 1000.9) == b"a\nb\nc\nd\n"  # a second too much rather than a line too little
    assert said_since(log, 1001.5) == b"c\nd\n"
    assert said_since(log, 1002.5) == b"d\n"
    assert said_since(log, 1100) == b""
    assert console.since(tmp_path / "other.log", 0) == (b"", 0)


async def test_what_was_said_since_over_a_rotation(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LIMIT_BYTES", 100)
    log = tmp_path / "console.log"
    with console.FileConsole.open(log) as out:
        for clock.now in range(1000, 1100, 10):
            await out.write(b"%d\n" % clock.now)
    assert (tmp_path / "console.log.1").exists()
    assert said_since(log, 1085) == b"1090\n"
    assert said_since(log, 1045) == b"1050\n1060\n1070\n1080\n1090\n"


def test_moments() -> None:
    now = datetime.now().timestamp()
    for text, ago in (("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172800)):
        assert moment(text) == pytest.approx(now - ago, abs=5)
    assert moment("2026-01-31T09:30") == datetime(2026, 1, 31, 9, 30).timestamp()
    assert moment("2026-01-31T09:30:00+00:00") == 1769851800
    today = datetime.now().replace(hour=9, minute=30, second=0, microsecond=0)
    assert moment("9:30") == today.timestamp()
    for text in ("", "yesterday", "10", "-5m", "25:00", "10x"):
        with pytest.raises(ArgumentTypeError, match="is no time"):
            moment(text)
