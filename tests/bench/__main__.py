"""`make bench`: what the router costs against its alternatives, whether that stays flat, what memory it takes, and
where a launch spends its time.

Figures go to build/bench.json and, as plots, to build/bench.svg and build/bench.png. Questions that are not asked keep
the answers that the file has, each with its commit and time. Exit status 0 when all could be measured, whatever the
figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher import pod
from launcher.errors import UklaunchError

from . import compare, cycles, launch, memory, rates, scale
from .traffic import Unmeasurable

SCHEMA = 1  # of the file: raised when what is there changes its meaning
OUTPUT = Path("build/bench.json")

# Question -> (quick or not -> answer, its printing). Rounds: as many as 15 minutes allow, or 2 if quick.
QUESTIONS: dict[str, tuple[Callable[[bool], Any], Callable[[Any], None]]] = {
    "compare": (lambda quick: compare.compare(1 if quick else 9), compare.show),
    "loopback": (lambda quick: compare.loopback(2 if quick else 15), compare.show_loopback),
    "rates": (lambda quick: rates.rates(1 if quick else 7, 1 if quick else 2), rates.show),
    "scale": (lambda quick: scale.scale(1 if quick else 7), scale.show),
    "memory": (lambda quick: memory.memory(), memory.show),
    "cycles": (cycles.cycles, cycles.show),
    "launch": (lambda quick: launch.measure(2 if quick else 7), launch.show),
}


def machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")), "")
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    return {"cpu": model, "cores": str(os.cpu_count()), "kernel": platform.release(), "qemu": qemu.splitlines()[0]}


def commit() -> str:
    """Of the checkout, with "+" if files differ from it; "" outside of one."""
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty=+", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def read_results(here: dict[str, str]) -> dict[str, Any]:
    """What the file has, if this machine wrote it."""
    try:
        found = json.loads(OUTPUT.read_text())
    except (FileNotFoundError, ValueError):
        found = {}
    if found.get("schema") == SCHEMA and found["machine"] == here:
        return dict(found)
    return {"schema": SCHEMA, "machine": here, "questions": {}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: less than two minutes instead of fifteen")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(QUESTIONS)}, plot; all if none is given"
    )
    args = parser.parse_args()
    names = args.names or [*QUESTIONS, "plot"]
    if unknown := [name for name in names if name not in (*QUESTIONS, "plot")]:
        parser.error(f"no such question: {', '.join(unknown)} (there are {', '.join(QUESTIONS)}, and plot)")

    if os.geteuid() != 0:
        parser.exit(1, "run this as root: it makes network namespaces\n")
    here = machine()
    results = read_results(here)
    print(*(f"{key}: {value}" for key, value in here.items()), f"commit: {commit()}", sep="\n")
    with pod.open_router():
        pass  # loaded, so that what follows measures a warm host
    status = 0
    for name in names:
        if name == "plot":
            continue
        measure, show = QUESTIONS[name]
        began = time.monotonic()
        try:
            answer = measure(args.quick)
        except (Unmeasurable, UklaunchError) as exc:
            print(f"\n{name}: {exc}", getattr(exc, "hint", ""), sep="\n", file=sys.stderr)
            status = 1
            continue
        show(answer)
        print(f"({name}: {time.monotonic() - began:.0f} s)", flush=True)
        results["questions"][name] = {
            "commit": commit(),
            "taken": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "quick": args.quick,
            "answer": answer,
        }
        OUTPUT.parent.mkdir(exist_ok=True)
        OUTPUT.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {OUTPUT}")
    if "plot" in names:
        from . import plot

        print("drawn in", *plot.draw(results, OUTPUT.parent))
    return status


if __name__ == "__main__":
    sys.exit(main())
