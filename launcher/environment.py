"""A guest's environment: from `-e` and `--env-file`, and out of sight where all may look.

Files are as Docker's and podman's are (docker/cli's opts/file.go): KEY=VALUE, one a line, the value as it stands, with
its quotes and with blanks behind it; lines that begin with # and empty ones are nothing; KEY alone is ours, if we have
it. Unlike theirs, a name must be one that a shell takes.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .errors import UsageError

STDIN = 0
FILE_LIMIT_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def collect(files: Sequence[Path], pairs: Sequence[str]) -> dict[str, str]:
    """What the files say, then `-e`: of a variable that is given more than once the last counts.

    Raises UsageError, whose text has no value in it.
    """
    env: dict[str, str] = {}
    for file in files:
        env.update(_parse(file))
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not _NAME.fullmatch(key):
            raise UsageError(f"-e: {key!r} is not a variable's name", "write it as -e KEY=VALUE")
        if not equals and key not in os.environ:
            raise UsageError(f"-e {key}: no value, and {key} is not in our own environment", f"-e {key}=VALUE")
        env[key] = value if equals else os.environ[key]
    return env


def check(env: Mapping[str, str]) -> None:
    """Raises UsageError for what no guest can be given."""
    for key, value in env.items():
        check_text(f"the variable {key}", value)


def check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not UTF-8") from None
    if "\0" in text:
        raise UsageError(f"{what} has a NUL in it, which ends a text")


def _parse(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with os.fdopen(os.dup(STDIN), "rb") if str(file) == "-" else file.open("rb") as source:
            content = source.read(FILE_LIMIT_BYTES + 1)
        if len(content) > FILE_LIMIT_BYTES:
            raise UsageError(f"--env-file {file} has more than {FILE_LIMIT_BYTES >> 20} MiB", "is it the right one?")
        text = content.decode("utf-8-sig")
    except OSError as exc:
        raise UsageError(f"cannot read --env-file {file}: {exc.strerror}") from None
    except ValueError:  # not UTF-8; a NUL in its name
        raise UsageError(f"--env-file {str(file)!r} is not a text in UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.removesuffix("\r").lstrip()
        if not stripped or stripped.startswith("#"):
            continue
        key, equals, value = stripped.partition("=")
        if not _NAME.fullmatch(key):
            raise UsageError(f"--env-file {file}, line {number}: no variable's name", "write KEY=VALUE, with no blanks")
        if equals:
            yield key, value
        elif key in os.environ:
            yield key, os.environ[key]


def hide(pairs: Sequence[str]) -> None:
    """Overwrite the values of `-e KEY=VALUE` in our own arguments, which all can read in /proc for as long as we live.

    As curl(1) and mysql(1) do. Whoever looked before has seen them: `--env-file` and `-e KEY` have no such moment.
    """
    ends = [pair.encode(errors="surrogateescape") for pair in pairs if "=" in pair]
    if not ends:
        return
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        Path("/proc/self/mem").open("r+b", buffering=0) as memory,
    ):
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
        # proc(5): arg_start is field 48; the first two may have blanks in them.
        at = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[48 - 3])
        for word in words:
            for end in ends:
                if word.endswith(end):
                    value = len(end) - end.index(b"=") - 1
                    memory.seek(at + len(word) - value)
                    memory.write(b"*" * value)
            at += len(word) + 1
