"""What an image is, from its own bytes: never from its name. Reads; changes nothing.

Sources: Documentation/arch/x86/boot.rst (bzImage); elf.h; xen/include/public/elfnote.h (PVH); the Multiboot
specifications, 0.6.96 and 2.0; docs/interop/qcow2.rst in QEMU's tree.
"""

from __future__ import annotations

import mmap
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ImageError, ImageNotFound, UklaunchError, UsageError
from .model import Family, Image, ImageFormat, Port, parse_memory_mib

MANIFEST = "uklaunch.toml"
HEAD_BYTES = 64 << 10
SECTOR = 512
PVH_NOTE = 18  # XEN_ELFNOTE_PHYS32_ENTRY
NOTES_LIMIT_BYTES = 1 << 20
LINUX_PARTITION, GPT_PROTECTIVE = 0x83, 0xEE
# "Linux filesystem" and "Linux root (x86-64)", as their bytes stand in a GPT.
GPT_LINUX = {
    bytes.fromhex("af3dc60f838472478e793d69d8477de4"),
    bytes.fromhex("e3bc684fcde8b14d96e7fbcaf984b709"),
}
OSV_CMDLINE_OFFSET, OSV_CMDLINE_LIMIT = 512, 4096

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
    (Family.NANOS, (b"NVMTFS",)),
)


