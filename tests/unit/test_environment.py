"""A guest's environment: files as Docker's are, complaints without a value, and nothing left in our arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import environment
from launcher.errors import UsageError


def test_a_file_as_dockers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "from here")
    monkeypatch.delenv("NOBODYS", raising=False)
    file = tmp_path / "env"
    file.write_bytes(
        b'\xef\xbb\xbfFIRST=1\n# A=comment\n\n   # B=indented\n  LEFT=x\nQUOTED="a b" # c\nTAIL=a \nEMPTY=\n'
        b"EQUALS=a=b\nCRLF=x\r\nOURS\nNOBODYS\nTWICE=1\nTWICE=2\nUML=\xc3\xa4"
    )
    assert environment.collect([file], []) == {
        "FIRST": "1",
        "LEFT": "x",
        "QUOTED": '"a b" # c',
        "TAIL": "a ",
        "EMPTY": "",
        "EQUALS": "a=b",
        "CRLF": "x",
        "OURS": "from here",
        "TWICE": "2",
        "UML": "ä",
    }


def test_later_files_and_then_options_win(tmp_path: Path) -> None:
    for name, text in (("1", "A=1\nB=1\nC=1"), ("2", "B=2\nC=2")):
        (tmp_path / name).write_text(text)
    found = environment.collect([tmp_path / "1", tmp_path / "2"], ["C=3"])
    assert found == {"A": "1", "B": "2", "C": "3"}


@pytest.mark.parametrize("text", ["=s3cret", "A B=s3cret", "A =s3cret", "export A=s3cret", "9=s3cret", "s3 cret"])
def test_a_bad_line_is_named_but_not_shown(text: str, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(f"OK=1\n{text}\n")
    with pytest.raises(UsageError, match="line 2") as caught:
        environment.collect([file], [])
    assert "s3" not in caught.value.message + caught.value.hint + caught.value.detail


@pytest.mark.parametrize(("content", "says"), [(b"A=\xff", "not a text"), (b"A=" + bytes(1 << 20), "more than 1 MiB")])
def test_a_file_that_is_none(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(content)
    with pytest.raises(UsageError, match=says):
        environment.collect([tmp_path / "env"], [])


def test_a_bad_option_does_not_show_its_value() -> None:
    with pytest.raises(UsageError, match="'my-key' is not a variable's name") as caught:
        environment.collect([], ["my-key=s3cret"])
    assert "s3cret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("value", ["\udcff", "a\0b"])
def test_what_no_guest_can_be_given(value: str) -> None:
    with pytest.raises(UsageError, match="the variable A "):
        environment.check({"A": value})


def test_values_go_from_our_own_arguments_and_nothing_else_does() -> None:
    script = (
        "import sys, os; from launcher import environment;"
        "environment.hide(['A=s3cret', 'B', 'C=', 'D=\\udcff=x']);"
        "sys.stdout.buffer.write(open('/proc/self/cmdline', 'rb').read() + b'|' + os.fsencode(sys.argv[2]))"
    )
    words = ["-e", "A=s3cret", "-eA=s3cret", "--env=A=s3cret", "-e", "B", "C=", "--cmdline", "secret", b"D=\xff=x"]
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, check=True, cwd=os.curdir)
    shown, _, argument = result.stdout.rpartition(b"|")
    assert shown.split(b"\0")[3:-1] == [
        *(b"-e", b"A=******", b"-eA=******", b"--env=A=******", b"-e", b"B", b"C=", b"--cmdline", b"secret", b"D=***")
    ]
    assert argument == b"A=s3cret"
