"""What `uklaunch run` tells the service manager that started it, and its watchdog: sd_notify(3).

The protocol is one datagram of NAME=VALUE lines to the socket that NOTIFY_SOCKET names, and is promised to stay; so
no binding to libsystemd is needed. Imported only when NOTIFY_SOCKET is set.

Sources: sd_notify(3), with its note on implementations of one's own; sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from .state import GuestRecord

STOP_MARGIN_S = 15.0  # from the power button's time-out to the last of the clean-up


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """Where to tell, and how often it wants to hear that we are alive (None: never)."""

    address: str
    watchdog_s: float | None

    @classmethod
    def take(cls, environ: MutableMapping[str, str] = os.environ) -> ServiceManager | None:
        """What the environment says, taken out of it: it is said to us, and to no child of ours."""
        address = environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = environ.pop("WATCHDOG_USEC", "")
        watchdog_pid = environ.pop("WATCHDOG_PID", str(os.getpid()))
        if not address.startswith(("/", "@")):
            return None
        mine = watchdog_us.isdecimal() and int(watchdog_us) > 0 and watchdog_pid == str(os.getpid())
        return cls(
            address.replace("@", "\0", 1) if address[0] == "@" else address, int(watchdog_us) / 1e6 if mine else None
        )

    def environ(self) -> dict[str, str]:
        """For who becomes this process, what `take` took."""
        environ = {"NOTIFY_SOCKET": self.address.replace("\0", "@", 1)}
        if self.watchdog_s is not None:
            environ |= {"WATCHDOG_USEC": str(microseconds(self.watchdog_s)), "WATCHDOG_PID": str(os.getpid())}
        return environ

    def tell_now(self, **assignments: object) -> None:
        """As the last thing that this process does; see also `telling`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.sendto(lines(**assignments), self.address)


def lines(**assignments: object) -> bytes:
    """One datagram. A line ends where the value does: what a guest said cannot begin another."""
    return "".join(f"{name}={' '.join(str(value).split())}\n" for name, value in assignments.items()).encode()


def microseconds(seconds: float) -> int:
    return int(seconds * 1e6)


def about(record: GuestRecord, stop_timeout_s: float) -> bytes:
    """What there is to tell of a guest whose record has changed."""
    guest = f"{record.pod}/{record.name}"
    match record.status:
        case "ready":
            ports = f", ports {' '.join(record.ports)}" if record.ports else ""
            health = f" ({record.health})" if record.health else ""
            return lines(READY=1, STATUS=f"{guest} is ready{health} at {record.ipv4}, {record.ipv6}{ports}")
        case "stopping":
            # systemd's patience is not to end before ours.
            extend = microseconds(stop_timeout_s + STOP_MARGIN_S)
            return lines(STOPPING=1, EXTEND_TIMEOUT_USEC=extend, STATUS=f"{guest} is powering down")
        case "exited":
            return lines(STATUS=f"{guest} has ended: {record.reason} ({record.exit_code})")
        case "running":
            return lines(STATUS=f"{guest} boots")
    return lines(STATUS=f"{guest}: {record.status}")


@contextlib.asynccontextmanager
async def telling(
    manager: ServiceManager, *, ready_timeout_s: float, stop_timeout_s: float
) -> AsyncIterator[Callable[[GuestRecord], None]]:
    """For the length of a block, answer the watchdog; yields what is to be called with the guest's changed record.

    It neither blocks nor fails: a service manager that does not listen is no reason for a guest to end.
    """
    with contextlib.ExitStack() as stack:
        sock = trio.socket.from_stdlib_socket(
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
        )
        to_tell, told = trio.open_memory_channel[bytes](100)

        def tell(message: bytes) -> None:
            with contextlib.suppress(trio.WouldBlock):
                to_tell.send_nowait(message)

        async def send_all() -> None:
            async for message in told:
                with contextlib.suppress(OSError):
                    await sock.sendto(message, manager.address)

        async def answer_watchdog(every_s: float) -> None:
            while True:
                tell(lines(WATCHDOG=1))
                await trio.sleep(every_s)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            tell(lines(EXTEND_TIMEOUT_USEC=microseconds(ready_timeout_s), STATUS="Launching"))
            if manager.watchdog_s is not None:
                nursery.start_soon(answer_watchdog, manager.watchdog_s / 2)
            yield lambda record: tell(about(record, stop_timeout_s))
            nursery.cancel_scope.cancel()
