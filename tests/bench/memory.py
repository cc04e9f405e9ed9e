"""How much memory: the router's tables, of the host and of a pod; the kernel's for an empty pod; a guest's processes.

Tables: what the kernel itself says of a map (`memlock` in /proc/PID/fdinfo; before Linux 6.4 an estimate). Processes:
PSS, what they share counted in shares (proc(5), smaps_rollup). All in KiB.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
from pathlib import Path

from launcher import pod
from router import syscall
from router.tables import FLOWS_PER_POD

from .launch import POD, UKLAUNCH

PODS = 16
_HASH_OF_MAPS = 13  # include/uapi/linux/bpf.h
_KERNEL = ("Slab", "Percpu", "VmallocUsed", "KernelStack", "PageTables")


def _maps() -> dict[int, dict[str, str]]:
    """The BPF maps that this process holds: descriptor -> fdinfo."""
    found = {}
    for path in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the directory
            info = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if "map_type" in info:
                found[int(path.name)] = info
    return found


def _kernel_kib() -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in _KERNEL if name in lines)


def _pss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def _tables() -> dict[str, float]:
    record = pod.create("bench-memory")
    try:
        with pod.open_router():
            host = _maps()
            flows = next(fd for fd, info in host.items() if int(info["map_type"]) == _HASH_OF_MAPS)
            row = syscall.lookup(flows, record.id.to_bytes(4, "little"), 4)
            assert row is not None
            fd = syscall.map_fd_by_id(int.from_bytes(row, "little"))
            try:
                own = int(_maps()[fd]["memlock"]) / 1024
            finally:
                os.close(fd)
            return {
                "router, once per host": sum(int(info["memlock"]) for info in host.values()) / 1024,
                "a pod's flow table": own,
                "of it a flow": 2 * own / FLOWS_PER_POD,
            }
    finally:
        pod.delete("bench-memory")


def _empty_pod() -> float:
    """Kernel memory for a pod without guests: namespace, bridge, tables. The median of PODS, for others come and go."""
    with contextlib.ExitStack() as stack:
        figures = [_kernel_kib()]
        for number in range(PODS):
            pod.create(f"bench-memory{number}")
            stack.callback(pod.delete, f"bench-memory{number}")
            figures.append(_kernel_kib())
        return statistics.median(after - before for before, after in itertools.pairwise(figures))


def _guest() -> dict[str, float]:
    run = [UKLAUNCH, "run", "default", "--pod", POD, "--name", "n", "-d", "--rm", "--cmdline", "sleep 1000"]
    subprocess.run(run, check=True, capture_output=True)
    try:
        record = json.loads(subprocess.run([UKLAUNCH, "inspect", f"{POD}/n"], check=True, capture_output=True).stdout)
        return {"supervisor": _pss_kib(record["supervisor_pid"]), "QEMU and guest": _pss_kib(record["vmm_pid"])}
    finally:
        subprocess.run([UKLAUNCH, "stop", f"{POD}/n"], check=True)


def memory() -> dict[str, float]:
    return {**_tables(), "an empty pod, with that": _empty_pod(), **_guest()}


def show(results: dict[str, float]) -> None:
    print(f"\n{'memory':<36}{'KiB':>10}")
    for name, kib in results.items():
        print(f"{name:<36}{kib:>10,.{0 if kib >= 10 else 2}f}")
