"""The router's program and maps: loaded once per host, pinned under bpffs, handed out as descriptors.

    /sys/fs/bpf/uklaunch/
        <hash of the sources>/   program, shaped, pods, guests, ports, flows, pod_counters, drops, programs
        new-<pid>/               a load in progress, renamed when it is complete
    /run/uklaunch-users/<uid>/   a bpffs with a router of that user's own: see users.py
    /var/cache/uklaunch/
        <hash of the sources>    what compile.py makes of them: so that a host compiles once, and not at every boot

Everybody but the first to come opens pins, which costs a tenth of a millisecond each.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import importlib
import json
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import syscall
from .errors import RouterError

USERS = Path("/run/uklaunch-users")  # a bpffs for each user with a router of his own, by uid
PROGRAMS = {"program": "localhost", "shaped": "shaped"}  # pin -> function: those to attach
MAPS = ("pods", "guests", "ports", "flows", "pod_counters", "drops", "programs")
UNPINNED_MAPS = ("flow_template", "drops_template", "served_ports", "scratch")  # the program's own business
_TAIL_CALLED = {"decide": 0, "ask": 1, "localhost": 2}  # function -> index in `programs`: bpf/maps.h, PROGRAM_*
FUNCTIONS = ("shaped", "localhost", "decide", "ask")  # who calls before whom it calls
_TEMPLATES = {"flows": "flow_template", "drops": "drops_template"}  # a map of maps -> what those look like
FLOW_TABLE = "flows_{}"  # by pod id: only of a user who cannot make them himself
_LOADING = "new-"  # no dot: bpffs reserves them (kernel/bpf/inode.c, bpf_lookup)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Open descriptors of a loaded router."""

    directory: Path
    lock: int  # shared, on the directory: it is not removed while somebody has it open
    program: int
    shaped: int
    maps: dict[str, int]


# --- sources ---


def source_directory() -> Path:
    path = importlib.import_module("router.bpf").__file__
    assert path is not None
    return Path(path).parent


def sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(source_directory().iterdir()) if path.suffix in (".c", ".h")}


def version(defines: Sequence[str] = ()) -> str:
    """Names what is loaded. A changed map size on an existing pin would be accepted in silence: so, by content."""
    text = "\0".join((*sources().values(), *defines))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- open ---


def bpffs() -> Path:
    return Path(os.environ.get("UKLAUNCH_BPFFS", "/sys/fs/bpf"))


def root() -> Path:
    return bpffs() / "uklaunch"


def is_a_users() -> bool:
    """Is it a user's own router that is meant, which root loads? See users.py."""
    return bpffs().parent.name == USERS.name


def open_pins() -> Pins:
    """The router of this version of the sources; loaded now if it is not. The caller closes the descriptors."""
    directory = root() / version()
    try:
        return open_directory(directory)
    except FileNotFoundError as exc:
        if is_a_users():
            raise RouterError(
                f"no router of this version has been loaded for user {bpffs().name}",
                f"ask the administrator for it: sudo uklaunch router load --user {bpffs().name}",
            ) from exc
    except PermissionError as exc:
        hint = "use Linux 5.19 or newer" if is_a_users() else "run uklaunch as root"
        raise RouterError(f"no permission to open {directory}", hint) from exc
    with loading():
        with contextlib.suppress(FileNotFoundError):
            return open_directory(directory)
        load(directory)
        return open_directory(directory)


