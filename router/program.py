"""The router's program and maps: compiled and loaded once per host, pinned under bpffs, handed out as descriptors.

    /sys/fs/bpf/uklaunch/
        <hash of the sources>/   program, pods, guests, ports, flows, pod_counters
        new-<pid>/               a load in progress, renamed when it is complete

Compiling happens in a short-lived child: bcc changes the working directory of the whole process and leaves 70 MB
behind. That child is the only importer of bcc. Everybody else opens pins.

bcc insists on a kernel source tree, for little more than types that linux-libc-dev has. So it is always given one of
ours, made of links to that package and three small files, and machines with and without headers take the same path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib
import os
import re
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import syscall
from .errors import RouterError

PROGRAM = "program"
MAPS = ("pods", "guests", "ports", "flows", "pod_counters", "drops", "programs")
# No debug information and a light front end take 0.1 s off a compilation; bcc runs LLVM's full optimiser all the same.
CFLAGS = ["-Wno-macro-redefined", "-g0", "-O1"]
_TAIL_CALLED = {"decide": 0, "ask": 1}  # function -> index in `programs`: bpf/maps.h, PROGRAM_*
_LOADING = "new-"  # no dot: bpffs reserves them (kernel/bpf/inode.c, bpf_lookup)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Open descriptors of a loaded router."""

    directory: Path
    program: int
    maps: dict[str, int]


# --- sources ---


def source_directory() -> Path:
    path = importlib.import_module("router.bpf").__file__
    assert path is not None
    return Path(path).parent


def _sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(source_directory().iterdir()) if path.suffix in (".c", ".h")}


def version(defines: Sequence[str] = ()) -> str:
    """Names what is loaded. A changed map size on an existing pin would be accepted in silence: so, by content."""
    text = "\0".join((*_sources().values(), *defines))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(name: str) -> str:
    """The source with our own headers in it. bcc rewrites map accesses in the main file only."""
    sources, included = _sources(), set[str]()

    def expand(name: str) -> Iterator[str]:
        included.add(name)
        yield f'#line 1 "{name}"'
        for number, line in enumerate(sources[name].splitlines(), 1):
            include = re.fullmatch(r'#include "(.+)"', line)
            if include is None:
                yield "" if line.startswith("#pragma once") else line
            elif include[1] not in included:
                yield from expand(include[1])
                yield f'#line {number + 1} "{name}"'
            else:
                yield ""

    return "\n".join(expand(name)) + "\n"


# --- open ---


def bpffs() -> Path:
    return Path(os.environ.get("UKLAUNCH_BPFFS", "/sys/fs/bpf"))


def root() -> Path:
    return bpffs() / "uklaunch"


def open_pins() -> Pins:
    """The router of this version of the sources; loaded now if it is not. The caller closes the descriptors."""
    directory = root() / version()
    try:
        return open_directory(directory)
    except FileNotFoundError:
        pass
    except PermissionError as exc:
        raise RouterError(f"no permission to open {directory}", "run uklaunch as root") from exc
    with _lock():
        with contextlib.suppress(FileNotFoundError):
            return open_directory(directory)
        load_apart(directory)
        return open_directory(directory)


def open_directory(directory: Path) -> Pins:
    """FileNotFoundError: it is not complete."""
    opened = list[int]()
    try:
        for name in (PROGRAM, *MAPS):
            opened.append(syscall.open_pin(f"{directory}/{name}"))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return Pins(directory=directory, program=opened[0], maps=dict(zip(MAPS, opened[1:], strict=True)))


