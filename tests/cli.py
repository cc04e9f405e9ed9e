"""Run the real `uklaunch` command, as a user would."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "launcher")


def uklaunch(
    *args: str, timeout_s: float = 120, wrap: str = "", stdin: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`wrap`: a shell script that runs the command as "$@", for a machine that lacks something."""
    command = [*COMMAND, *args]
    if wrap:
        command = ["sh", "-c", wrap, "sh", *command]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
        check=False,
        cwd=Path(__file__).parent.parent,
    )


def shown(result: subprocess.CompletedProcess[str]) -> str:
    return f"{shlex.join(map(str, result.args))}\nexit {result.returncode}\n{result.stdout}\n{result.stderr}"


def ok(*args: str, **kwargs: Any) -> str:
    """What it printed, when it has done what it was asked to."""
    result = uklaunch(*args, **kwargs)
    assert result.returncode == 0, shown(result)
    return result.stdout
