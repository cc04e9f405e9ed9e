"""What uklaunch remembers between its processes: /run/uklaunch, one JSON file per pod and per guest, and locks.

    lock                        held for a moment, while a pod id is taken; holds the last one
    events.log                  see events.py
    pods/POD.lock               held while the pod's structure changes
    pods/POD.json               PodRecord
    guests/POD/GUEST/           private to root
        guest.json              GuestRecord
        supervisor.lock         held by the supervisor for as long as it lives
        vmm.lock                held by the VMM (it inherits the descriptor) for as long as it lives
        console.log             unless it is in the journal
        run.json            what is run, for the next run under another supervisor: see runfile.py
        qmp.sock            QEMU listens on these two
        console.sock
        supervisor.log          what the supervisor had to say once the guest ran

The kernel holds the truth about devices and programs; these files say whose they are. Whether something is alive
is asked of its lock, never of a pid: pids are reused, locks end with their holder. The locks are flock(2): they
belong to the open file, so a child that inherits it holds it too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UklaunchError, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TAG = "uklaunch"  # in the alias of every link that we make, and in the journal
NETNS_DIR = Path("/run/netns")


DEFAULT_ROOT = Path("/run/uklaunch")


def root() -> Path:
    """Root's, or without root the user's own: see rootless.py."""
    if given := os.environ.get("UKLAUNCH_STATE"):
        return Path(given)
    uid = os.geteuid()
    return Path(os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{uid}") if uid else "/run") / DEFAULT_ROOT.name


# What a whole host shares (the router, nftables' tables, links) says by this whose it is: a clean-up by one state
# directory leaves alone what another made. The default one's has no mark.


def owner() -> int:
    """This state directory as a number of 32 bits; 0: the default one."""
    path = root().resolve()
    return 0 if path == DEFAULT_ROOT.resolve() else zlib.crc32(os.fsencode(path))


def marked(name: str) -> str:
    return f"{name}@{number:08x}" if (number := owner()) else name


def unmarked(text: str) -> str | None:
    """What was `marked` so; None: by another state directory."""
    name, _, _ = text.partition("@")
    return name if text == marked(name) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRecord:
    """A pod. `bridge` 0: its set-up is under way, or was cut off when nobody holds the pod's lock."""

    name: str
    id: int = 0  # the router's number for it, 1..65535
    netns: str
    adopted: bool = False  # the namespace is a stranger's: leave it as it was
    ephemeral: bool = False  # made by `run`: goes with its last guest
    bridge: int = 0  # interface index
    ipv4: str
    ipv6: str
    own_clsact: bool = False  # lo's clsact qdisc was made by us
    saved_sysctls: dict[str, str]  # what an adopted namespace had before, in the order in which it was changed
    udp_timeout_s: int = 30  # of flows: see router.Timeouts
    tcp_timeout_s: int = 5 * 24 * 3600
    uplink: str = "none"  # nat, none, own or cni:NAME: see uplink.py
    uplink_link: str = ""  # the pod's end
    own_uplink_clsact: bool = False  # its clsact qdisc was made by us
    uplink_ipv4: str = ""  # the pod's own addresses there
    uplink_ipv6: str = ""
    published: tuple[str, ...] = ()  # for the pod as a whole


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRecord:
    """A guest, running or not. Times are seconds since the epoch."""

    name: str
    pod: str
    index: int
    mac: str
    ipv4: str
    ipv6: str
    tap: str
    image: str
    family: str
    vmm: str
    accel: str
    machine: str = ""
    memory_mib: int
    cpus: int
    limits: dict[str, Any] = field(default_factory=dict)  # limits.Limits; empty: of an earlier version
    cgroup: str = ""  # its VMM's; none if this host has no cgroup v2
    ports: tuple[str, ...] = ()
    published: tuple[str, ...] = ()
    supervisor_pid: int
    vmm_pid: int = 0
    status: str = "starting"  # starting, running, ready, restarting, stopping, exited
    health: str | None = None  # starting, healthy, unhealthy; None: not checked, or not running
    restart: str = "no"  # the policy
    restarts: int = 0
    log_driver: str = "file"  # model.LogDriver
    started_at: float
    resumed_at: float | None = None  # when the present run began, as far as the guest knows
    ready_at: float | None = None
    exited_at: float | None = None
    exit_code: int | None = None  # of the last run that has ended, as is the reason
    reason: str | None = None
    remove_when_done: bool = False

    @property
    def directory(self) -> Path:
        return guest_dir(self.pod, self.name)

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def supervisor_log(self) -> Path:
        return self.directory / "supervisor.log"


