"""Images, byte by byte: what OSv, Nanos, Unikraft and Linux build, as far as a header reaches. None of them boots."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

from launcher.guests import bootfs, rofs
from launcher.model import AddressPlan, Nic

SECTOR = 512
FUZZ = int(os.environ.get("UKLAUNCH_FUZZ", "1"))  # how many times as long fuzzers look

# The first guest of a pod.
PLAN = AddressPlan()
NIC = Nic(
    mac=PLAN.guest_mac(2),
    ipv4=PLAN.guest_ipv4(2),
    ipv6=PLAN.guest_ipv6(2),
    gateway_ipv4=PLAN.ipv4.ip,
    gateway_ipv6=PLAN.ipv6.ip,
)


def elf(*, pvh: bool = False, multiboot: bool = False, text: bytes = b"", bits: int = 64) -> bytes:
    """A little-endian x86 ELF with a PT_NOTE (the PVH entry, or another's) and a PT_LOAD."""
    note = struct.pack("<III4sQ", 4, 8, 18 if pvh else 1, b"Xen\0" if pvh else b"GNU\0", 0x200000)
    body = struct.pack("<III", 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFFFFFF) if multiboot else b""
    body += text + bytes(64)
    if bits == 64:
        start = 64 + 2 * 56
        head = struct.pack(
            "<4s5B7x2HI3QI6H", b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, 0x200000, 64, 0, 0, 64, 56, 2, 0, 0, 0
        )
        segment = lambda kind, at, size: struct.pack("<2I6Q", kind, 5, at, 0, 0, size, size, 4)  # noqa: E731
    else:
        start = 52 + 2 * 32
        head = struct.pack("<4s5B7x2H5I6H", b"\x7fELF", 1, 1, 1, 0, 0, 2, 3, 1, 0x100000, 52, 0, 0, 52, 32, 2, 0, 0, 0)
        segment = lambda kind, at, size: struct.pack("<8I", kind, at, 0, 0, size, size, 5, 4)  # noqa: E731
    segments = segment(4, start, len(note)) + segment(1, start + len(note), len(body))
    return head + segments + note + body


OSV_ELF = elf(pvh=True, text=b"\0OSv v0.57.0-398\0")
UNIKRAFT_ELF = elf(multiboot=True, text=b"\0ukplat_entry\0Powered by Unikraft\0", bits=32)


def bzimage() -> bytes:
    """A setup of two sectors and a kernel of 4 KiB: Documentation/arch/x86/boot.rst."""
    image = bytearray(3 * SECTOR + 4096)
    image[0x1F1] = 2
    struct.pack_into("<I", image, 0x1F4, 4096 // 16)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x020F)
    return bytes(image)


def mbr(boot: bytes, *partitions: tuple[int, int]) -> bytearray:
    """A boot sector; partitions as (first sector, sectors)."""
    sector = bytearray(boot.ljust(SECTOR, b"\0"))
    for slot, (first, count) in enumerate(partitions):
        struct.pack_into("<8B2I", sector, 446 + 16 * slot, 0x80, 0, 2, 0, 0x83, 0, 0, 0, first, count)
    sector[510:512] = b"\x55\xaa"
    return sector


def osv_disk(cmdline: str, etc: dict[str, bytes]) -> bytes:
    """A usr.img: boot sector, command line at 512, and, in the second slot, a ROFS root."""
    root = rofs.write({f"etc/{name}": data for name, data in etc.items()} | {"hello.so": b"\x7fELF"})
    first = 128
    disk = mbr(b"\xea", (1, first - 1), (first, len(root) // SECTOR))
    disk += cmdline.encode().ljust((first - 1) * SECTOR, b"\0") + root
    return bytes(disk)


def nanos_disk() -> bytes:
    """A boot sector, a boot file system and a TFS: tools/mkfs.c in Nanos' tree."""
    disk = mbr(b"\xfa", (64, 64), (128, 64)).ljust(192 * SECTOR, b"\0")
    disk[SECTOR : SECTOR + 4] = b"\xe8\x00\x01\x02"  # stage 2, not text
    for first in (64, 128):
        disk[first * SECTOR : first * SECTOR + 6] = b"NVMTFS"
    return bytes(disk)


def bootfs_image(files: dict[str, bytes]) -> bytes:
    """What scripts/mkbootfs.py in OSv's tree writes; a name that ends in @ is a symbolic link."""
    records, content = b"", b""
    for name, data in files.items():
        link = name.endswith("@")
        data += b"\0" * link
        offset = (len(files) + 1) * bootfs.RECORD.size + len(content)
        records += bootfs.RECORD.pack(len(data), offset, link, name.removesuffix("@").encode())
        content += data
    return records + bytes(bootfs.RECORD.size) + content


def qcow2(raw: bytes, path: Path, *options: str) -> Path:
    source = path.with_suffix(".tmp-raw")
    source.write_bytes(raw)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(source), str(path)], check=True)
    source.unlink()
    return path
