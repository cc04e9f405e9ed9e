"""A cgroup (v2) of its own for each guest's VMM, and the limits that it is held to there.

    /sys/fs/cgroup/uklaunch/                      or, where systemd has delegated the supervisor's own cgroup to it:
        POD.GUEST.PID/   the VMM                  .../uklaunch@NAME.service/
                                                      supervisor/
                                                      POD.GUEST.PID/   the VMM

A VMM is put in before it is one (`admit` of vmm/sandbox.py), so that nothing of it has ever run without. What was
asked for and cannot be had is an error; what every VMM gets where that is possible (memory.max, pids.max) is otherwise
left out. A cgroup is removed when its guest has ended, by `gc` after a crash; rmdir(2) takes none in which a process
lives.

No process may live beside cgroups that have controllers: a supervisor in a delegated cgroup moves down into one first,
and for one that comes after it room is made.
Sources: Documentation/admin-guide/cgroup-v2.rst; systemd's CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import UklaunchError
from .limits import Limits
from .timeline import mark

OURS = "uklaunch"
SUPERVISOR, CONTROL = "supervisor", ".control"
CONTROLLERS = ("cpu", "memory", "pids")
PERIOD_US = 100_000
# QEMU's own threads: its main loop, RCU, and at most 64 workers for its disks (util/thread-pool.c), twice over.
THREADS = 160
EMPTY_TIMEOUT_S = 5

HINT = "boot with cgroup v2 alone (systemd.unified_cgroup_hierarchy=1, or cgroup_no_v1=all), or leave the limit out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where VMMs' cgroups are made. `own`: this process is to move out of it first."""

    path: Path
    controllers: frozenset[str]
    own: bool = False

    def child(self, pod: str, guest: str) -> Path:
        """A dot, for names may have hyphens; the pid, for another state directory may have the same names."""
        return self.path / f"{pod}.{guest}.{os.getpid()}"


def mount() -> Path | None:
    """Where cgroup v2 is mounted; on a hybrid host beside v1, which has the controllers."""
    found = [
        Path(line.split()[4])
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.partition(" - ")[2].startswith("cgroup2 ")
    ]
    usual = Path("/sys/fs/cgroup")
    return min(found, key=lambda path: (path != usual, usual not in path.parents, path), default=None)


def find_home() -> Home | None:
    """None: this host has no cgroup v2. Raises OSError."""
    root = mount()
    if root is None:
        return None
    own = _own(root)
    if _is_delegated(own) and (own / "cgroup.procs").read_text().split() == [str(os.getpid())]:
        return Home(path=own, controllers=_controllers(own), own=True)
    if own.name == SUPERVISOR and _is_delegated(own.parent):  # a second guest of ours
        return Home(path=own.parent, controllers=_controllers(own.parent))
    return Home(path=root / OURS, controllers=_controllers(root))


def _own(root: Path) -> Path:
    """The cgroup of this process."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return root / next((line.removeprefix("0::/") for line in lines if line.startswith("0::")), "")


def _controllers(path: Path) -> frozenset[str]:
    return frozenset((path / "cgroup.controllers").read_text().split())


def _is_delegated(path: Path) -> bool:
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def check(limits: Limits) -> Home | None:
    """Where the guest's cgroup is to be. Raises UklaunchError if what is asked for cannot be had."""
    try:
        home = find_home()
    except OSError as exc:
        home, why = None, f"cgroup v2: {exc.strerror}"
    else:
        why = "this host has no cgroup v2 mounted" if home is None else "cpu is not among its controllers of cgroup v2"
    if limits.cpus is not None and (home is None or "cpu" not in home.controllers):
        raise UklaunchError(f"no limit of CPU time (--cpus {limits.cpus:g}) can be had: {why}", HINT)
    return home


def settings(limits: Limits, *, memory_mib: int, cpus: int) -> dict[str, str]:
    """File -> what is written into it. `memory_mib`: of the guest and its VMM."""
    wanted = {
        "memory.max": str(memory_mib << 20),
        "memory.oom.group": "1",
        "pids.max": str(THREADS + cpus),
    }
    if limits.cpus is not None:
        wanted["cpu.max"] = f"{round(limits.cpus * PERIOD_US)} {PERIOD_US}"
    return wanted


@contextlib.contextmanager
def guest_cgroup(home: Home | None, path: Path | None, wanted: dict[str, str]) -> Iterator[Path | None]:
    """The guest's cgroup for the length of a block, at the end of which its VMM has ended; None if there is none.

    Raises UklaunchError if a limit of CPU time cannot be set: that has been asked for.
    """
    if home is None or path is None:
        yield None
        return
    try:
        try:
            made: Path | None = _make(home, path, wanted)
        except OSError as exc:
            if "cpu.max" in wanted:
                raise UklaunchError(f"cannot limit CPU time: {exc.filename}: {exc.strerror}", _hint(exc)) from exc
            made = None
        mark("cgroup")
        yield made
    finally:
        remove(path)