Record = TypeVar("Record", PodRecord, GuestRecord)
Structured = TypeVar("Structured", bound="DataclassInstance")


def pod_file(pod: str) -> Path:
    return root() / "pods" / f"{pod}.json"


def guest_dir(pod: str, name: str) -> Path:
    return root() / "guests" / pod / name


# How a field is declared -> what JSON makes of it, when lists have become tuples.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, NoneType),
    "bool": (bool,),
    "int": (int,),
    "int | None": (int, NoneType),
    "float": (int, float),
    "float | None": (int, float, NoneType),
    "tuple[str, ...]": (tuple,),
    "dict[str, str]": (dict,),
    "dict[str, Any]": (dict,),
}


def structure(cls: type[Structured], values: Any) -> Structured:
    """The dataclass of what JSON said; what it does not know is passed over. Raises TypeError.

    Quicker than to import what does it for any type: `ps` has to be.
    """
    if not isinstance(values, dict):
        raise TypeError("it is no object")
    given: dict[str, Any] = {}
    for known in fields(cls):
        if known.name in values:
            value = values[known.name]
            value = tuple(value) if isinstance(value, list) else value
            items = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, tuple) else ()
            texts = "Any" in str(known.type) or all(isinstance(item, str) for item in items)
            if not isinstance(value, _KINDS[str(known.type)]) or not texts:
                raise TypeError(f"{known.name} is {str(value)[:40]!r}")
            given[known.name] = value
    return cls(**given)


