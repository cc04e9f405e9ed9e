"""What an image is, from its own bytes: never from its name. Reads; changes nothing.

Each file is opened once (`ImageFile`). No other file is opened because an image names it: qcow2 disks with backing or
data files are refused by their header, before any tool of QEMU's sees them.

Sources: Documentation/arch/x86/boot.rst (bzImage); elf.h; xen/include/public/elfnote.h (PVH); the Multiboot
specifications, 0.6.96 and 2.0; docs/interop/qcow2.txt in QEMU's tree.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import ImageError, ImageNotFound, UklaunchError, UsageError, exhausted
from .imagefile import ImageFile
from .model import Family, Image, ImageFormat, Port, parse_memory_mib

MANIFEST = "uklaunch.toml"
MANIFEST_LIMIT_BYTES = 1 << 20
HEAD_BYTES = 64 << 10
SECTOR = 512
PVH_NOTE = 18  # XEN_ELFNOTE_PHYS32_ENTRY
NOTES_LIMIT_BYTES = 1 << 20
X86_MACHINES = (3, 62)  # EM_386, which multiboot kernels claim to be, and EM_X86_64
LINUX_PARTITION, GPT_PROTECTIVE = 0x83, 0xEE
# "Linux filesystem" and "Linux root (x86-64)", as their bytes stand in a GPT.
GPT_LINUX = {
    bytes.fromhex("af3dc60f838472478e793d69d8477de4"),
    bytes.fromhex("e3bc684fcde8b14d96e7fbcaf984b709"),
}
OSV_CMDLINE_OFFSET, OSV_CMDLINE_LIMIT = 512, 4096
QCOW2_MAGIC, NANOS_MAGIC = b"QFI\xfb", b"NVMTFS"

# What people hand us by mistake, and what they may have meant.
_STRANGERS = (
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"\xfd7zXZ\0", "an xz archive", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first"),
    (257, b"ustar", "a tar archive", "unpack it first"),
    (0, b"070701", "a cpio archive: an initrd, with no kernel", f"put it into a bundle, with a kernel and {MANIFEST}"),
    (0, b"#!", "a script", ""),
    (0x438, b"\x53\xef", "an ext4 file system, without a boot sector", "give a whole disk, or a bundle with a kernel"),
    (0, b"\xad\xbe\xad\xde", "an OSv file system, without a kernel", "name it under disks in a bundle"),
    (0, b"hsqs", "a squashfs file system", "give a whole disk, or a bundle with a kernel"),
    (0x8001, b"CD001", "an ISO 9660 image", "give a whole disk, or a bundle with a kernel"),
    (0, b"KDMV", "a VMDK disk", "convert it: qemu-img convert -O qcow2"),
    (0, b"conectix", "a VHD disk", "convert it: qemu-img convert -O qcow2"),
    (0, b"vhdxfile", "a VHDX disk", "convert it: qemu-img convert -O qcow2"),
    (0, b"MZ", "a PE program", ""),
)

# Strings that a kernel of the family has in it, stripped or not.
_FAMILY_MARKS = (
    (Family.OSV, (b"OSv v", b"_ZN3osv")),
    (Family.UNIKRAFT, (b"Unikraft", b"uk_inittab", b"ukplat_")),
    (Family.NANOS, (NANOS_MAGIC,)),
    (Family.LINUX, (b"Linux version ",)),  # a vmlinux; the others may speak of Linux too
)


def identify(path: Path | str, family: Family | None = None, sha256: str | None = None) -> Image:
    """What boots there and how it is configured. `family` overrides what the content says.

    `sha256`: the digest that the file, or a bundle's manifest, must have, in hexadecimal. Raises ImageNotFound,
    ImageError if it is nothing that we can boot or has another digest, UsageError for a bad manifest.
    """
    path = Path(path)
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return _bundle(path.resolve(), family, sha256)
        image = _file(_opened(path.resolve(), sha256))
    except FileNotFoundError:
        raise ImageNotFound(f"there is no image {path}", "give a disk image, a kernel or a bundle") from None
    except NotADirectoryError:
        raise ImageNotFound(f"there is no image {path}", "a part of its path is a file") from None
    except OSError as exc:
        raise exhausted(exc) or ImageError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError:  # a NUL, which a configuration file can have in it
        raise ImageNotFound(f"there is no image {str(path)!r}", "that is no name of a file") from None
    return image if family is None else replace(image, family=family)


_DIGEST = re.compile(r"(.+)@sha256:([0-9A-Fa-f]*)", re.DOTALL)


def split_digest(text: str) -> tuple[str, str | None]:
    """`PATH@sha256:HEX` as path and digest; a path may have an @ in it. Raises UsageError for half a digest."""
    match = _DIGEST.fullmatch(text)
    if match is None:
        return text, None
    if len(match[2]) != 64:
        raise UsageError(
            f"{text}: a SHA-256 digest has 64 hexadecimal digits, not {len(match[2])}", f"see: sha256sum {match[1]}"
        )
    return match[1], match[2].lower()


def _opened(path: Path, sha256: str | None) -> ImageFile:
    """Opened, and what it is said to be, before anything in it is believed. Raises OSError, ImageError."""
    file = ImageFile(path)
    if sha256 is not None and (found := file.sha256()) != sha256:
        raise ImageError(
            f"{path} is not the image that was asked for: its SHA-256 digest is {found}",
            "get the right one, or give the digest of this one",
        )
    return file


def _file(path: ImageFile) -> Image:
    head = path.read(HEAD_BYTES)
    size = path.size
    if not head:
        raise ImageError(f"{path} is empty")
    if head.startswith(b"\x7fELF"):
        return _elf(path, head, size)
    if head[0x202:0x206] == b"HdrS" and head[0x1FE:0x200] == b"\x55\xaa":
        return _bzimage(path, head, size)
    if head.startswith(QCOW2_MAGIC):
        return _disk(path, ImageFormat.QCOW2)
    if head[0x1FE:0x200] == b"\x55\xaa":
        return _disk(path, ImageFormat.RAW_DISK)
    raise _stranger(path, head)


def _stranger(path: ImageFile, head: bytes) -> ImageError:
    hint = "uklaunch boots OSv disks, PVH and multiboot kernels, bzImages and bundles"
    for offset, magic, what, remedy in _STRANGERS:
        if head[offset : offset + len(magic)] == magic:
            return ImageError(f"{path} is {what}, not an image that boots", remedy or hint)
    if all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 for byte in head[:1024]):
        return ImageError(f"{path} is a text file, not an image that boots", hint)
    return ImageError(f"{path} is of an unknown kind: it begins with {head[:8].hex(' ')}", hint)


def _truncated(path: ImageFile, what: str, wanted: int, size: int) -> ImageError:
    return ImageError(f"{path} is truncated: its {what} reaches to byte {wanted}, the file has {size}", "copy it again")


# --- kernels ---


def _kernel(path: ImageFile, format_: ImageFormat, family: Family) -> Image:
    return Image(path=path.path, format=format_, family=family, kernel=path)


def _bzimage(path: ImageFile, head: bytes, size: int) -> Image:
    sectors = head[0x1F1] or 4
    paragraphs = struct.unpack_from("<I", head, 0x1F4)[0]  # of 16 bytes, protocol 2.04 and newer
    wanted = (sectors + 1) * SECTOR + paragraphs * 16
    if wanted > size:
        raise _truncated(path, "kernel", wanted, size)
    with mmap.mmap(path.fd, 0, access=mmap.ACCESS_READ) as content:
        family = _family_of(content, size)  # OSv's vmlinuz.bin is a bzImage too
    return _kernel(path, ImageFormat.BZIMAGE, Family.LINUX if family is Family.GENERIC else family)


@dataclass(frozen=True, slots=True)
class _Segment:
    type: int
    offset: int
    size: int


def _elf(path: ImageFile, head: bytes, size: int) -> Image:
    try:
        segments = list(_segments(head))
    except (struct.error, IndexError, OverflowError):
        raise ImageError(f"{path} is truncated: not even its ELF header is whole", "copy it again") from None
    machine = struct.unpack_from("<H", head, 18)[0]
    if machine not in X86_MACHINES:
        raise ImageError(f"{path} is an ELF program for another CPU (machine {machine}), not for x86-64")
    for segment in segments:
        if segment.offset + segment.size > size:
            raise _truncated(path, "program", segment.offset + segment.size, size)
    with mmap.mmap(path.fd, 0, access=mmap.ACCESS_READ) as content:
        if any(
            _has_pvh_note(content[segment.offset : segment.offset + min(segment.size, NOTES_LIMIT_BYTES)])
            for segment in segments
            if segment.type == 4  # PT_NOTE
        ):
            format_ = ImageFormat.PVH_ELF
        elif _is_multiboot(head):
            format_ = ImageFormat.MULTIBOOT_ELF
        else:
            raise ImageError(
                f"{path} is an ELF program without a PVH note or a multiboot header: no kernel",
                "put it into an image of a unikernel, such as OSv's",
            )
        # What is loaded tells; a kernel that was not stripped has ten times as much to debug it with.
        end = max((segment.offset + segment.size for segment in segments if segment.type == 1), default=size)
        family = _family_of(content, end)
        image = _kernel(path, format_, family)
        if family is not Family.OSV:
            return image
        from .guests import bootfs

        return replace(image, etc=bootfs.read(content, end, "/etc/"))


def _segments(head: bytes) -> Iterator[_Segment]:
    wide = head[4] == 2  # EI_CLASS
    order = "<" if head[5] == 1 else ">"
    if wide:
        offset, entry, count = (
            struct.unpack_from(order + "Q", head, 32)[0],
            *struct.unpack_from(order + "HH", head, 54),
        )
    else:
        offset, entry, count = (
            struct.unpack_from(order + "I", head, 28)[0],
            *struct.unpack_from(order + "HH", head, 42),
        )
    for index in range(count):
        at = offset + index * entry
        if wide:
            kind, start, size = (
                struct.unpack_from(order + "I", head, at)[0],
                struct.unpack_from(order + "Q", head, at + 8)[0],
                struct.unpack_from(order + "Q", head, at + 32)[0],
            )
        else:
            kind, start, _, _, size = struct.unpack_from(order + "5I", head, at)
        yield _Segment(kind, start, size)


def _has_pvh_note(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, desc_size, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_size].rstrip(b"\0")
        if kind == PVH_NOTE and name == b"Xen":
            return True
        at += 12 + (name_size + 3 & ~3) + (desc_size + 3 & ~3)
    return False


def _is_multiboot(head: bytes) -> bool:
    """A header whose check sum is right: version 1 in the first 8 KiB, version 2 in the first 32."""
    for magic, limit, words in ((0x1BADB002, 8 << 10, 3), (0xE85250D6, 32 << 10, 4)):
        at = head.find(struct.pack("<I", magic), 0, limit)
        while at >= 0:
            whole = at % 4 == 0 and at + 4 * words <= len(head)
            if whole and sum(struct.unpack_from(f"<{words}I", head, at)) & 0xFFFFFFFF == 0:
                return True
            at = head.find(struct.pack("<I", magic), at + 1, limit)
    return False


def _family_of(content: mmap.mmap, end: int) -> Family:
    for family, marks in _FAMILY_MARKS:
        if any(content.find(mark, 0, end) >= 0 for mark in marks):
            return family
    return Family.GENERIC


# --- disks ---


@contextlib.contextmanager
def _slice(path: ImageFile, start: int, length: int) -> Iterator[tuple[BinaryIO, int]]:
    """A part of a disk as its guest sees it: an open file, and where in it the part begins."""
    if not _is_qcow2(path):
        with path.open() as file:
            yield file, start
        return
    with tempfile.NamedTemporaryFile(prefix="uklaunch-") as part:
        options = f"driver=raw,offset={start},size={length},file.driver=qcow2,file.file.driver=file"
        _qemu_img(path, "convert", "-O", "raw", "--image-opts", f"{options},file.file.filename={path.link}", part.name)
        part.seek(0)
        yield cast(BinaryIO, part), 0


def _read(path: ImageFile, start: int, length: int) -> bytes:
    with _slice(path, start, length) as (file, at):
        file.seek(at)
        return file.read(length)


# What a disk of some kilobytes may claim to be can take all there is: memory to check, time, files to unpack into.
_LIMITS = ("prlimit", f"--as={4 << 30}", f"--fsize={4 << 30}", "--cpu=60", "--core=0", "--")


def _qemu_img(path: ImageFile, *words: str) -> str:
    try:
        program = shutil.which("qemu-img")
        if program is None:
            raise UklaunchError("the command qemu-img is missing", "apt-get install qemu-utils")
        command = [*_LIMITS, program, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=(path.fd,)).stdout
    except subprocess.CalledProcessError as exc:
        why = (
            (exc.stderr.strip() or f"qemu-img gave no reason, code {exc.returncode}")
            .splitlines()[-1]
            .removeprefix("qemu-img: ")
        )
        why = why.replace(path.link, str(path))
        raise ImageError(f"{path} is damaged or cut off: {why}", "copy it again; see: qemu-img check") from exc


# Of a qcow2 header, big-endian: magic, version, backing file's offset and length, cluster bits, size, encryption.
_QCOW2 = struct.Struct(">4sIQIIQI")
_QCOW2_INCOMPATIBLE, _QCOW2_DATA_FILE = 72, 1 << 2  # where version 3 has its flags; this one


def _qcow2_size(path: ImageFile) -> int:
    """Its disk's size in bytes. A disk that lives in other files too is refused: whose they are, its writer decides.

    That is read here: a tool which opens the disk might open those files before it tells of them.
    """
    head = path.read(_QCOW2_INCOMPATIBLE + 8)
    if len(head) < _QCOW2_INCOMPATIBLE + 8:
        raise ImageError(f"{path} is damaged or cut off: not even its header is whole", "copy it again")
    _, version, backing, _, _, size, encryption = _QCOW2.unpack_from(head)
    if version not in (2, 3):
        raise ImageError(f"{path} is a qcow disk of version {version}", "convert it: qemu-img convert -O qcow2")
    if backing:
        raise ImageError(f"{path} is an overlay over another image", "flatten it: qemu-img convert -O qcow2")
    flags = struct.unpack_from(">Q", head, _QCOW2_INCOMPATIBLE)[0]
    if version == 3 and flags & _QCOW2_DATA_FILE:
        raise ImageError(f"{path} keeps its data in another file", "convert it: qemu-img convert -O qcow2")
    if encryption:
        raise ImageError(f"{path} is encrypted", "convert it: qemu-img convert -O qcow2")
    try:
        _qemu_img(path, "check", "--image-opts", f"driver=qcow2,file.driver=file,file.filename={path.link}")
    except ImageError as exc:
        # 3: clusters that nothing uses, which whoever was killed while writing leaves; they do no harm.
        if getattr(exc.__cause__, "returncode", None) != 3:
            raise
    return int(size)


def _disk(path: ImageFile, format_: ImageFormat) -> Image:
    size = _qcow2_size(path) if format_ is ImageFormat.QCOW2 else path.size
    head = _read(path, 0, min(HEAD_BYTES, size))
    if head[0x1FE:0x200] != b"\x55\xaa":
        raise ImageError(f"{path} is a {format_} without a boot sector", "give a whole disk")
    partitions = list(_partitions(head))
    for start, length in partitions:
        if start + length > size:
            raise _truncated(path, "partition", start + length, size)
    cmdline = _osv_cmdline(head)
    if cmdline is not None:
        family = Family.OSV
    elif any(_read(path, start, len(NANOS_MAGIC)) == NANOS_MAGIC for start, length in partitions if length):
        family = Family.NANOS
    else:
        family = Family.LINUX if _has_linux_partition(head) else Family.GENERIC
    return Image(
        path=path.path,
        format=format_,
        family=family,
        disks=(path,),
        disks_qcow2=(format_ is ImageFormat.QCOW2,),
        cmdline=cmdline or "",
        etc=_etc(path, head, size) if family is Family.OSV else {},
    )


def _etc(path: ImageFile, head: bytes, size: int) -> dict[str, bytes]:
    """/etc of an OSv disk: of its root's ROFS in a partition, or of one that fills the disk."""
    from .guests import rofs

    parts = list(_partitions(head)) if head[0x1FE:0x200] == b"\x55\xaa" else []
    for start, length in parts or [(0, size)]:
        length = min(length, rofs.size(_read(path, start, SECTOR)))  # not all of a partition that is something else
        if not length:
            continue
        with _slice(path, start, length) as (file, at):
            if etc := rofs.read(file, at, "etc"):
                return etc
    return {}