def _make(home: Home, path: Path, wanted: dict[str, str]) -> Path:
    """Raises OSError, which names the file."""
    controllers = [name for name in CONTROLLERS if name in home.controllers]
    if home.own:
        inner = home.path / SUPERVISOR
        inner.mkdir(exist_ok=True)
        _write(inner / "cgroup.procs", "0")
    else:
        _enable(home.path.parent, controllers, wanted)
    while True:
        home.path.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the last guest of another supervisor takes the directory along
            path.mkdir(exist_ok=True)
            break
    _enable(home.path, controllers, wanted)
    for name, value in wanted.items():
        if name.partition(".")[0] in controllers:
            try:
                _write(path / name, value)
            except OSError:
                if name == "cpu.max":
                    raise
    return path


def hold(path: Path, wanted: dict[str, str]) -> None:
    """Set the limits of a running VMM once more, for its new supervisor. A cgroup that is not below this process's home
    keeps those that it has. Raises OSError, which names the file."""
    home = find_home()
    if home is not None and home.path == path.parent:
        _make(home, path, wanted)


def make_room() -> Path | None:
    """Let the next supervisor into the delegated cgroup of one that has died, whose VMM lives on below.

    The kernel takes no process into a cgroup that has controllers for those below, and systemd puts its next one there:
    so the controllers go, and with them the limits, until `hold`. This is called where systemd runs an ExecStopPost= of
    such a unit: in `.control` beside the VMM (systemd's src/core/execute.c, exec_parameters_get_cgroup_path). Returns
    the cgroup, if this is one.
    """
    root = mount()
    if root is None:
        return None
    own = _own(root)
    if own.name != CONTROL or not _is_delegated(own.parent):
        return None
    enabled = (own.parent / "cgroup.subtree_control").read_text().split()
    if not enabled:
        return None
    _write(own.parent / "cgroup.subtree_control", " ".join(f"-{name}" for name in enabled))
    return own.parent


def admit(path: Path | None, pid: int) -> None:
    """Put the process, which is to become the VMM, into the guest's cgroup, if there is one. Raises UklaunchError."""
    if path is not None:
        try:
            _write(path / "cgroup.procs", str(pid))
        except OSError as exc:
            raise UklaunchError(f"cannot put QEMU into {path}: {exc.strerror}", "see: uklaunch doctor") from exc


def _enable(path: Path, controllers: list[str], wanted: dict[str, str]) -> None:
    """For the cgroups below. One by one, for one that is refused is not to cost the others."""
    file = path / "cgroup.subtree_control"
    present = file.read_text().split()
    for name in controllers:
        if name not in present:
            try:
                _write(file, f"+{name}")
            except OSError:
                if name == "cpu" and "cpu.max" in wanted:
                    raise


def _write(file: Path, text: str) -> None:
    """One write(2), to a file that the kernel has made. Raises OSError, which names it."""
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(file)) from None
    finally:
        os.close(fd)


def _hint(exc: OSError) -> str:
    return {
        errno.EBUSY: "processes live in that cgroup: run uklaunch by uklaunch@.service, or move them into one below",
        errno.EROFS: "mount it read-write: a container runtime's option, such as --security-opt writable-cgroups=true",
    }.get(exc.errno or 0, HINT)


def existing(path: str) -> Path | None:
    """The cgroup of a guest's record, if it has one."""
    return Path(path) if path and Path(path).exists() else None


def in_force(path: Path) -> dict[str, str]:
    """The limits as the kernel has them; those that it has."""
    found = {}
    for name in ("cpu.max", "memory.max", "pids.max"):
        with contextlib.suppress(OSError):
            found[name] = (path / name).read_text().strip()
    return found


def remove(path: Path) -> bool:
    """Remove the cgroup of a VMM that has ended; was there one? Idempotent; leaves one in which a process lives."""
    for _ in range(2):
        try:
            path.rmdir()
        except FileNotFoundError:
            return False
        except OSError as exc:
            if exc.errno != errno.EBUSY or not _empties(path):
                return False
        else:
            if path.parent.name == OURS:
                with contextlib.suppress(OSError):  # not the last one
                    path.parent.rmdir()
            return True
    return False


def _empties(path: Path) -> bool:
    """Wait until no process lives in it: a process that has been waited for may still be on its way out."""
    try:
        with (path / "cgroup.events").open() as events:
            poller = select.poll()
            poller.register(events, select.POLLPRI)  # the file has changed since it was read
            while "populated 1" in events.read():
                if not poller.poll(EMPTY_TIMEOUT_S * 1000):
                    return False
                events.seek(0)
    except OSError:
        return not path.exists()
    return True