def _read(cls: type[Record], path: Path) -> Record | None:
    try:
        return structure(cls, json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as exc:
        raise UklaunchError(f"{path} is damaged: {exc}"[:300], "remove it, then run: uklaunch gc") from exc
    except OSError as exc:
        raise state_error(path, exc) from exc


def state_error(path: Path, exc: OSError) -> UklaunchError:
    """An errno from our own state files, for a person."""
    hint = {
        errno.EACCES: "run uklaunch as root",
        errno.ENOSPC: "free some space there",
    }.get(exc.errno or 0, "")
    return UklaunchError(f"cannot use {path}: {exc.strerror}", hint)


def _write(path: Path, record: PodRecord | GuestRecord) -> None:
    write_file(path, json.dumps(asdict(record), indent=1) + "\n")


def write_file(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old or the new one, never half of one. Raises UklaunchError."""
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
        new.replace(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            new.unlink()
        raise state_error(path, exc) from exc


def _names(directory: Path) -> list[str]:
    """What is in the directory, sorted; nothing if it is gone, as it may at any moment."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


# --- pods ---


def read_pod(name: str) -> PodRecord | None:
    return _read(PodRecord, pod_file(name))


def get_pod(name: str) -> PodRecord:
    """Raises UsageError if there is no such pod."""
    record = read_pod(name)
    if record is None:
        raise UsageError(f"there is no pod {name!r}", "see the pods there are: uklaunch pod ls")
    return record


def write_pod(record: PodRecord) -> None:
    _write(pod_file(record.name), record)


def forget_pod(name: str) -> None:
    pod_file(name).unlink(missing_ok=True)


def pods() -> list[PodRecord]:
    names = (name for name in _names(root() / "pods") if name.endswith(".json"))
    return [record for name in names if (record := read_pod(name.removesuffix(".json"))) is not None]


def forget_unknown_pods() -> None:
    """Remove what is left of pods that have no record: locks, half-written records. Idempotent."""
    for name in {Path(name).stem for name in _names(root() / "pods")} - {record.name for record in pods()}:
        with pod_lock(name):
            pass  # its end removes them


# --- guests ---


def read_guest(pod: str, name: str) -> GuestRecord | None:
    return _read(GuestRecord, guest_dir(pod, name) / "guest.json")


def write_guest(record: GuestRecord) -> GuestRecord:
    _write(record.directory / "guest.json", record)
    return record


def update_guest(record: GuestRecord, **changes: Any) -> GuestRecord:
    return write_guest(replace(record, **changes))


def forget_guest(pod: str, name: str) -> None:
    """Remove all that is kept of a guest. Under its supervisor's lock, or the pod's: its name may be taken anew."""
    directory = guest_dir(pod, name)
    # Out of the way in one step: what comes next under that name is not ours to remove.
    going = directory.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")
    with contextlib.suppress(OSError):
        (directory / "guest.json").unlink(missing_ok=True)
        directory.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def guest_names(pod: str | None = None) -> list[tuple[str, str]]:
    """(pod, guest) of all directories, whether or not they have a record."""
    pods = _names(root() / "guests") if pod is None else [pod]
    return [(pod, name) for pod in pods for name in _names(root() / "guests" / pod)]


def guests(pod: str | None = None) -> list[GuestRecord]:
    found = (read_guest(*names) for names in guest_names(pod))
    return [record for record in found if record is not None]


def find_guest(reference: str) -> GuestRecord:
    """The guest that `NAME` or `POD/NAME` means. Raises UsageError if it means none, or several."""
    pod, _, name = reference.rpartition("/")
    matches = [record for record in guests() if record.name == name and pod in ("", record.pod)]
    if not matches:
        raise UsageError(f"there is no guest {reference!r}", "see the guests there are: uklaunch ps -a")
    if len(matches) > 1:
        choices = ", ".join(f"{record.pod}/{record.name}" for record in matches)
        raise UsageError(f"{reference!r} means more than one guest: {choices}", "name the pod too")
    return matches[0]


def supervised(record: GuestRecord) -> bool:
    return is_held(record.directory / "supervisor.lock")


def vmm_runs(record: GuestRecord) -> bool:
    return is_held(record.directory / "vmm.lock")


def alive(record: GuestRecord) -> bool:
    return supervised(record) or vmm_runs(record)


# --- locks ---


@contextlib.contextmanager
def lock(path: Path, access: int = os.O_RDWR) -> Iterator[int]:
    """Hold an exclusive lock on the file; blocks while another process does. Yields the descriptor, close-on-exec."""
    while True:
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(path, access | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise state_error(path, exc) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # The one who held it may have removed the file: what we hold then is a lock on nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    yield fd
                    return
        finally:
            os.close(fd)


@contextlib.contextmanager
def pod_lock(name: str) -> Iterator[int]:
    """Held while the pod's structure changes, and while a guest of it takes its place or is forgotten.

    What is left of the pod goes at the end if it has no record by then: the lock too.
    """
    path = root() / "pods" / f"{name}.lock"
    with lock(path) as fd:
        try:
            yield fd
        finally:
            if not pod_file(name).exists():
                with contextlib.suppress(OSError):  # not empty: guests that have ended
                    (root() / "guests" / name).rmdir()
                pod_file(name).with_suffix(".new").unlink(missing_ok=True)
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def holders(path: Path) -> Iterator[list[int]]:
    """Handles (pidfds) on the living processes that hold the lock, however they came by it; root sees them all."""
    with contextlib.ExitStack() as stack:
        pids = [int(name) for name in _names(Path("/proc")) if name.isdecimal()]
        yield [handle for pid in pids if (handle := holder(pid, path, stack)) is not None]


def holder(pid: int, path: Path, stack: contextlib.ExitStack) -> int | None:
    """A handle on the process, closed by the stack, if it lives and holds the lock; else None."""
    try:
        wanted = path.stat()
        handle = os.pidfd_open(pid)  # first, so that what is found is found of this very process
    except (OSError, ValueError):
        return None
    for fd in _names(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError):
            # Another may have it open to ask whether it is held: fdinfo tells which open files hold a lock.
            if os.path.samestat(Path(f"/proc/{pid}/fd/{fd}").stat(), wanted):
                info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
                if any(line.startswith("lock:") and "FLOCK" in line and "WRITE" in line for line in info.splitlines()):
                    stack.callback(os.close, handle)
                    return handle
    os.close(handle)
    return None


def released_within(path: Path, timeout_s: float) -> bool:
    """Wait until nobody holds the lock: of a process that is ending, `holders` may show nothing while a thread of it
    still has the file open."""
    import threading

    def wait() -> None:
        with contextlib.suppress(FileNotFoundError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(timeout_s)
    return not waiting.is_alive()


def is_held(path: Path) -> bool:
    """Does a living process hold the lock?"""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise state_error(path, exc) from exc
    try:
        # Shared, so that two who ask at once do not take each other for the holder.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