def _partitions(head: bytes) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of the MBR's partitions; a GPT shows as one that may be longer than the disk."""
    for slot in range(4):
        kind = head[446 + 16 * slot + 4]
        start, length = struct.unpack_from("<II", head, 446 + 16 * slot + 8)
        if kind not in (0, GPT_PROTECTIVE) and length:
            yield start * SECTOR, length * SECTOR


def _has_linux_partition(head: bytes) -> bool:
    """By its type; in a GPT by its entries' type GUIDs."""
    kinds = {head[446 + 16 * slot + 4] for slot in range(4)}
    entries = head[2 * SECTOR : 2 * SECTOR + 128 * 128]
    gpt = {entries[at : at + 16] for at in range(0, len(entries), 128)}
    return LINUX_PARTITION in kinds or (GPT_PROTECTIVE in kinds and bool(gpt & GPT_LINUX))


def _osv_cmdline(head: bytes) -> str | None:
    """The NUL-terminated text behind the boot sector of an OSv disk; None if there is something else."""
    area = head[OSV_CMDLINE_OFFSET : OSV_CMDLINE_OFFSET + OSV_CMDLINE_LIMIT]
    text, nul, _ = area.partition(b"\0")
    if not nul or not text or not all(byte == 9 or 32 <= byte < 127 for byte in text):
        return None
    return text.decode().strip()


