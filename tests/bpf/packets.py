"""Packets by the book, and the program on them through BPF_PROG_TEST_RUN: one in, one out.

namespace ukr-<pid>-packets: lo, and three idle bridges that play the TAPs of guests 2 and 3 and the uplink. The program
is a variant that finds the pod's id in skb->mark, for a test run cannot set skb->tc_classid.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

import router
from router import program, syscall, tables

PASS, DROP, STOLEN, REDIRECT = 0xFFFFFFFF, 2, 4, 7
POD = 77
LO, TAP2, TAP3, UPLINK = 1, 102, 103, 104
SYN, ACK, SYNACK, RST = 0x02, 0x10, 0x12, 0x04
ZERO_MAC = bytes(6)
BRIDGE_MAC, MAC2, MAC3 = (bytes((2, 0, 0, 0, 0x77, n)) for n in (1, 2, 3))
BRIDGE = {4: "169.254.77.1", 6: "fd00:77::1"}
GUEST2 = {4: "169.254.77.2", 6: "fd00:77::2"}
GUEST3 = {4: "169.254.77.3", 6: "fd00:77::3"}
LOCALHOST = {4: "127.0.0.1", 6: "::1"}
TCP, UDP = 6, 17
ICMP = {4: 1, 6: 58}


# --- packets, and checksums by the book (RFC 1071) ---


def sum16(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    return ~sum16(data) & 0xFFFF


def pseudo(source: str, target: str, proto: int, length: int) -> bytes:
    packed = ip_address(source).packed + ip_address(target).packed
    return packed + struct.pack("!II", length, proto)


def eth(payload: bytes, kind: int, source: bytes = ZERO_MAC, target: bytes = ZERO_MAC) -> bytes:
    return target + source + struct.pack("!H", kind) + payload


def ip(source: str, target: str, proto: int, payload: bytes, *, options: bytes = b"", fragment: int = 0x4000) -> bytes:
    if ":" in source:
        return (
            struct.pack("!IHBB", 0x60000000, len(payload), proto, 64)
            + ip_address(source).packed
            + ip_address(target).packed
            + payload
        )
    length = 20 + len(options)
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | length // 4,
        0,
        length + len(payload),
        7,
        fragment,
        64,
        proto,
        0,
        IPv4Address(source).packed,
        IPv4Address(target).packed,
    )
    head += options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def segment(
    source: str,
    sport: int,
    target: str,
    dport: int,
    *,
    proto: int = TCP,
    flags: int = SYN,
    data: bytes = b"",
    bare: bool = False,
) -> bytes:
    """A TCP segment or UDP datagram; `bare`: without a checksum."""
    if proto == TCP:
        head = struct.pack("!HHIIBBHHH", sport, dport, 1, 2, 0x50, flags, 1000, 0, 0)
        at = 16
    else:
        head, at = struct.pack("!HHHH", sport, dport, 8 + len(data), 0), 6
    value = 0 if bare else checksum(pseudo(source, target, proto, len(head + data)) + head + data) or 0xFFFF
    return head[:at] + struct.pack("!H", value) + head[at + 2 :] + data


def packet(
    source: str, sport: int, target: str, dport: int, *, mac: bytes = ZERO_MAC, options: bytes = b"", **rest: Any
) -> bytes:
    family = ip_address(source).version
    payload = segment(source, sport, target, dport, **rest)
    to = BRIDGE_MAC if mac != ZERO_MAC else ZERO_MAC
    kind = 0x0800 if family == 4 else 0x86DD
    return eth(ip(source, target, rest.get("proto", TCP), payload, options=options), kind, mac, to)


@dataclass(frozen=True, kw_only=True)
class Parsed:
    target_mac: bytes
    source_mac: bytes
    proto: int
    source: str
    target: str
    payload: bytes  # of IP

    @property
    def ports(self) -> tuple[int, int]:
        sport, dport = struct.unpack_from("!HH", self.payload)
        return sport, dport


def parse(frame: bytes) -> Parsed:
    """Asserts every checksum on the way."""
    (kind,) = struct.unpack_from("!H", frame, 12)
    data = frame[14:]
    if kind == 0x0800:
        length = (data[0] & 15) * 4
        assert checksum(data[:length]) == 0, "IPv4 header checksum"
        source, target = (str(IPv4Address(data[at : at + 4])) for at in (12, 16))
        proto, payload = data[9], data[length : struct.unpack_from("!H", data, 2)[0]]
    else:
        assert kind == 0x86DD
        source, target = (str(IPv6Address(data[at : at + 16])) for at in (8, 24))
        proto, payload = data[6], data[40 : 40 + struct.unpack_from("!H", data, 4)[0]]
    if proto in (TCP, UDP, 58):
        if proto != UDP or payload[6:8] != b"\0\0":
            assert sum16(pseudo(source, target, proto, len(payload)) + payload) == 0xFFFF, f"checksum of {proto}"
    elif proto == 1:
        assert checksum(payload) == 0, "ICMP checksum"
    return Parsed(
        target_mac=frame[:6], source_mac=frame[6:12], proto=proto, source=source, target=target, payload=payload
    )


def parse_headers(frame: bytes) -> tuple[str, str, int, int, tuple[int, int]]:
    """(source, target, protocol, length of all, ports): of a packet that may be cut off after its ports."""
    data = frame[14:]
    if data[0] >> 4 == 4:
        source, target = (str(IPv4Address(data[at : at + 4])) for at in (12, 16))
        assert checksum(data[:20]) == 0, "IPv4 header checksum"
        proto, length, at = data[9], struct.unpack_from("!H", data, 2)[0], (data[0] & 15) * 4
    else:
        source, target = (str(IPv6Address(data[at : at + 16])) for at in (8, 24))
        proto, length, at = data[6], struct.unpack_from("!H", data, 4)[0] + 40, 40
    sport, dport = struct.unpack_from("!HH", data, at)
    return source, target, proto, length, (sport, dport)


# --- the program ---


@contextlib.contextmanager
def mounted_bpffs(path: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "bpf", "bpf", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@dataclass(kw_only=True)
class Hooks:
    table: router.Router
    netns: str
    thread: ThreadPoolExecutor = field(repr=False)

    def send(self, ifindex: int, frame: bytes) -> tuple[int, bytes]:
        """Verdict, and the frame as the program left it."""
        # struct __sk_buff: mark at 8, ifindex at 40
        context = struct.pack("8xI28xI148x", POD, ifindex)
        return self.thread.submit(syscall.run_once, self.table.program_fd, frame, context).result()

    def dropped(self) -> set[str]:
        return {reason.name for reason in self.table.counters(POD)} - {"REDIRECTED", "PASSED"}

    def in_thread(self, function: Callable[[], Any]) -> Any:
        return self.thread.submit(function).result()


@contextlib.contextmanager
def loaded_variant(bpffs: Path) -> Iterator[tuple[router.Router, str]]:
    directory = bpffs / "packets"
    netns = f"ukr-{os.getpid()}-packets"

    def ip_command(*words: str) -> None:
        assert os.spawnvp(os.P_WAIT, "ip", ["ip", *words]) == 0

    program.load(directory, ["POD_ID_IN_MARK"])
    ip_command("netns", "add", netns)
    try:
        ip_command("-n", netns, "link", "set", "lo", "up")
        for index in (TAP2, TAP3, UPLINK):
            ip_command("-n", netns, "link", "add", f"tap{index}", "index", str(index), "type", "bridge")
        with tables.Router(program.open_directory(directory)) as table:
            yield table, netns
    finally:
        ip_command("netns", "del", netns)
        program.remove(directory)


def _enter(netns: str) -> None:
    import ctypes

    fd = os.open(f"/run/netns/{netns}", os.O_RDONLY)
    try:
        assert ctypes.CDLL(None).setns(fd, 0x40000000) == 0
    finally:
        os.close(fd)


@contextlib.contextmanager
def thread_in(netns: str) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, initializer=_enter, initargs=(netns,)) as pool:
        yield pool


def guest_row(index: int, **rest: Any) -> router.GuestRow:
    return router.GuestRow(
        index=index,
        ifindex=100 + index,
        mac=bytes((2, 0, 0, 0, 0x77, index)),
        ipv4=IPv4Address(f"169.254.77.{index}"),
        ipv6=IPv6Address(f"fd00:77::{index:x}"),
        **rest,
    )


both_families = pytest.mark.parametrize("family", [4, 6])
both_protocols = pytest.mark.parametrize("proto", [TCP, UDP])
