"""What of ours exists on this machine, as lines of text: taken before and after, the difference is a leak.

The router itself stays: it is loaded once per host and pinned, on purpose. Its rows are ours, pod by pod.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import router
from launcher import cgroup, state


def ours() -> set[str]:
    return {*_namespaces(), *_links(), *_qdiscs(), *_files(), *_processes(), *_cgroups(), *_router_rows()}


def _namespaces() -> Iterator[str]:
    for path in state.NETNS_DIR.glob("uk*"):
        yield f"namespace {path}"


def _links() -> Iterator[str]:
    """Links in the host's own namespace; those of a pod go with its namespace."""
    for _, name in socket.if_nameindex():
        if name.startswith("uk"):
            yield f"link {name}"


def _qdiscs() -> Iterator[str]:
    out = subprocess.run(["tc", "qdisc", "show"], check=True, capture_output=True, text=True).stdout
    for line in out.splitlines():
        if "clsact" in line:
            yield f"qdisc {line.strip()}"


def _files() -> Iterator[str]:
    for path in Path("/run/uklaunch").rglob("*"):
        if path.is_file() and path.suffix != ".lock" and path.name not in ("lock", "events.log", "events.log.1"):
            yield f"file {path}"


def _processes() -> Iterator[str]:
    """QEMUs of ours, that is, with a lock in our /run: a container beside us may run this suite too."""
    run = Path("/run").stat().st_dev
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or its owner may do more than we
            words = (path / "cmdline").read_bytes().split(b"\0")
            if not words[0].endswith(b"qemu-system-x86_64") or b"id=qmp," not in b" ".join(words):
                continue
            locks = [fd for fd in (path / "fd").iterdir() if "/vmm.lock" in str(fd.readlink())]
            if any(fd.stat().st_dev == run for fd in locks):
                yield f"process {path.name}: {words[0].decode()}"


def _cgroups() -> Iterator[str]:
    """Those in which nobody lives: others' are a suite's that runs in a container beside us."""
    for path in (cgroup.mount() or Path("/nonexistent")).glob(f"{cgroup.OURS}/*/cgroup.events"):
        with contextlib.suppress(OSError):  # gone
            if "populated 0" in path.read_text():
                yield f"cgroup {path.parent}"


def _router_rows() -> Iterator[str]:
    if router.is_loaded():
        with router.open_router() as table:
            for pod_id in table.pod_ids():
                yield f"router rows of pod {pod_id}"
