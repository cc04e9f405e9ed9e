"""Does it stay flat over the years? Pods made and removed a thousand times, and two hundred of them at once: how long
one takes in the first tenth and in the last, what the kernel still holds of them afterwards, and whether all is gone.

Milliseconds for a pod, with its uplink; KiB of kernel memory. Guests are left out: at this number they cost QEMUs.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import router
from launcher import pod

from .. import leaks
from .memory import _kernel_kib

NAME = "bench-cycles"


def _timed(step: object, *args: str) -> float:
    began = time.perf_counter()
    step(*args)  # type: ignore[operator]
    return (time.perf_counter() - began) * 1000


def _ends(times: list[float]) -> dict[str, float]:
    """Medians of the first tenth and of the last, and their ratio."""
    tenth = max(1, len(times) // 10)
    first, last = statistics.median(times[:tenth]), statistics.median(times[-tenth:])
    return {"first": first, "last": last, "ratio": last / first}


def _held() -> dict[str, float]:
    """What this process and the kernel hold: descriptors, KiB."""
    return {"descriptors": len(list(Path("/proc/self/fd").iterdir())), "kernel KiB": _kernel_kib()}


def one_after_the_other(cycles: int) -> dict[str, object]:
    """A pod made and removed, again and again. `left`: what of ours there is afterwards that was not before."""
    pod.create(NAME)  # what is loaded once is not a leak
    pod.delete(NAME)
    before, held = leaks.ours(), _held()
    made, removed = [], []
    for _ in range(cycles):
        made.append(_timed(pod.create, NAME))
        removed.append(_timed(pod.delete, NAME))
    after = _held()
    return {
        "pods": cycles,
        "create": _ends(made),
        "delete": _ends(removed),
        "left": sorted(leaks.ours() - before),
        "held": {name: after[name] - held[name] for name in held},
    }


def all_at_once(pods: int) -> dict[str, object]:
    """That many beside each other; each is made beside those before it, and removed beside those after it."""
    before = leaks.ours()
    names = [f"{NAME}-{number}" for number in range(pods)]
    made, removed = [], []
    try:
        for name in names:
            made.append(_timed(pod.create, name))
        with router.open_router() as table:
            rows = len(table.pod_ids())
    finally:
        for name in names[: len(made)]:
            removed.append(_timed(pod.delete, name))
    return {
        "pods": pods,
        "rows": rows,
        "create": _ends(made),
        "delete": _ends(removed),
        "left": sorted(leaks.ours() - before),
    }


def cycles(quick: bool) -> dict[str, dict[str, object]]:
    return {
        "one after the other": one_after_the_other(50 if quick else 1000),
        "at once": all_at_once(20 if quick else 200),
    }


def show(results: dict[str, dict[str, object]]) -> None:
    print(f"\n{'pods, ms each':<36}{'first':>8}{'last':>8}{'ratio':>7}")
    for name, result in results.items():
        for step in ("create", "delete"):
            ends = result[step]
            assert isinstance(ends, dict)
            print(f"{result['pods']} {name}: {step:<12}".ljust(36), end="")
            print(f"{ends['first']:>8.1f}{ends['last']:>8.1f}{ends['ratio']:>7.2f}")
        left = result["left"]
        assert isinstance(left, list)
        held = result.get("held", "")
        print(f"{'':<36}{len(left)} leaks {held or ''}", *left, sep="\n  " if left else "")