# --- bundles ---


def _bundle(directory: Path, family: Family | None, sha256: str | None) -> Image:
    import tomllib

    file = directory / MANIFEST
    try:
        manifest = tomllib.loads(_opened(file, sha256).read(MANIFEST_LIMIT_BYTES).decode())
    except FileNotFoundError:
        raise ImageError(
            f"{directory} is a directory without {MANIFEST}{_looks_like(directory)}",
            f"write one: kernel, initrd, cmdline, family, memory, ports; see README.md, {MANIFEST}",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UsageError(f"{file}: {exc}") from None
    return _Manifest(file, manifest, pinned=sha256 is not None).image(family)


def _looks_like(directory: Path) -> str:
    if (directory / "oci-layout").exists():
        return " (it is an OCI layout)"
    return ""


@dataclass(frozen=True, slots=True)
class _Manifest:
    """A parsed `uklaunch.toml`; every complaint names the file and the key."""

    file: Path
    values: dict[str, Any]
    pinned: bool  # its own digest was given: it says nothing of files that have none

    KEYS = ("kernel", "initrd", "disks", "cmdline", "family", "memory", "cpus", "ports", "env")

    def image(self, family: Family | None) -> Image:
        for key in self.values:
            if key not in self.KEYS:
                raise self._bad(key, "is unknown", self._nearest(key))
        kernel = self._paths("kernel")
        if len(kernel) > 1:
            raise self._bad("kernel", "names several files", "there is one")
        disks = self._paths("disks")
        if not kernel and not disks:
            raise UsageError(f"{self.file} names neither a kernel nor disks", "it must say what boots")
        initrds = self._paths("initrd")
        booted = _file((kernel or disks)[0])
        if kernel and booted.kernel is None:
            raise self._bad("kernel", f"is a {booted.format}", "name it under disks")
        if not kernel and booted.kernel is not None:
            raise self._bad("disks", f"begins with a {booted.format}", "name it as the kernel")
        stated = self.values.get("family", booted.family.value)
        try:
            stated = Family(stated)
        except ValueError:
            families = ", ".join(Family)
            raise self._bad("family", f"{stated!r} is unknown", f"use one of {families}") from None
        family = family or stated
        for disk in disks if kernel else disks[1:]:
            if _is_qcow2(disk):
                _qcow2_size(disk)  # whole in itself, as the one that boots
        root = _osv_root(disks[0]) if kernel and disks and family is Family.OSV else None
        return Image(
            path=self.file.parent,
            format=booted.format,
            family=family,
            kernel=kernel[0] if kernel else None,
            initrds=initrds,
            disks=disks,
            disks_qcow2=tuple(_is_qcow2(disk) for disk in disks),
            cmdline=self._text("cmdline") or (root.cmdline if root else booted.cmdline),
            etc=root.etc if root else booted.etc,
            env=self._env(),
            memory_mib=self._memory_mib(),
            cpus=self._cpus(),
            ports=self._ports(),
        )

    def _bad(self, key: str, why: str, hint: str = "") -> UsageError:
        return UsageError(f"{self.file}: {key} {why}", hint)

    def _nearest(self, key: str) -> str:
        import difflib

        close = difflib.get_close_matches(key, self.KEYS, 1)
        return f"did you mean {close[0]}?" if close else f"known are {', '.join(self.KEYS)}"

    def _text(self, key: str) -> str:
        value = self.values.get(key, "")
        if not isinstance(value, str):
            raise self._bad(key, "is not a text", f'write {key} = "..."')
        return value

    def _texts(self, key: str) -> list[str]:
        value = self.values.get(key, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise self._bad(key, "is neither a text nor a list of texts")
        return values

    def _paths(self, key: str) -> tuple[ImageFile, ...]:
        return tuple(self._open(key, *split_digest(text)) for text in self._texts(key))

    def _open(self, key: str, text: str, sha256: str | None) -> ImageFile:
        """The file. What a bundle names elsewhere must be everybody's to read: its author may be a stranger, and its
        guest sees all of it."""
        path = self.file.parent / text
        if self.pinned and sha256 is None:
            raise self._bad(key, f"names {path} without a digest", f'write {key} = "{text}@sha256:..."')
        try:
            file = _opened(path, sha256)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise self._bad(key, f"names {path}, which is no file", "paths start at the bundle's directory") from None
        except OSError as exc:
            raise exhausted(exc) or self._bad(key, f"names {path}, which cannot be read: {exc.strerror}") from None
        if not (Path(file.link).readlink().is_relative_to(self.file.parent) or _is_public(file)):
            raise self._bad(
                key, f"names {path}, outside the bundle, which not everybody may read", "copy it into the bundle"
            )
        return file

    def _memory_mib(self) -> int | None:
        if not (text := self._text("memory")):
            return None
        try:
            return parse_memory_mib(text)
        except UsageError as exc:
            raise self._bad("memory", f"does not do: {exc.message}", exc.hint) from None

    def _cpus(self) -> int | None:
        value = self.values.get("cpus")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 255):
            raise self._bad("cpus", f"{value!r} is not a number from 1 to 255")
        return value

    def _ports(self) -> tuple[Port, ...]:
        value = self.values.get("ports", [])
        if not isinstance(value, list):
            raise self._bad("ports", "is not a list", 'write ports = ["8080/tcp"]')
        try:
            return tuple(Port.parse(str(item)) for item in value)
        except UsageError as exc:
            raise self._bad("ports", f"does not do: {exc.message}", exc.hint) from None

    def _env(self) -> dict[str, str]:
        value = self.values.get("env", {})
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self._bad("env", "is not a table of texts", '[env] with KEY = "value" below it')
        for key in value:
            if not (key.isascii() and key.isidentifier()):
                raise self._bad("env", f"has {key!r}, which is not a variable's name", "write it as KEY")
        return value


def _is_public(file: ImageFile) -> bool:
    """May any user of this machine read it where it is?"""
    parents = Path(file.link).readlink().parents
    return bool(file.mode & stat.S_IROTH) and all(parent.stat().st_mode & stat.S_IXOTH for parent in parents)


@dataclass(frozen=True, slots=True)
class _OsvRoot:
    cmdline: str
    etc: dict[str, bytes]


def _osv_root(path: ImageFile) -> _OsvRoot:
    """What the first disk of an OSv kernel tells: a usr.img its command line too, which its own loader would read."""
    size = _qcow2_size(path) if _is_qcow2(path) else path.size
    head = _read(path, 0, min(HEAD_BYTES, size))
    bootable = head[0x1FE:0x200] == b"\x55\xaa"
    return _OsvRoot(cmdline=(_osv_cmdline(head) or "") if bootable else "", etc=_etc(path, head, size))


def _is_qcow2(path: ImageFile) -> bool:
    return path.read(4) == QCOW2_MAGIC
