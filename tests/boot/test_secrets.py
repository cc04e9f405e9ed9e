"""A guest's environment is for the guest alone: not in arguments, environments, records or files that others can read.

Looked for as root where we write, and as nobody where anybody may look, while guests run that were given a secret.
And its image is the one that was looked at, also when it starts again.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import control, state
from launcher.arguments import DEFAULT_BUNDLE
from launcher.vmm.files import OVERLAY_DIR

from .. import leaks
from ..cli import COMMAND, shown, uklaunch

pytestmark = pytest.mark.boot

POD = "secrets"
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--")
# Of processes, of all files below the first directory and of those in the second: prints where the marker is.
LOOK = """
import os, stat, sys
marker = sys.stdin.buffer.read()
def files():
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        yield from (f"/proc/{pid}/{name}" for name in ("cmdline", "environ", "comm", "status"))
    for directory, _, names in [*os.walk(sys.argv[1]), next(os.walk(sys.argv[2]))]:
        yield from (os.path.join(directory, name) for name in names)
seen = 0
for path in files():
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            with open(path, "rb") as file:
                seen += 1
                if marker in file.read(64 << 20):
                    print(path)
    except OSError:
        pass
assert seen > 10, seen
"""
# A stranger's kernel, played by Linux: what it is told comes on its command line, and its init prints that.
SAYS_ITS_COMMAND_LINE = (
    "console=ttyS0 loglevel=3 panic=-1 reboot=t rdinit=/bin/busybox --"
    ' sh -c "mount -t proc proc /proc; cat /proc/cmdline; echo up; sleep 1000"'
)
UGLY = "a,b;c=%s%n \"quoted\" \\ 'single' ${HOME} #ä"


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = leaks.ours()
    yield
    left = leaks.ours() - before
    for record in state.guests(POD):
        uklaunch("rm", "--force", f"{record.pod}/{record.name}")
    for _ in control.collect(kill=True):
        pass
    assert not left, "left behind:\n" + "\n".join(sorted(left))


def places(marker: str, *wrap: str) -> list[str]:
    roots = (str(state.root()), str(OVERLAY_DIR))
    command = [*wrap, "/usr/bin/python3", "-ISc", LOOK, *roots]
    out = subprocess.run(command, input=marker, capture_output=True, text=True, check=True, cwd="/").stdout
    return out.splitlines()


def test_a_secret_is_nowhere_but_in_the_guest(tmp_path: Path) -> None:
    marker = "s3cret-" + secrets.token_hex(8)
    file = tmp_path / "env"
    file.touch(0o600)
    file.write_text(f"FILE={marker}-f\n")
    result = uklaunch(
        *("run", "default", "--pod", POD, "--name", "n", "-d", "--rm", "--ready-port", "8"),
        *("--env-file", str(file), "-e", f"OPTION={marker}-o", "-e", "OURS"),
        *("--cmdline", 'printf "%s" "$FILE $OPTION $OURS" | sha256sum; netcat -l 8; sleep 1000'),
        env={"OURS": f"{marker}-e"},
    )
    assert result.returncode == 0, shown(result)
    record = state.find_guest(f"{POD}/n")
    given = " ".join(f"{marker}-{letter}" for letter in "foe")
    assert hashlib.sha256(given.encode()).hexdigest() in record.console_log.read_text()
    file.unlink()
    assert places(marker, *NOBODY) == []
    found = places(marker)
    supervisor = f"/proc/{record.supervisor_pid}/"
    assert f"{supervisor}environ" in found  # where -e KEY came from; and the test has found what it looked for
    # Root alone finds it: there, and where the next supervisor would.
    assert set(found) == {f"{supervisor}environ", str(record.directory / "run.json")}
    assert (record.directory / "run.json").stat().st_mode & 0o777 == 0o600
    listed = subprocess.run([*NOBODY, "ls", f"/proc/{record.vmm_pid}/fd"], capture_output=True, text=True, check=False)
    assert "Permission denied" in listed.stderr  # where the files in memory are that the guest is told by
    for words in (("inspect", f"{POD}/n"), ("ps", "-a", "--json"), ("events", "--json"), ("pod", "inspect", POD)):
        assert marker not in uklaunch(*words).stdout
    for path in state.root().rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode & 0o077 == 0 or (path.is_dir() and not mode & 0o022), path
    assert uklaunch("stop", "-t", "0", f"{POD}/n").returncode == 0


def test_a_command_line_with_a_secret_reaches_the_kernel_and_nobody_else(tmp_path: Path) -> None:
    """Such as Unikraft's and OSv's, which is where these have their environment."""
    marker = "s3cret-" + secrets.token_hex(8)
    for name in ("vmlinuz", "initrd"):
        (tmp_path / name).symlink_to(DEFAULT_BUNDLE / name)
    (tmp_path / "uklaunch.toml").write_text("kernel = 'vmlinuz'\ninitrd = 'initrd'\nfamily = 'unikraft'\n")
    value = marker + UGLY + "x" * 1200
    file = tmp_path / "stdin"
    file.write_text(f"SECRET={value}\n")
    with file.open() as stdin, subprocess.Popen(
        [*COMMAND, "run", str(tmp_path), "--pod", POD, "--name", "n", "--rm", "--env-file", "-",
         "--stop-timeout", "0", "--cmdline", SAYS_ITS_COMMAND_LINE],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent.parent.parent,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            file.unlink()
            said = ""
            for line in process.stdout:
                if line.startswith("up"):
                    break
                said += line
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            assert f'"SECRET={escaped}"' in said, said + process.communicate()[1]
            record = state.find_guest(f"{POD}/n")
            assert marker not in (Path(f"/proc/{record.vmm_pid}/cmdline")).read_text()
            assert marker not in (Path(f"/proc/{record.vmm_pid}/environ")).read_text()
            assert places(marker, *NOBODY) == []
        finally:
            process.terminate()
            process.communicate(timeout=30)


def test_a_guest_that_starts_again_does_so_from_the_image_that_it_had(tmp_path: Path) -> None:
    for name in ("vmlinuz", "initrd"):
        shutil.copy(DEFAULT_BUNDLE / name, tmp_path)
    (tmp_path / "uklaunch.toml").write_text("kernel = 'vmlinuz'\ninitrd = 'initrd'\n")
    with subprocess.Popen(
        [*COMMAND, "run", str(tmp_path), "--pod", POD, "--name", "n", "--rm", "--restart", "on-failure:1",
         "--cmdline", "echo it runs; sleep 1; exit 3"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        cwd=Path(__file__).parent.parent.parent,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        runs = 0
        for line in process.stdout:
            if "it runs" in line:
                runs += 1
                for name in ("vmlinuz", "initrd"):
                    (tmp_path / "other").write_text("another's")
                    (tmp_path / "other").replace(tmp_path / name)
    assert (runs, process.returncode) == (2, 3)
