"""How long a launch takes and what it is made of, the router's loading, the quick commands: whole processes, timed from
outside. Milliseconds throughout."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UKLAUNCH = str(Path(sys.executable).parent / "uklaunch")
POD = "benchpod"
STEPS = (
    "cli",
    "args",
    "trio",
    "namespace",
    "tap",
    "vmm-exec",
    "qmp",
    "pyroute2",
    "bridge",
    "joined",
    "resumed",
    "ready",
)
# Between these the time is Python's imports, not our work.
IMPORTS = {"cli", "trio", "pyroute2"}
GOALS = {"first load": 600.0, "vmm-exec": 450.0, "own steps": 60.0, "command": 60.0}  # ms


def launch(repeats: int) -> dict[str, float]:
    """Milliseconds from the start of the process to each step, medians; a new pod each time, on a warm host."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        with tempfile.NamedTemporaryFile("r") as timeline:
            env = {**os.environ, "UKLAUNCH_TIMELINE": timeline.name}
            began = time.monotonic_ns()
            subprocess.run(
                [UKLAUNCH, "run", "default", "--pod", POD, "--name", "n", "-d", "--rm", "--cmdline", "sleep 1000"],
                env=env,
                check=True,
                capture_output=True,
            )
            steps: dict[str, float] = {}
            for line in timeline:
                name, at = line.split()
                steps.setdefault(name, (int(at) - began) / 1e6)
            runs.append(steps)
        subprocess.run([UKLAUNCH, "stop", f"{POD}/n"], check=True)
    return {step: statistics.median(run[step] for run in runs) for step in STEPS}


def own_work_ms(steps: dict[str, float]) -> float:
    """What a launch does up to QEMU's exec, imports left out."""
    until = STEPS[: STEPS.index("vmm-exec") + 1]
    spans = itertools.pairwise(until)
    return sum(steps[after] - steps[before] for before, after in spans if after not in IMPORTS)


def commands(repeats: int) -> dict[str, float]:
    """Milliseconds of whole commands, medians, beside a running guest."""
    subprocess.run(
        [UKLAUNCH, "run", "default", "--pod", POD, "--name", "n", "-d", "--rm", "--cmdline", "sleep 1000"],
        check=True,
        capture_output=True,
    )
    took: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, command in {
            "python -c pass": [sys.executable, "-c", "pass"],
            "ps": [UKLAUNCH, "ps"],
            "logs": [UKLAUNCH, "logs", f"{POD}/n"],
            "inspect": [UKLAUNCH, "inspect", f"{POD}/n"],
            "stop (one that has ended)": [UKLAUNCH, "stop", "no-such-guest"],
        }.items():
            began = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            took.setdefault(name, []).append((time.perf_counter() - began) * 1000)
    subprocess.run([UKLAUNCH, "stop", f"{POD}/n"], check=True)
    return {name: statistics.median(values) for name, values in took.items()}


def router_load(repeats: int) -> dict[str, float]:
    """Milliseconds to compile, load and pin the router on a cold host, and to open its pins on a warm one."""
    code = (
        "import time, router; began = time.perf_counter()\n"
        "with router.open_router(): print((time.perf_counter() - began) * 1000)"
    )
    took: dict[str, list[float]] = {"first load": [], "open": []}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(repeats):
            subprocess.run(["mount", "-t", "bpf", "bpf", directory], check=True)
            try:
                for name in took:
                    env = {**os.environ, "UKLAUNCH_BPFFS": directory}
                    out = subprocess.run(
                        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
                    )
                    took[name].append(float(out.stdout))
            finally:
                subprocess.run(["umount", directory], check=True)
    return {name: statistics.median(values) for name, values in took.items()}


def measure(repeats: int) -> dict[str, dict[str, float]]:
    return {"steps": launch(repeats), "router": router_load(max(1, repeats - 2)), "commands": commands(2 * repeats)}


def _line(name: str, value: float, goal: float | None = None) -> None:
    met = "" if goal is None else f"  {'meets' if value <= goal else 'MISSES'} the goal ({goal:.0f} ms)"
    print(f"{name:<36}{value:>10.1f}{met}")


def show(results: dict[str, dict[str, float]]) -> None:
    steps, router, quick = results["steps"], results["router"], results["commands"]
    print(f"\n{'router':<36}{'ms':>10}")
    _line("first load on a host", router["first load"], GOALS["first load"])
    _line("opened later", router["open"])
    print(f"\n{'launch, new pod, warm host':<36}{'ms':>10}   (QEMU loads beside what follows it)")
    for step, at in sorted(steps.items(), key=lambda item: item[1]):
        _line(step, at, GOALS.get(step))
    _line("our own steps before QEMU's exec", own_work_ms(steps), GOALS["own steps"])
    print(f"\n{'whole commands':<36}{'ms':>10}")
    for name, value in quick.items():
        _line(name, value, None if name.startswith("python") else GOALS["command"])