def open_directory(directory: Path) -> Pins:
    """FileNotFoundError: it is not complete."""
    opened = [os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        fcntl.flock(opened[0], fcntl.LOCK_SH)
        for name in (*PROGRAMS, *MAPS):
            opened.append(syscall.open_pin(f"{directory}/{name}"))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    lock, program, shaped, *maps = opened
    return Pins(directory=directory, lock=lock, program=program, shaped=shaped, maps=dict(zip(MAPS, maps, strict=True)))


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """One loader at a time on this host. Removes what an interrupted load has left."""
    try:
        root().mkdir(exist_ok=True)
        fd = os.open(root(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise _explain_bpffs(exc) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for left in root().glob(_LOADING + "*"):
            remove(left)
        yield
    finally:
        os.close(fd)


def _explain_bpffs(exc: OSError) -> RouterError:
    where = bpffs()
    mounted = any(
        line.split()[1:3] == [str(where), "bpf"] for line in Path("/proc/self/mounts").read_text().splitlines()
    )
    if mounted and isinstance(exc, PermissionError):
        return RouterError(f"no permission to write to {where}", "run uklaunch as root")
    if mounted:
        return RouterError(f"cannot use {where}: {exc.strerror}")
    if os.geteuid() != 0:
        return RouterError("the router needs root", "run uklaunch as root")
    return RouterError(f"no BPF file system is mounted at {where}", f"mount it: mount -t bpf bpf {where}")


def versions() -> list[Path]:
    """The directory of each version that is loaded, the one that was loaded last at the end."""
    found = list[tuple[int, Path]]()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in root().iterdir():
            if not path.name.startswith(_LOADING):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


@contextlib.contextmanager
def unused(directory: Path) -> Iterator[bool]:
    """Whether nobody has this version open; if so, nobody gets it before the block ends."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(fd)


def remove(directory: Path) -> None:
    """Idempotent. What is attached keeps running until it is detached."""
    for path in directory.glob("*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()


# --- compile, or have compiled ---


def cache() -> Path:
    return Path(os.environ.get("UKLAUNCH_CACHE", "/var/cache/uklaunch"))


def compile_ahead() -> None:
    """For whoever installs: the first pod on this host need not wait for the compiler. Raises RouterError."""
    _compiled(())


def _compiled(defines: Sequence[str]) -> dict[str, Any]:
    """compile.py's object, from the cache if it is there. Raises RouterError."""
    package = Path(__file__).parent
    file = cache() / version((*defines, platform.machine(), (package / "compile.py").read_text()))
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(file.read_text()))
    command = [sys.executable, "-m", "router.compile", *defines]
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if result.returncode != 0:
        *detail, last = result.stderr.strip().splitlines() or ["the compiler died without a word"]
        message, _, hint = last.partition("\t")
        raise RouterError(message, hint, "\n".join(detail[-60:]))
    if not defines:  # the variants are for tests
        _keep(file, result.stdout)
    return dict(json.loads(result.stdout))


def _keep(file: Path, text: str) -> None:
    """Whole or not at all, and in place of what earlier versions have left. Who cannot keep it compiles again."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = file.with_name(f"{_LOADING}{os.getpid()}")
        new.write_text(text)
        new.rename(file)
        for old in file.parent.iterdir():
            if old != file:
                old.unlink()


# --- load ---


def load(directory: Path, defines: Sequence[str] = (), *, owner: int = 0, pods: int = 0) -> None:
    """Load and pin. Raises RouterError; the pins appear together or not at all.

    `owner`: the uid that may open the pins beside root. `pods`: flow tables for so many, for who cannot make them.
    """
    compiled = _compiled(defines)
    loading = directory.parent / f"{_LOADING}{os.getpid()}"
    with contextlib.ExitStack() as stack:
        maps = dict[str, int]()
        # A map of maps is told by another map what those look like: that one first.
        for name in sorted(compiled["maps"], key=lambda name: name in _TEMPLATES):
            shape = compiled["maps"][name]
            inner = maps[_TEMPLATES[name]] if name in _TEMPLATES else None
            maps[name] = _create_map(name, shape, inner)
            stack.callback(os.close, maps[name])
        fds = dict[str, int]()
        for name in reversed(FUNCTIONS):
            fds[name] = load_program(name, _relocated(compiled["functions"][name], maps))
            stack.callback(os.close, fds[name])
        for name, index in _TAIL_CALLED.items():
            syscall.update(maps["programs"], struct.pack("I", index), struct.pack("I", fds[name]))
        try:
            loading.mkdir()
            pins = {pin: fds[name] for pin, name in PROGRAMS.items()} | {name: maps[name] for name in MAPS}
            for name, fd in pins.items():
                syscall.pin(fd, f"{loading}/{name}")
            for pod_id in range(1, pods + 1):
                table = _create_map(f"flows_{pod_id}", compiled["maps"][_TEMPLATES["flows"]], None)
                stack.callback(os.close, table)
                syscall.pin(table, f"{loading}/{FLOW_TABLE.format(pod_id)}")
            for path in loading.iterdir() if owner else ():
                os.chown(path, owner, -1)
            if directory.exists():
                remove(directory)  # some of it is missing, or we would not be here
            loading.rename(directory)
        except OSError as exc:
            remove(loading)
            raise _explain_bpffs(exc) from exc


def _create_map(name: str, shape: dict[str, int], inner: int | None) -> int:
    try:
        return syscall.create_map(
            shape["kind"], shape["key_size"], shape["value_size"], shape["entries"], f"uk_{name}", shape["flags"], inner
        )
    except PermissionError as exc:
        raise RouterError("the router needs root", "run uklaunch as root") from exc
    except OSError as exc:
        raise RouterError(
            f"the kernel refuses the router's map {name}: {exc.strerror}", "see: uklaunch doctor"
        ) from exc


def _relocated(function: dict[str, Any], maps: dict[str, int]) -> bytes:
    code = bytearray(base64.b64decode(function["code"]))
    for number, name in function["maps"]:
        struct.pack_into("<i", code, 8 * number + 4, maps[name])
    return bytes(code)


def load_program(name: str, instructions: bytes) -> int:
    try:
        return syscall.load_program(instructions, f"uk_{name}")
    except OSError as exc:
        if exc.errno == errno.EPERM:  # not EACCES: so the verifier calls a program's own sins
            raise RouterError("no permission to load programs into the kernel", "run uklaunch as root") from exc
        raise RouterError(
            f"the kernel refuses the router's program {name}: {os.strerror(exc.errno or 0)}",
            "see: uklaunch doctor",
            exc.strerror or "",
        ) from exc
