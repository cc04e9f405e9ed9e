"""Runs inside a Linux guest, whose kernel has cgroup v2 with all controllers: are VMMs held to their limits there?

Prints `FOUND ["name", what]` for each question. A VMM is a shell until it has been let into its cgroup; what plays it
otherwise has no sandbox, which test_sandbox.py is about.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher import cgroup
from launcher.limits import Limits

ROOT = Path("/sys/fs/cgroup")
CGROUP = ROOT / "uklaunch" / "pod.guest.1"
UNIT = ROOT / "unit.service"
BUSY = [
    *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-L", "/t/firmware", "-m", "64M", "-accel", "tcg"),
    *("-drive", "file=/t/loop,format=raw"),
]
HOG = ["python3", "-SB", "-c", "bytearray(200_000_000)"]
FORKS = ["sh", "-c", "while true; do sleep 1000 >/dev/null 2>&1 & done"]  # until fork(2) fails
SECONDS = 2.0


@contextmanager
def started(
    command: list[str], limits: Limits, memory_mib: int, path: Path = CGROUP
) -> Iterator[subprocess.Popen[str]]:
    """The command in its cgroup, as a VMM is; its cgroup is gone at the end."""
    wanted = cgroup.settings(limits, memory_mib=memory_mib, cpus=1)
    with cgroup.guest_cgroup(cgroup.check(limits), path, wanted) as made:
        assert made == path
        process = subprocess.Popen(
            ["sh", "-c", 'read -r _ && exec "$@"', "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert process.stdin is not None
            cgroup.admit(made, process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
            yield process
        finally:
            process.kill()
            process.wait()
    assert not path.exists()


def numbers(file: str, path: Path = CGROUP) -> dict[str, int]:
    return {key: int(value) for key, value in map(str.split, (path / file).read_text().splitlines())}


def cpu_share(command: list[str], limits: Limits, path: Path = CGROUP) -> float:
    """CPU time per second, once it is at work."""
    with started(command, limits, 256, path) as process:
        time.sleep(1)
        before, start = numbers("cpu.stat", path), time.monotonic()
        time.sleep(SECONDS)
        after, took = numbers("cpu.stat", path), time.monotonic() - start
        assert process.poll() is None, process.communicate()
        return (after["usage_usec"] - before["usage_usec"]) / 1e6 / took


def memory(command: list[str]) -> dict[str, Any]:
    with started(command, Limits(), 64) as process:
        process.wait()
        return {"code": process.returncode, **numbers("memory.events"), "limits": cgroup.in_force(CGROUP)}


def threads(command: list[str]) -> dict[str, Any]:
    with started(command, Limits(), 256) as process:
        said, _ = process.communicate()
        found = {"said": said, "current": (CGROUP / "pids.current").read_text().strip(), **numbers("pids.events")}
        (CGROUP / "cgroup.kill").write_text("1")
        return found


def delegated(command: list[str]) -> dict[str, Any]:
    """As in a unit with Delegate=: the supervisor alone in a cgroup that systemd has marked."""
    UNIT.mkdir()
    os.setxattr(UNIT, "trusted.delegate", b"1")
    (UNIT / "cgroup.procs").write_text("0")
    home = cgroup.find_home()
    assert home is not None
    share = cpu_share(command, Limits(cpus=0.5), home.path / CGROUP.name)
    second = cgroup.find_home()
    assert second is not None
    return {
        "share": share,
        "homes": [str(home.path), str(second.path)],
        "to be moved out of": [home.own, second.own],
        "supervisor": Path("/proc/self/cgroup").read_text().strip(),
    }


def replaced(command: list[str]) -> dict[str, Any]:
    """A supervisor in a unit dies, and its VMM lives on: systemd puts the next one into the unit's cgroup."""
    path, limits = UNIT / CGROUP.name, Limits(cpus=0.5)

    def enter(where: Path) -> str:
        try:
            (where / "cgroup.procs").write_text("0")
        except OSError as exc:
            return os.strerror(exc.errno or 0)
        return ""

    def after_it() -> str:
        (UNIT / cgroup.CONTROL).mkdir()
        return enter(UNIT / cgroup.CONTROL) or str(cgroup.make_room())

    def next_one() -> Any:
        failed = enter(UNIT)
        free = cgroup.in_force(path)
        cgroup.hold(path, cgroup.settings(limits, memory_mib=256, cpus=1))
        return failed, free, cgroup.in_force(path), Path("/proc/self/cgroup").read_text().strip()

    with started(command, limits, 256, path):
        return {
            "before": cgroup.in_force(path),
            "refused": in_a_child(lambda: enter(UNIT)),
            "room": in_a_child(after_it),
            "next": in_a_child(next_one),
        }


def in_a_child(function: Callable[[], Any]) -> Any:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, json.dumps(function()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        found = json.loads(said.read() or '"died"')
    os.waitpid(pid, 0)
    return found


def main() -> None:
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(ROOT)], check=True)
    steps: dict[str, Callable[[], Any]] = {
        "controllers": lambda: (ROOT / "cgroup.controllers").read_text().split(),
        "half": lambda: cpu_share(BUSY, Limits(cpus=0.5)),
        "unlimited": lambda: cpu_share(BUSY, Limits()),
        "memory": lambda: memory(HOG),
        "threads": lambda: threads(FORKS),
        "left": lambda: [path.name for path in ROOT.iterdir() if path.is_dir()],
        "delegated": lambda: delegated(BUSY),
        "replaced": lambda: replaced(BUSY),
    }
    for name, step in steps.items():
        print("FOUND", json.dumps([name, step()]), flush=True)


if __name__ == "__main__":
    main()
