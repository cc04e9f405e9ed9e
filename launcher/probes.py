"""Is a guest ready, is it healthy? Asked from inside the pod's namespace, as a container would.

**Ready** is for the first time: its NIC answers, or a port accepts. **Healthy** is ever after: a check through the
pod's localhost, at an interval; so many failures in a row and the guest is unhealthy. While the guest is starting,
failures do not count, until the first success.
"""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import trio

from . import net
from .health import CheckKind, HealthCheck

READY_POLL_S = 0.05
DISCARD_PORT = 9
CHECK_TIMEOUT_S = 5.0
STARTING_INTERVAL_S = 1.0  # at most, until the guest is healthy for the first time
STATUS_LINE_LIMIT = 4096


# --- readiness ---


async def answers(netns: Path, wanted: set[IPv4Address | IPv6Address]) -> None:
    """Until each address has answered ARP or neighbour discovery; the kernel asks, and tells when it knows."""
    missing = set(wanted)
    with contextlib.ExitStack() as stack:
        events = trio.socket.from_stdlib_socket(stack.enter_context(net.open_neighbour_events(netns)))
        probes = {
            4: stack.enter_context(net.open_socket(netns, socket.AF_INET, socket.SOCK_DGRAM)),
            6: stack.enter_context(net.open_socket(netns, socket.AF_INET6, socket.SOCK_DGRAM)),
        }

        def ask(address: IPv4Address | IPv6Address) -> None:
            with contextlib.suppress(OSError):  # no route (the bridge is down), or an answer to an earlier one
                probes[address.version].sendto(b"", (str(address), DISCARD_PORT))

        for address in missing:
            ask(address)
        while missing:
            for address, answered in net.parse_neighbour_events(await events.recv(1 << 16)):
                if answered:
                    missing.discard(address)
                elif address in missing:
                    ask(address)


async def accepts(netns: Path, address: str, port: int) -> None:
    """Until a TCP connection is accepted. A refusal is no event, so this asks again and again."""
    while True:
        with net.open_socket(netns, socket.AF_INET, socket.SOCK_STREAM) as sock:
            try:
                await trio.socket.from_stdlib_socket(sock).connect((address, port))
            except OSError:
                await trio.sleep(READY_POLL_S)
            else:
                return


# --- health ---


async def check(netns: Path, what: HealthCheck) -> bool:
    """One check, for at most CHECK_TIMEOUT_S."""
    with trio.move_on_after(CHECK_TIMEOUT_S), contextlib.suppress(OSError, trio.BrokenResourceError):
        if what.kind is CheckKind.CMD:
            return await _command_succeeds(netns, what.command)
        with net.open_socket(netns, socket.AF_INET, socket.SOCK_STREAM) as sock:
            stream = trio.socket.from_stdlib_socket(sock)
            await stream.connect(("127.0.0.1", what.port))
            return what.kind is CheckKind.TCP or await _page_is_there(trio.SocketStream(stream), what)
    return False


async def _page_is_there(stream: trio.SocketStream, what: HealthCheck) -> bool:
    await stream.send_all(f"GET {what.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    said = b""
    while b"\n" not in said and len(said) < STATUS_LINE_LIMIT:
        data = await stream.receive_some()
        if not data:
            break
        said += data
    version, _, rest = said.partition(b" ")
    return version.startswith(b"HTTP/1.") and rest[:3].isdigit() and 200 <= int(rest[:3]) < 400


async def _command_succeeds(netns: Path, command: tuple[str, ...]) -> bool:
    done = await trio.run_process(
        ["nsenter", f"--net={netns}", "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode == 0


async def watch_health(
    succeeds: Callable[[], Awaitable[bool]], what: HealthCheck, tell: Callable[[bool], None]
) -> None:
    """Until cancelled. `tell` is told when the guest becomes healthy (True), and when unhealthy (False)."""
    counts_from = trio.current_time() + what.start_s
    healthy: bool | None = None  # not known yet
    failures = 0
    while True:
        if await succeeds():
            failures, counts_from = 0, -math.inf
            if not healthy:
                healthy = True
                tell(True)
        elif trio.current_time() >= counts_from:
            failures += 1
            if failures >= what.retries and healthy is not False:
                healthy = False
                tell(False)
        await trio.sleep(min(what.interval_s, STARTING_INTERVAL_S) if healthy is None else what.interval_s)
