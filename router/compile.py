"""From the sources in bpf/ to an object that any host can load: bcc compiles, and that is all it does.

An object is JSON: each map's shape, and each function's instructions with the names of the maps that they refer to. bcc
changes the working directory of the whole process and leaves 70 MB behind, so this runs as a short-lived child (`python
-m router.compile`), the only importer of bcc, and only where nobody has compiled these sources before (program.py).

bcc insists on a kernel source tree, for little more than types that linux-libc-dev has. So it is always given one of
ours, made of links to that package and three small files, and machines with and without headers take the same path.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import syscall
from .errors import RouterError
from .program import FUNCTIONS, MAPS, UNPINNED_MAPS, sources

# No debug information and a light front end take 0.1 s off a compilation; bcc runs LLVM's full optimiser all the same.
CFLAGS = ["-Wno-macro-redefined", "-g0", "-O1"]

_INSTRUCTION = struct.Struct("<BBhi")
_LOAD_IMM64, _PSEUDO_MAP_FD = 0x18, 1  # linux/bpf.h: BPF_LD | BPF_IMM | BPF_DW, BPF_PSEUDO_MAP_FD


def flatten(name: str) -> str:
    """The source with our own headers in it. bcc rewrites map accesses in the main file only."""
    texts, included = sources(), set[str]()

    def expand(name: str) -> Iterator[str]:
        included.add(name)
        yield f'#line 1 "{name}"'
        for number, line in enumerate(texts[name].splitlines(), 1):
            include = re.fullmatch(r'#include "(.+)"', line)
            if include is None:
                yield "" if line.startswith("#pragma once") else line
            elif include[1] not in included:
                yield from expand(include[1])
                yield f'#line {number + 1} "{name}"'
            else:
                yield ""

    return "\n".join(expand(name)) + "\n"


def compiled(name: str, defines: Sequence[str]) -> dict[str, Any]:
    """The object. Raises RouterError."""
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
            module = bcc.BPF(text=flatten(name), cflags=[*CFLAGS, *(f"-D{define}" for define in defines)])
        except Exception as exc:  # bcc has no class of its own for this; clang has spoken on stderr
            if os.geteuid() != 0:
                raise RouterError("the router needs root", "run uklaunch as root") from exc
            raise RouterError(f"bcc cannot compile the router: {exc}", "see: uklaunch doctor") from exc
        try:
            fds = {name: module[name].map_fd for name in (*MAPS, *UNPINNED_MAPS)}
            names = {fd: name for name, fd in fds.items()}
            return {
                "maps": {name: syscall.map_shape(fd) for name, fd in fds.items()},
                "functions": {name: _relocatable(module.dump_func(name), names) for name in FUNCTIONS},
            }
        finally:
            module.cleanup()


def _relocatable(code: bytes, names: dict[int, str]) -> dict[str, Any]:
    """Instructions, and which map's descriptor belongs where: [[number of the instruction, name], ...]."""
    maps = []
    for number, (opcode, registers, _, value) in enumerate(_INSTRUCTION.iter_unpack(code)):
        if opcode == _LOAD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            maps.append([number, names[value]])
    return {"code": base64.b64encode(code).decode(), "maps": maps}


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
        json.dump(compiled("localhost.c", sys.argv[1:]), sys.stdout)
    except RouterError as exc:
        # The last line is the message; a tab parts the hint from it.
        print(exc.detail, f"{exc.message}\t{exc.hint}", sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
