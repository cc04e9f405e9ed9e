"""The descriptors that a VMM inherits: image files as they were opened once, what we make of them, overlays.

What becomes of a file of the user's, whose descriptor QEMU gets: a disk is read by that very descriptor; a kernel or an
initrd QEMU opens again by itself, through /proc, and so needs to be allowed to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UklaunchError
from ..imagefile import ImageFile
from ..model import Boot, Disk

OVERLAY_DIR = Path("/var/tmp")  # on disk, not in memory: a guest may write as much as its disk holds


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFds:
    """Descriptors of one disk: `base` read-only, `overlay` (qcow2, read-write) over it if the guest may write."""

    base: int
    qcow2: bool
    overlay: int | None
    overlay_limit_bytes: int = 0  # as long as it gets when the guest writes all that the disk holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fds:
    """All that QEMU gets beside its argument list."""

    tap: int
    qmp: int
    console: int
    kernel: int | None = None
    initrd: int | None = None
    disks: tuple[DiskFds, ...] = ()

    def all(self) -> list[int]:
        optional = [self.kernel, self.initrd, *(disk.overlay for disk in self.disks)]
        return [
            self.tap,
            self.qmp,
            self.console,
            *(disk.base for disk in self.disks),
            *(fd for fd in optional if fd is not None),
        ]

    @property
    def write_limit_bytes(self) -> int:
        """More of any file QEMU has no reason to write."""
        return max((disk.overlay_limit_bytes for disk in self.disks), default=0)


class Opened(contextlib.ExitStack):
    """The descriptors that QEMU will inherit; ours are closed when the block ends."""

    def keep(self, fd: int) -> int:
        self.callback(os.close, fd)
        return fd

    def bytes(self, name: str, parts: Iterable[ImageFile | bytes], align: int = 1) -> int:
        """A file in memory that holds the parts, each padded to a multiple of `align` bytes."""
        fd = self.keep(os.memfd_create(name))
        with open(fd, "wb", closefd=False) as out:
            for part in parts:
                if isinstance(part, ImageFile):
                    with part.open() as source:
                        shutil.copyfileobj(source, out, 1 << 20)
                    part.check()
                else:
                    out.write(part)
                out.write(bytes(-out.tell() % align))
        return self.keep(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))  # QEMU's fdsets tell the two apart

    def file(self, file: ImageFile) -> int:
        """The very file, with a position of its own."""
        file.check()
        return self.keep(os.open(file.link, os.O_RDONLY | os.O_CLOEXEC))

    def readable(self, file: ImageFile) -> int:
        """The file, for QEMU to open again by itself: as it is if anyone may read it, else a copy in memory."""
        return self.file(file) if file.mode & stat.S_IROTH else self.bytes(file.path.name, [file])

    def disk(self, disk: Disk) -> DiskFds:
        source = disk.source
        base = self.bytes("disk", [source], 512) if isinstance(source, bytes) else self.file(source)
        if disk.readonly:
            return DiskFds(base=base, qcow2=disk.qcow2, overlay=None)
        overlay = self.overlay(base, disk)
        return DiskFds(base=base, qcow2=disk.qcow2, overlay=overlay, overlay_limit_bytes=limit_bytes(overlay))

    def overlay(self, base: int, disk: Disk) -> int:
        """A nameless qcow2 over the disk, with the patches written into it: it goes when QEMU goes."""
        fd = self.keep(os.open(OVERLAY_DIR, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        path, backing = f"/proc/self/fd/{fd}", f"/proc/self/fd/{base}"
        layout = "qcow2" if disk.qcow2 else "raw"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-F", layout, "-b", backing, path, inherited=(fd, base))
        for offset, content in disk.patches:
            patch = self.bytes("patch", [content])  # not a file with a name: an OSv guest's environment is in it
            write = f"write -q -s /proc/self/fd/{patch} {offset} {len(content)}"
            _run("qemu-io", "-f", "qcow2", "-c", write, path, inherited=(fd, base, patch))
        return fd


def limit_bytes(qcow2: int) -> int:
    """Of a file that qemu-img has just made: what its disk holds, and its tables, which take 1/8192 of that for where
    each cluster is and 1/32768 for whether it is used (docs/interop/qcow2.txt); twice that, and some for rounding."""
    size = int.from_bytes(os.pread(qcow2, 8, 24), "big")
    return size + size // 2048 + (4 << 20)


def _run(*command: str, inherited: tuple[int, ...]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=inherited)
    except FileNotFoundError:
        raise missing(command[0], "qemu-utils") from None
    except subprocess.CalledProcessError as exc:
        raise UklaunchError(
            f"{command[0]} cannot lay an overlay over the image",
            "is the image damaged? see: qemu-img check",
            exc.stderr or exc.stdout,
        ) from exc


def missing(command: str, package: str) -> UklaunchError:
    return UklaunchError(f"the command {command} is missing", f"apt-get install {package}")


def open_fds(opened: Opened, boot: Boot, tap: int, qmp: int, console: int) -> Fds:
    kernel = initrd = None
    if boot.kernel is not None:
        kernel = opened.readable(boot.kernel)
    if len(boot.initrds) == 1 and isinstance(boot.initrds[0], ImageFile):
        initrd = opened.readable(boot.initrds[0])
    elif boot.initrds:
        initrd = opened.bytes("initrd", boot.initrds, 4)
    return Fds(
        tap=tap,
        qmp=qmp,
        console=console,
        kernel=kernel,
        initrd=initrd,
        disks=tuple(opened.disk(disk) for disk in boot.disks),
    )
