"""A router of a user's own, so that he needs no root: what the kernel does for root alone, root does once, here.

Loading programs and creating maps takes CAP_BPF in the initial user namespace; opening pins, changing maps by their
descriptors and attaching a program to a link of one's own take no more than the pins' file modes (Linux 5.19 and newer,
whatever kernel.unprivileged_bpf_disabled says: kernel/bpf/syscall.c, __sys_bpf, map_create, bpf_prog_load). So root
loads a router with maps of its own, gives its pins to the user, and makes beforehand what is made for each pod.

It is pinned in a bpffs of its own, for systemd lets only root into /sys/fs/bpf. Directories are root's: what root does
there later does not depend on what the user has put into his way.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from . import program, tables
from .errors import RouterError


def select(uid: int, run: Path = Path("/run")) -> Path:
    """From now on this process means that user's router. `run`: where the host's /run is seen. Returns its bpffs."""
    where = run / program.USERS.relative_to("/run") / str(uid)
    os.environ["UKLAUNCH_BPFFS"] = str(where)
    return where


def load_for(uid: int, pods: int) -> None:
    """Idempotent: a router that is there stays as it is. Raises RouterError. For root."""
    where = select(uid)
    try:
        where.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as exc:
        raise RouterError(f"cannot make {where}: {exc.strerror}") from exc
    if not where.is_mount():
        _call("mount", "-n", "-t", "bpf", "-o", "nosuid,nodev,noexec,mode=0755", "bpf", str(where))
    try:
        with program.loading():
            directory = program.root() / program.version()
            with contextlib.suppress(FileNotFoundError):
                tables.Router(program.open_directory(directory)).__exit__(None, None, None)
                return
            program.load(directory, owner=uid, pods=pods)
    except BaseException:
        unload_for(uid)
        raise


def unload_for(uid: int) -> None:
    """Unless pods need it. Idempotent. For root."""
    where = select(uid)
    tables.unload_all()
    if tables.loaded() or not where.exists():
        return
    if where.is_mount():
        _call("umount", "-n", "-l", str(where))  # lazily: copies in other namespaces are no concern of ours
    where.rmdir()
    with contextlib.suppress(OSError):
        program.USERS.rmdir()  # not empty: other users


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RouterError(f"{command[0]} fails: {done.stderr.strip()}", "run uklaunch as root" if os.geteuid() else "")