def identify(path: Path | str, family: Family | None = None) -> Image:
    """What boots there and how it is configured. `family` overrides what the content says.

    Raises ImageNotFound, ImageError if it is nothing that we can boot, UsageError for a bad manifest.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _bundle(path.resolve(), family)
        if not stat.S_ISREG(mode):
            raise ImageError(f"{path} is a device, a pipe or a socket, not an image", "give a file or a directory")
        image = _file(path.resolve())
    except FileNotFoundError:
        raise ImageNotFound(f"there is no image {path}", "give a disk image, a kernel or a bundle") from None
    except NotADirectoryError:
        raise ImageNotFound(f"there is no image {path}", "a part of its path is a file") from None
    except OSError as exc:
        raise ImageError(f"cannot read {path}: {exc.strerror}") from exc
    return image if family is None else replace(image, family=family)


def _file(path: Path) -> Image:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        size = path.stat().st_size
        if not head:
            raise ImageError(f"{path} is empty")
        if head.startswith(b"\x7fELF"):
            return _elf(path, head, size)
        if head[0x202:0x206] == b"HdrS" and head[0x1FE:0x200] == b"\x55\xaa":
            return _bzimage(path, head, size)
    if head.startswith(b"QFI\xfb"):
        return _qcow2(path, size, head)
    if head[0x1FE:0x200] == b"\x55\xaa":
        return _raw_disk(path, head, size)
    raise _stranger(path, head)


def _stranger(path: Path, head: bytes) -> ImageError:
    hint = "uklaunch boots OSv disks, PVH and multiboot kernels, bzImages and bundles"
    for offset, magic, what, remedy in _STRANGERS:
        if head[offset : offset + len(magic)] == magic:
            return ImageError(f"{path} is {what}, not an image that boots", remedy or hint)
    if all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 for byte in head[:1024]):
        return ImageError(f"{path} is a text file, not an image that boots", hint)
    return ImageError(f"{path} is of an unknown kind: it begins with {head[:8].hex(' ')}", hint)


def _truncated(path: Path, what: str, wanted: int, size: int) -> ImageError:
    return ImageError(f"{path} is truncated: its {what} reaches to byte {wanted}, the file has {size}", "copy it again")


# --- kernels ---


def _kernel(path: Path, format_: ImageFormat, family: Family) -> Image:
    return Image(path=path, format=format_, family=family, kernel=path)


def _bzimage(path: Path, head: bytes, size: int) -> Image:
    sectors = head[0x1F1] or 4
    paragraphs = struct.unpack_from("<I", head, 0x1F4)[0]  # of 16 bytes, protocol 2.04 and newer
    wanted = (sectors + 1) * SECTOR + paragraphs * 16
    if wanted > size:
        raise _truncated(path, "kernel", wanted, size)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        family = _family_of(content)  # OSv's vmlinuz.bin is a bzImage too
    return _kernel(path, ImageFormat.BZIMAGE, Family.LINUX if family is Family.GENERIC else family)


@dataclass(frozen=True, slots=True)
class _Segment:
    type: int
    offset: int
    size: int


def _elf(path: Path, head: bytes, size: int) -> Image:
    try:
        segments = list(_segments(head))
    except (struct.error, IndexError):
        raise ImageError(f"{path} is truncated: not even its ELF header is whole", "copy it again") from None
    for segment in segments:
        if segment.offset + segment.size > size:
            raise _truncated(path, "program", segment.offset + segment.size, size)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
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
        return _kernel(path, format_, _family_of(content))


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


def _family_of(content: mmap.mmap) -> Family:
    for family, marks in _FAMILY_MARKS:
        if any(content.find(mark) >= 0 for mark in marks):
            return family
    return Family.GENERIC


# --- disks ---


def _qcow2(path: Path, size: int, head: bytes) -> Image:
    if len(head) < 72:
        raise ImageError(f"{path} is truncated: not even its qcow2 header is whole", "copy it again")
    l1_size, l1_offset = struct.unpack_from(">IQ", head, 36)
    if l1_offset + 8 * l1_size > size:
        raise _truncated(path, "cluster table", l1_offset + 8 * l1_size, size)
    if struct.unpack_from(">Q", head, 8)[0]:
        raise ImageError(f"{path} is an overlay over another image", "flatten it: qemu-img convert -O qcow2")
    with tempfile.NamedTemporaryFile(prefix="uklaunch-") as raw:
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), raw.name]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise UklaunchError("the command qemu-img is missing", "apt-get install qemu-utils") from None
        except subprocess.CalledProcessError as exc:
            raise ImageError(f"{path} is damaged: {exc.stderr.strip()}", "see: qemu-img check") from exc
        content = Path(raw.name)
        with content.open("rb") as file:
            inside = file.read(HEAD_BYTES)
        if inside[0x1FE:0x200] != b"\x55\xaa":
            raise ImageError(f"{path} is a qcow2 disk without a boot sector", "give a whole disk")
        image = _raw_disk(content, inside, content.stat().st_size, shown=path)
    return replace(image, path=path, format=ImageFormat.QCOW2, disks=(path,), disks_qcow2=(True,))


def _raw_disk(path: Path, head: bytes, size: int, shown: Path | None = None) -> Image:
    partitions = list(_partitions(head))
    for start, length in partitions:
        if start + length > size:
            raise _truncated(shown or path, "partition", start + length, size)
    family, cmdline, etc = Family.GENERIC, "", {}
    if (found := _osv_cmdline(head)) is not None:
        from .guests import rofs

        family, cmdline = Family.OSV, found
        with path.open("rb") as file:
            for start, _ in partitions:
                etc.update(rofs.read(file, start, "etc"))
    else:
        family = Family.LINUX if _has_linux_partition(head) else Family.GENERIC
        with path.open("rb") as file:
            for start, _ in partitions:
                file.seek(start)
                if file.read(6) == b"NVMTFS":
                    family = Family.NANOS
    return Image(
        path=path,
        format=ImageFormat.RAW_DISK,
        family=family,
        disks=(path,),
        disks_qcow2=(False,),
        cmdline=cmdline,
        etc=etc,
    )


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


def _bundle(directory: Path, family: Family | None) -> Image:
    import tomllib

    file = directory / MANIFEST
    try:
        manifest = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ImageError(
            f"{directory} is a directory without {MANIFEST}{_looks_like(directory)}",
            f"write one: kernel, initrd, cmdline, family, memory, ports; see README.md, {MANIFEST}",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{file}: {exc}") from None
    return _Manifest(file, manifest).image(family)


def _looks_like(directory: Path) -> str:
    if (directory / "oci-layout").exists():
        return " (it is an OCI layout)"
    return ""


@dataclass(frozen=True, slots=True)
class _Manifest:
    """A parsed `uklaunch.toml`; every complaint names the file and the key."""

    file: Path
    values: dict[str, Any]

    KEYS = ("kernel", "initrd", "disks", "cmdline", "family", "memory", "cpus", "ports", "env")

    def image(self, family: Family | None) -> Image:
        for key in self.values:
            if key not in self.KEYS:
                raise self._bad(key, "is unknown", self._nearest(key))
        kernel = self._paths("kernel")[:1]
        disks = self._paths("disks")
        if not kernel and not disks:
            raise UsageError(f"{self.file} names neither a kernel nor disks", "it must say what boots")
        booted = _file((kernel or disks)[0])
        if kernel and booted.kernel is None:
            raise self._bad("kernel", f"is a {booted.format}", "name it under disks")
        stated = self.values.get("family", booted.family.value)
        try:
            stated = Family(stated)
        except ValueError:
            families = ", ".join(Family)
            raise self._bad("family", f"{stated!r} is unknown", f"use one of {families}") from None
        memory = self._text("memory")
        return Image(
            path=self.file.parent,
            format=booted.format,
            family=family or stated,
            kernel=kernel[0] if kernel else None,
            initrds=self._paths("initrd"),
            disks=disks,
            disks_qcow2=tuple(_is_qcow2(disk) for disk in disks),
            cmdline=self._text("cmdline") or booted.cmdline,
            etc=_etc(disks),
            env=self._env(),
            memory_mib=parse_memory_mib(memory) if memory else None,
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

    def _paths(self, key: str) -> tuple[Path, ...]:
        paths = tuple(self.file.parent / text for text in self._texts(key))
        for path in paths:
            if not path.is_file():
                raise self._bad(key, f"names {path}, which is no file", "paths start at the bundle's directory")
        return paths

    def _cpus(self) -> int | None:
        value = self.values.get("cpus")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 255):
            raise self._bad("cpus", f"{value!r} is not a number from 1 to 255")
        return value

    def _ports(self) -> tuple[Port, ...]:
        value = self.values.get("ports", [])
        if not isinstance(value, list):
            raise self._bad("ports", "is not a list", 'write ports = ["8080/tcp"]')
        return tuple(Port.parse(str(item)) for item in value)

    def _env(self) -> dict[str, str]:
        value = self.values.get("env", {})
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self._bad("env", "is not a table of texts", '[env] with KEY = "value" below it')
        return value


def _is_qcow2(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"QFI\xfb"


def _etc(disks: tuple[Path, ...]) -> dict[str, bytes]:
    """/etc of the first raw disk that is, or has, an OSv ROFS."""
    from .guests import rofs

    for disk in disks:
        with disk.open("rb") as file:
            head = file.read(SECTOR).ljust(SECTOR, b"\0")
            for start in (0, *(start for start, _ in _partitions(head))):
                if etc := rofs.read(file, start, "etc"):
                    return etc
    return {}
