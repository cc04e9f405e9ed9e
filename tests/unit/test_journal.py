"""A console in the journal, as far as it needs no journald: tests/boot/test_systemd.py has a real one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher import journal, state
from launcher.cli import main
from launcher.errors import UklaunchError
from launcher.journal import LINE_BYTES, pieces

from .test_state import guest


@pytest.mark.parametrize("text", ["", "x", "y" * LINE_BYTES, "z" * (3 * LINE_BYTES + 1)])
@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
def test_no_character_is_cut_in_two(before: str, text: str, character: str) -> None:
    line = before + character * len(text)
    found = list(pieces(line.encode()))
    assert "".join(piece.decode() for piece in found) == line
    assert all(LINE_BYTES - 3 <= len(piece) <= LINE_BYTES for piece in found[:-1])
    assert len(found[-1]) <= LINE_BYTES


def test_bytes_that_are_no_text_are_cut_too() -> None:
    line = b"\x80" * (2 * LINE_BYTES)
    found = list(pieces(line))
    assert b"".join(found) == line
    assert max(map(len, found)) <= LINE_BYTES


def test_no_journald(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(journal, "QUEUE", tmp_path / "socket")
    with pytest.raises(UklaunchError, match="no journald listens here") as caught:
        journal.check()
    assert "--log-driver file" in caught.value.hint


def test_no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "systemd.journal", None)
    with pytest.raises(UklaunchError, match="needs systemd's Python binding") as caught:
        journal.check()
    assert "apt-get install python3-systemd" in caught.value.hint


def test_a_console_that_is_kept_nowhere(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state.write_guest(guest())
    record = state.find_guest("web")
    state.update_guest(record, log_driver="none")
    assert main(["logs", "web"]) == 2
    assert "p/web is kept nowhere" in capsys.readouterr().err
