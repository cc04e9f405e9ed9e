"""`python -m tests.fuzz`: what a hostile guest may send, by the million, through the program as the kernel runs it.

    --frames N    10 million unless told; the suite runs one million
    --seed S      the same frames again

Frames are random, or made of good and bad ones by flipping, setting, cutting, lengthening and splicing; the pod changes
as they go by: guests that speak one IP version or both, declared ports, containers that listen, an uplink. After each
frame: it passed unchanged, was dropped, or goes along a flow with addresses and MACs of this pod and, if its checksums
were right when it came, right ones. After all: every frame has been counted once, another pod has not noticed, and the
kernel has not complained.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import router
from router import syscall

from .bpf import packets
from .bpf.packets import BRIDGE, DROP, GUEST2, GUEST3, LO, LOCALHOST, PASS, POD, REDIRECT, STOLEN, TAP2, TAP3, UPLINK

OUTSIDE = {4: "192.0.2.9", 6: "2001:db8::9"}
PODS_OWN = {4: "192.0.2.2", 6: "2001:db8::2"}
NEIGHBOUR = POD + 1
PORTS = (0, 22, 53, 80, 8080, 40000, 61000, 65535)
TURN = 20_000  # frames between two changes of the pod
KERNEL_COMPLAINTS = ("WARNING:", "BUG:", "Oops", "KASAN", "general protection")


class Surprise(AssertionError):
    """What must not happen; the message has the frame."""


@dataclass(slots=True)
class Fuzzer:
    """Feeds one pod; to be used in a thread inside the namespace of the played devices."""

    table: router.Router
    random: random.Random
    corpus: list[bytes] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    sockets: list[socket.socket] = field(default_factory=list)

    def run(self, frames: int) -> None:
        self.corpus = list(corpus())
        for number in range(frames):
            if number % TURN == 0:
                self._change_pod()
            self._one(self._frame(), self.random.choice((TAP2, TAP2, TAP2, TAP3, LO, UPLINK)))

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()

    def _change_pod(self) -> None:

        rng = self.random
        self.close()
        self.sockets = [sock for _ in range(4) if (sock := self._listen()) is not None]
        self.table.remove_pod(POD)
        add_pod(self.table, POD)
        for index in rng.sample((2, 3), k=rng.choice((1, 2))):
            ports = tuple({(rng.choice(("tcp", "udp")), rng.choice(PORTS[1:]))}) if index == 2 else ()
            seen = {"seen_ipv4": rng.random() < 0.8, "seen_ipv6": rng.random() < 0.8}
            row = packets.guest_row(index, ports=ports, mtu=rng.choice((1280, 1500, 9000)), **seen)
            self.table.add_guest(POD, row)
        if rng.random() < 0.5:
            self.table.set_uplink(
                POD, router.UplinkRow(ifindex=UPLINK, ipv4=IPv4Address(PODS_OWN[4]), ipv6=IPv6Address(PODS_OWN[6]))
            )

    def _listen(self) -> socket.socket | None:
        family = self.random.choice((socket.AF_INET, socket.AF_INET6))
        kind = self.random.choice((socket.SOCK_STREAM, socket.SOCK_DGRAM))
        sock = socket.socket(family, kind)
        loopback = LOCALHOST[4 if family == socket.AF_INET else 6]
        try:
            sock.bind((self.random.choice((loopback, "")), self.random.choice(PORTS[1:])))
            if kind == socket.SOCK_STREAM:
                sock.listen()
        except OSError:
            sock.close()
            return None
        return sock

    def _frame(self) -> bytes:
        rng = self.random
        if rng.random() < 0.02:
            return rng.randbytes(rng.randint(14, 300))
        frame = bytearray(rng.choice(self.corpus))
        for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
            at = rng.randrange(min(len(frame), 120))
            match rng.randrange(6):
                case 0:
                    frame[at] ^= 1 << rng.randrange(8)
                case 1:
                    frame[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
                case 2:
                    del frame[max(14, at) :]
                case 3:
                    frame += rng.randbytes(rng.randrange(64))
                case 4:
                    other = rng.choice(self.corpus)
                    frame[at:] = other[at:]
                case _ if at + 4 <= len(frame):
                    frame[at : at + 4] = rng.randbytes(4)
        return bytes(frame.ljust(14, b"\0"))

    def _one(self, frame: bytes, hook: int) -> None:
        # struct __sk_buff: mark at 8, ifindex at 40
        context = struct.pack("8xI28xI148x", POD, hook)
        try:
            verdict, out = syscall.run_once(self.table.program_fd, frame, context)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            self.verdicts["not run"] += 1  # a test run wants a whole IP header behind its EtherType
            return
        if verdict == PASS:
            self.verdicts["passed"] += 1
            if out != frame:
                raise Surprise(f"passed, but changed: {frame.hex()} became {out.hex()}")
        elif verdict == REDIRECT:
            self.verdicts["redirected"] += 1
            check_redirected(frame, out, hook)
        elif verdict == DROP:
            self.verdicts["dropped"] += 1
        elif verdict == STOLEN:
            self.verdicts["asked"] += 1
        else:
            raise Surprise(f"verdict {verdict} for {frame.hex()}")


def check_redirected(frame: bytes, out: bytes, hook: int) -> None:
    version = out[14] >> 4
    if struct.unpack_from("!H", out, 12)[0] != {4: 0x0800, 6: 0x86DD}.get(version):
        raise Surprise(f"redirected with a wrong EtherType: {frame.hex()} became {out.hex()}")
    found = (out[26:30], out[30:34]) if version == 4 else (out[22:38], out[38:54])
    names = (LOCALHOST, BRIDGE, GUEST2, GUEST3, PODS_OWN)
    ours = {ip_address(name[version]).packed for name in names}
    outside = found[0] not in ours or found[1] not in ours
    if outside and hook not in (UPLINK, TAP2, TAP3):
        raise Surprise(f"redirected to or from a stranger: {frame.hex()} became {out.hex()}")
    if is_sound(frame) and not is_sound(out):
        raise Surprise(f"checksums were right and are wrong: {frame.hex()} became {out.hex()}")


def is_sound(frame: bytes) -> bool:
    """Lengths and checksums are those of an unfragmented packet of the kinds that are redirected."""
    try:
        packets.parse(frame)
    except (AssertionError, struct.error, ValueError, IndexError):
        return False
    return not is_fragment(frame)


def is_fragment(frame: bytes) -> bool:
    if frame[14] >> 4 == 6:
        return frame[20] == 44
    return bool(struct.unpack_from("!H", frame, 20)[0] & 0x3FFF)


def corpus() -> Iterator[bytes]:
    """Good frames of every kind, from every hook, and the bad ones of the unit tests."""
    from .bpf import test_packets, test_translation

    yield from test_packets.SEEDS
    for family in (4, 6):
        ends = ((GUEST2, BRIDGE), (GUEST3, BRIDGE), (LOCALHOST, LOCALHOST), (OUTSIDE, PODS_OWN), (GUEST2, OUTSIDE))
        for source, target in ends:
            mac = {id(GUEST2): packets.MAC2, id(GUEST3): packets.MAC3}.get(id(source), packets.ZERO_MAC)
            for proto in (packets.TCP, packets.UDP):
                for flags in (packets.SYN, packets.SYNACK, packets.ACK, packets.RST):
                    for port in PORTS:
                        rest = {"proto": proto, "flags": flags, "mac": mac, "data": b"data"}
                        yield packets.packet(source[family], 40000, target[family], port, **rest)
                        yield packets.packet(source[family], port, target[family], 40000, **rest)
            datagram = packets.segment(source[family], 40000, target[family], 53, proto=packets.UDP, data=bytes(1200))
            yield from test_translation.in_fragments(source[family], target[family], packets.UDP, datagram, 7)
            about = packets.packet(target[family], 53, source[family], 40000, proto=packets.UDP, data=b"query")
            for what in ((3, 3), (3, 4), (11, 0), (1, 4), (2, 0), (4, 1)):
                yield test_translation.error_about(about, what)


def add_pod(table: router.Router, pod_id: int) -> None:
    row = router.PodRow(ifindex=5, mac=packets.BRIDGE_MAC, ipv4=IPv4Address(BRIDGE[4]), ipv6=IPv6Address(BRIDGE[6]))
    table.add_pod(pod_id, row)


@contextlib.contextmanager
def kernel_complaints() -> Iterator[list[str]]:
    """What the kernel says during the block that it would say of a bug of its own."""
    heard: list[str] = []
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(fd, 0, os.SEEK_END)
        yield heard
        with contextlib.suppress(BlockingIOError):
            while line := os.read(fd, 8192).decode(errors="replace"):
                if any(word in line for word in KERNEL_COMPLAINTS):
                    heard.append(line.strip())
    finally:
        os.close(fd)


def fuzz(table: router.Router, frames: int, seed: int) -> Counter[str]:
    """Raises Surprise. To be called in a thread inside the namespace of the played devices."""
    add_pod(table, NEIGHBOUR)
    table.add_guest(NEIGHBOUR, packets.guest_row(2, seen_ipv4=True, seen_ipv6=True))
    fuzzer = Fuzzer(table=table, random=random.Random(seed))
    try:
        with kernel_complaints() as complaints:
            fuzzer.run(frames)
        if complaints:
            raise Surprise("the kernel complains:\n" + "\n".join(complaints))
        if sum(table.counters(NEIGHBOUR).values()) or table.flows(NEIGHBOUR) or table.ports(NEIGHBOUR):
            raise Surprise("another pod has noticed")
    finally:
        fuzzer.close()
        table.remove_pod(POD)
        table.remove_pod(NEIGHBOUR)
    return fuzzer.verdicts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    args = parser.parse_args()
    print(f"{args.frames:,} frames, seed {args.seed}", flush=True)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(packets.mounted_bpffs(directory))
        table, netns = stack.enter_context(packets.loaded_variant(directory))
        thread = stack.enter_context(packets.thread_in(netns))
        try:
            verdicts = thread.submit(fuzz, table, args.frames, args.seed).result()
        except Surprise as exc:
            sys.exit(f"seed {args.seed}: {exc}")
    print(", ".join(f"{count:,} {name}" for name, count in verdicts.most_common()))
    print(f"no surprise in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