@contextlib.contextmanager
def _lock() -> Iterator[None]:
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
    """The directory of each version that is loaded."""
    try:
        return [path for path in root().iterdir() if not path.name.startswith(_LOADING)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove(directory: Path) -> None:
    """Idempotent. What is attached keeps running until it is detached."""
    for path in directory.glob("*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()


# --- load ---


def load_apart(directory: Path, defines: Sequence[str] = ()) -> None:
    """Load in a child of our own. Raises RouterError."""
    package = Path(__file__).parent
    command = [sys.executable, "-m", "router.program", str(directory), *defines]
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if result.returncode == 0:
        return
    # The last line of what the child says is the message; a tab parts the hint from it.
    *detail, last = result.stderr.strip().splitlines() or ["the loader died without a word"]
    message, _, hint = last.partition("\t")
    raise RouterError(message, hint, "\n".join(detail[-60:]))


def load(directory: Path, defines: Sequence[str] = ()) -> None:
    """Compile, load and pin, in this process. Raises RouterError; the pins appear together or not at all."""
    loading = directory.parent / f"{_LOADING}{os.getpid()}"
    with _compiled("localhost.c", defines) as (functions, maps):
        for name, index in _TAIL_CALLED.items():
            fd = load_program(name, functions[name])
            syscall.update(maps["programs"], struct.pack("I", index), struct.pack("I", fd))
            os.close(fd)
        program = load_program("localhost", functions["localhost"])
        try:
            loading.mkdir()
            for name, fd in {PROGRAM: program, **maps}.items():
                syscall.pin(fd, f"{loading}/{name}")
            if directory.exists():
                remove(directory)  # some of it is missing, or we would not be here
            loading.rename(directory)
        except OSError as exc:
            remove(loading)
            raise _explain_bpffs(exc) from exc
        finally:
            os.close(program)


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


@contextlib.contextmanager
def _compiled(name: str, defines: Sequence[str]) -> Iterator[tuple[dict[str, bytes], dict[str, int]]]:
    """Each function's instructions, which refer to maps, and those maps' descriptors."""
    try:
        import bcc
    except ImportError as exc:
        raise RouterError(
            "the Python module bcc is missing",
            "apt-get install python3-bpfcc, and make the venv with --system-site-packages",
        ) from exc
    with tempfile.TemporaryDirectory(prefix="uklaunch-") as tree:
        make_kernel_tree(Path(tree))
        os.environ["BCC_KERNEL_SOURCE"] = tree
        try:
            module = bcc.BPF(
                text=flatten(name),
                cflags=[*CFLAGS, *(f"-D{define}" for define in defines)],
            )
        except Exception as exc:  # bcc has no class of its own for this; clang has spoken on stderr
            if os.geteuid() != 0:
                raise RouterError("the router needs root", "run uklaunch as root") from exc
            raise RouterError(f"bcc cannot compile the router: {exc}", "see: uklaunch doctor") from exc
        try:
            functions = {name: module.dump_func(name) for name in ("localhost", *_TAIL_CALLED)}
            yield functions, {name: module[name].map_fd for name in MAPS}
        finally:
            module.cleanup()


_KCONFIG = """\
#pragma once
#define CONFIG_BPF_SYSCALL 1
#define __LINUX_BPF_H__ /* bcc brings its own uapi bpf.h along */
#include <uapi/linux/types.h>
typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64;
typedef __s8 s8; typedef __s16 s16; typedef __s32 s32; typedef __s64 s64;
typedef _Bool bool;
typedef unsigned long uintptr_t;
typedef __SIZE_TYPE__ size_t;
enum { false, true };
#define NULL ((void *)0)
#define offsetof(type, member) __builtin_offsetof(type, member)
"""


def make_kernel_tree(tree: Path) -> None:
    """As much of a kernel source tree as bcc needs, from the package linux-libc-dev."""
    triplet = sysconfig.get_config_var("MULTIARCH") or ""
    include = tree / "include"
    links = {
        "uapi/linux": Path("/usr/include/linux"),
        "uapi/asm": Path("/usr/include") / triplet / "asm",
        "uapi/asm-generic": Path("/usr/include/asm-generic"),
    }
    for name, target in links.items():
        if not target.is_dir():
            raise RouterError(f"{target} is missing", "apt-get install linux-libc-dev")
        (include / name).parent.mkdir(parents=True, exist_ok=True)
        (include / name).symlink_to(target)
    files = {
        "linux/kconfig.h": _KCONFIG,
        "linux/log2.h": "",
        "asm/page.h": "#define PAGE_SHIFT 12\n#define PAGE_SIZE (1UL << PAGE_SHIFT)\n",
    }
    for name, text in files.items():
        (include / name).parent.mkdir(parents=True, exist_ok=True)
        (include / name).write_text(text)


def _main() -> int:
    try:
        load(Path(sys.argv[1]), sys.argv[2:])
    except RouterError as exc:
        print(exc.detail, f"{exc.message}\t{exc.hint}", sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
