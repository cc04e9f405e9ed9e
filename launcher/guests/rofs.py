"""OSv's read-only file system: written for the guest's /etc, read to keep what an image has there.

    block 0           superblock: eight little-endian u64 (magic, version, block size, first block and number of blocks
                      of the structure area, numbers of dirents, symlinks and inodes)
    blocks 1..        file data, contiguous, each file padded to a block
    structure area    dirents (u64 inode, u16 length, name), symlinks (u16 length, target), inodes (four u64: mode,
                      number, offset, count), packed

Source: fs/rofs/rofs.hh and scripts/gen-rofs-img.py in OSv's tree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

MAGIC = 0xDEADBEAD
VERSION = 1
BLOCK = 512
DIRECTORY, FILE, LINK = 0x4000, 0x8000, 0xA000
READ_LIMIT_BYTES = 1 << 20  # of structures, and of each file: /etc is small, a damaged image may claim anything
TOTAL_LIMIT_BYTES = 16 << 20  # of all files: a hostile one may name one file a thousand times

_SUPERBLOCK = struct.Struct("<8Q")
_INODE = struct.Struct("<4Q")


def write(files: Mapping[str, bytes]) -> bytes:
    """An image with these files; keys are paths without a leading slash, directories come from them."""
    tree: dict[str, object] = {}
    for path, data in sorted(files.items()):
        *parents, name = path.split("/")
        directory = tree
        for parent in parents:
            directory = directory.setdefault(parent, {})  # type: ignore[assignment]
        directory[name] = data
    blocks, dirents = bytearray(), bytearray()
    inodes = [(DIRECTORY, 1, 0, len(tree))]
    count = 0
    waiting = [(0, tree)]  # inode index and content, breadth first: so a directory's children are contiguous
    for index, directory in waiting:
        mode, number, _, children = inodes[index]
        inodes[index] = (mode, number, count, children)
        for name, node in directory.items():
            number = len(inodes) + 1
            encoded = name.encode()
            dirents += struct.pack("<QH", number, len(encoded)) + encoded
            count += 1
            if isinstance(node, dict):
                waiting.append((len(inodes), node))
                inodes.append((DIRECTORY, number, 0, len(node)))
            else:
                assert isinstance(node, bytes)
                inodes.append((FILE, number, 1 + len(blocks) // BLOCK, len(node)))
                blocks += node + bytes(-len(node) % BLOCK)
    structures = bytes(dirents) + b"".join(_INODE.pack(*inode) for inode in inodes)
    structures += bytes(-len(structures) % BLOCK)
    superblock = _SUPERBLOCK.pack(
        MAGIC, VERSION, BLOCK, 1 + len(blocks) // BLOCK, len(structures) // BLOCK, count, 0, len(inodes)
    )
    return superblock + bytes(BLOCK - len(superblock)) + bytes(blocks) + structures


@dataclass(slots=True)
class _Tree:
    file: BinaryIO
    start: int
    dirents: list[tuple[int, str]]
    inodes: list[tuple[int, int, int, int]]
    left: int = field(init=False)  # names that have not been looked at

    def __post_init__(self) -> None:
        self.left = len(self.dirents)

    def children(self, index: int) -> Iterator[tuple[str, int]]:
        mode, _, first, count = self.inodes[index]
        if mode & 0xF000 == DIRECTORY:
            for number, name in self.dirents[first : first + count]:
                yield name, number - 1

    def walk(self, index: int, prefix: str, depth: int = 0) -> Iterator[tuple[str, bytes]]:
        for name, child in self.children(index):
            mode, _, offset, size = self.inodes[child]
            self.left -= 1
            if self.left < 0:
                raise ValueError("more names than there are: a directory is in itself")
            if mode & 0xF000 == FILE and size <= READ_LIMIT_BYTES:
                self.file.seek(self.start + offset * BLOCK)
                yield prefix + name, self.file.read(size)
            elif depth < 8:
                yield from self.walk(child, f"{prefix}{name}/", depth + 1)


def size(head: bytes) -> int:
    """How many bytes the file system that begins so takes, as it says; 0: it is none."""
    if len(head) < _SUPERBLOCK.size:
        return 0
    magic, version, block, first, blocks, *_ = _SUPERBLOCK.unpack_from(head)
    return (first + blocks) * BLOCK if (magic, version, block) == (MAGIC, VERSION, BLOCK) else 0


def read(file: BinaryIO, start: int, directory: str) -> dict[str, bytes]:
    """The files below a top-level directory of the file system that begins `start` bytes into the file.

    Empty if there is no ROFS, or no such directory, or it is damaged: then there is nothing to keep.
    """
    try:
        tree = _structures(file, start)
        if tree is None:
            return {}
        top = dict(tree.children(0))
        found: dict[str, bytes] = {}
        total = 0
        for path, data in tree.walk(top[directory], "") if directory in top else ():
            found[path] = data
            total += len(data)
            if total > TOTAL_LIMIT_BYTES:
                return {}
        return found
    except (struct.error, IndexError, UnicodeDecodeError, ValueError, OverflowError):
        return {}


def _structures(file: BinaryIO, start: int) -> _Tree | None:
    file.seek(start)
    magic, version, block, first, blocks, dirent_count, link_count, inode_count = _SUPERBLOCK.unpack(
        file.read(_SUPERBLOCK.size)
    )
    if (magic, version, block) != (MAGIC, VERSION, BLOCK) or blocks * BLOCK > READ_LIMIT_BYTES:
        return None
    file.seek(start + first * BLOCK)
    data = file.read(blocks * BLOCK)
    at = 0
    dirents = []
    for _ in range(dirent_count):
        number, length = struct.unpack_from("<QH", data, at)
        dirents.append((number, data[at + 10 : at + 10 + length].decode()))
        at += 10 + length
    for _ in range(link_count):
        at += 2 + struct.unpack_from("<H", data, at)[0]
    inodes = [_INODE.unpack_from(data, at + _INODE.size * index) for index in range(inode_count)]
    return _Tree(file, start, dirents, inodes)
