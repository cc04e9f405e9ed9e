"""What happens to TCP connections whose other end, a guest, is gone: they end at once, not when a timer runs out.

Whoever is left is sent a segment that does not fit the connection. It answers with an acknowledgement of what it
expects (RFC 9293, 3.10.7.4: an unacceptable segment is acknowledged), that acknowledgement meets no flow any more and
reaches the pod's own stack, and the stack knows no such connection and resets it, with the very sequence number that
the receiver wants (RFC 5961). So nobody here needs to know sequence numbers, and a container is reset as a guest is.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from router import Severed

from . import net

ACK = 0x10
_CHECKSUM_OFFSET = 16
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def reset(netns: Path, severed: Iterable[Severed]) -> None:
    """Reset the ends that are left. Best effort, as all of TCP's resets are: a pod that is going away needs none."""
    by_peer: dict[tuple[int, str], list[Severed]] = {}
    for end in severed:
        by_peer.setdefault((end.address.version, str(end.peer_address)), []).append(end)
    for (version, source), ends in by_peer.items():
        make = partial(socket.socket, _FAMILIES[version], socket.SOCK_RAW, socket.IPPROTO_TCP)
        with contextlib.suppress(OSError), net.in_netns(netns, make) as sock:
            if version == 6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_CHECKSUM, _CHECKSUM_OFFSET)
            sock.bind((source, 0))
            for end in ends:
                with contextlib.suppress(OSError):
                    sock.sendto(_segment(end), (str(end.address), 0))


def _segment(end: Severed) -> bytes:
    """A bare ACK with numbers out of the air; for IPv6 the kernel fills in the checksum (RFC 3542, 3.1)."""
    fields = (end.peer_port, end.port, secrets.randbits(32), secrets.randbits(32), 5 << 4, ACK, 0, 0, 0)
    header = struct.pack("!HHIIBBHHH", *fields)
    if end.address.version == 6:
        return header
    covered = (
        end.peer_address.packed + end.address.packed + struct.pack("!HH", socket.IPPROTO_TCP, len(header)) + header
    )
    total = sum(struct.unpack(f"!{len(covered) // 2}H", covered))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:_CHECKSUM_OFFSET] + struct.pack("!H", ~total & 0xFFFF) + header[_CHECKSUM_OFFSET + 2 :]
