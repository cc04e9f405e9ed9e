"""What a service manager hears: a socket of our own plays it. tests/boot/test_systemd.py has the real one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from launcher import notify, state
from launcher.notify import ServiceManager


def record(**changes: object) -> state.GuestRecord:
    values: dict[str, object] = {
        "name": "web", "pod": "shop", "index": 2, "mac": "", "ipv4": "169.254.77.2", "ipv6": "fd00:77::2", "tap": "",
        "image": "", "family": "linux", "vmm": "qemu", "accel": "tcg", "memory_mib": 128, "cpus": 1,
        "ports": ("80/tcp",), "supervisor_pid": 1, "started_at": 0.0,
    }  # fmt: skip
    return state.GuestRecord(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": "vsock:2:1"}, None),
        ({"NOTIFY_SOCKET": "/run/x"}, ServiceManager("/run/x", None)),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "2000000"}, ServiceManager("\0x", 2.0)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, ServiceManager("/x", None)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"}, ServiceManager("/x", None)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, ServiceManager("/x", None)),
    ],
)
def test_environment(environment: dict[str, str], expected: ServiceManager | None) -> None:
    environment["PATH"] = "/bin"
    assert ServiceManager.take(environment) == expected
    assert environment == {"PATH": "/bin"}, "a child of ours would speak for us"


def test_a_value_cannot_begin_another_line() -> None:
    assert notify.lines(STATUS="one\nREADY=1") == b"STATUS=one READY=1\n"


async def heard(manager: socket.socket) -> dict[str, str]:
    data = await trio.to_thread.run_sync(manager.recv, 4096)
    return dict(line.split("=", 1) for line in data.decode().splitlines())


async def test_what_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        manager = ServiceManager(str(tmp_path / "notify"), None)
        async with notify.telling(manager, ready_timeout_s=60, stop_timeout_s=10) as on_change:
            assert await heard(sock) == {"EXTEND_TIMEOUT_USEC": "60000000", "STATUS": "Launching"}
            on_change(record(status="running"))
            assert await heard(sock) == {"STATUS": "shop/web boots"}
            on_change(record(status="ready"))
            told = await heard(sock)
            assert told == {"READY": "1", "STATUS": "shop/web is ready at 169.254.77.2, fd00:77::2, ports 80/tcp"}
            on_change(record(status="stopping"))
            told = await heard(sock)
            assert told["STOPPING"] == "1"
            assert int(told["EXTEND_TIMEOUT_USEC"]) > 10_000_000


async def test_the_watchdog_is_answered_by_the_loop_and_not_by_anything_else(tmp_path: Path) -> None:
    """While the loop is held up nothing comes; afterwards it does again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        manager = ServiceManager(str(tmp_path / "notify"), 0.2)
        async with notify.telling(manager, ready_timeout_s=60, stop_timeout_s=10):
            assert "STATUS" in await heard(sock)
            assert await heard(sock) == {"WATCHDOG": "1"}
            assert await heard(sock) == {"WATCHDOG": "1"}
            sock.settimeout(0.5)
            with pytest.raises(TimeoutError):  # this blocks the loop
                sock.recv(4096)
            sock.settimeout(10)
            assert await heard(sock) == {"WATCHDOG": "1"}


async def test_a_manager_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    manager = ServiceManager(str(tmp_path / "nobody"), 0.01)
    async with notify.telling(manager, ready_timeout_s=60, stop_timeout_s=10) as on_change:
        for _ in range(500):
            on_change(record(status="ready"))
        await trio.testing.wait_all_tasks_blocked()
    assert not (tmp_path / "nobody").exists()
