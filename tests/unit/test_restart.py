"""Restart policies and health checks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import trio
import trio.testing

from launcher import probes
from launcher.errors import UsageError
from launcher.health import HealthCheck
from launcher.restart import LONGEST_DELAY_S, PROVEN_S, RestartPolicy, Restarts

HERE = Path("/proc/self/ns/net")


@pytest.mark.parametrize("text", ["no", "on-failure", "on-failure:5", "always"])
def test_policies_come_back_as_they_were_written(text: str) -> None:
    assert str(RestartPolicy.parse(text)) == text


@pytest.mark.parametrize("text", ["", "never", "always:3", "no:1", "on-failure:", "on-failure:0", "on-failure:x"])
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(UsageError, match="restart policy"):
        RestartPolicy.parse(text)


@pytest.mark.parametrize(
    ("policy", "exit_code", "again"),
    [("no", 1, False), ("on-failure", 0, False), ("on-failure", 1, True), ("always", 0, True), ("always", 1, True)],
)
def test_when_a_guest_is_started_again(policy: str, exit_code: int, again: bool) -> None:
    assert (Restarts(RestartPolicy.parse(policy)).delay_s(exit_code, 0) is not None) is again


def test_the_wait_doubles_up_to_its_cap_and_starts_over_with_a_guest_that_ran() -> None:
    restarts = Restarts(RestartPolicy.parse("always"))
    assert [restarts.delay_s(1, 0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    restarts.in_a_row = 10**9  # years of it
    assert restarts.delay_s(1, PROVEN_S - 0.1) == LONGEST_DELAY_S
    assert restarts.delay_s(1, PROVEN_S) == 0.5


def test_a_limit_is_of_failures_in_a_row() -> None:
    restarts = Restarts(RestartPolicy.parse("on-failure:2"))
    assert [restarts.delay_s(1, 0) for _ in range(3)] == [0.5, 1, None]
    assert [restarts.delay_s(1, PROVEN_S), restarts.delay_s(1, 0), restarts.delay_s(1, 0)] == [0.5, 1, None]


@pytest.mark.parametrize(
    "text", ["", "tcp", "tcp:", "tcp:0", "tcp:80/x", "udp:53", "http:x/", "http:80/a b", "cmd:", "cmd: ", "cmd:'x"]
)
def test_what_is_no_health_check(text: str) -> None:
    with pytest.raises(UsageError):
        HealthCheck.parse(text)


async def health(answers: str, *, start_s: float, seconds: float) -> list[tuple[float, bool]]:
    """(when, healthy) of what is told; `answers`: of one check after the other, the last for ever."""
    said = itertools.chain(answers, itertools.repeat(answers[-1]))
    told: list[tuple[float, bool]] = []
    began = trio.current_time()

    async def succeeds() -> bool:
        await trio.lowlevel.checkpoint()
        return next(said) == "y"

    what = HealthCheck.parse("tcp:1", interval_s=5, retries=3, start_s=start_s)
    with trio.move_on_after(seconds):
        await probes.watch_health(
            succeeds, what, lambda healthy: told.append((round(trio.current_time() - began, 3), healthy))
        )
    return told


@pytest.mark.parametrize(
    ("answers", "start_s", "told"),
    [
        ("y", 0, [(0, True)]),
        ("nny", 0, [(2, True)]),  # asked every second until it is healthy
        ("ynnynnn", 0, [(0, True), (30, False)]),  # three in a row
        ("n", 10, [(12, False)]),  # none counts in the first ten seconds: 10, 11, 12
        ("nnnnny", 10, [(5, True)]),
        ("nnynnn", 60, [(2, True), (17, False)]),  # a success ends the start
        ("nnny", 0, [(2, False), (7, True)]),  # it may recover
    ],
)
async def test_health(
    answers: str, start_s: float, told: list[tuple[float, bool]], autojump_clock: trio.testing.MockClock
) -> None:
    assert await health(answers, start_s=start_s, seconds=100) == told


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 301\r\n", True),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", False),
        (b"HTTP/1.1 503 x\r\n", False),
        (b"SSH-2.0-OpenSSH\r\n", False),
        (b"HTTP/1.1 \xb2\xb2\xb2\r\n", False),
        (b"", False),
    ],
)
async def test_checks_over_the_network(answer: bytes, good: bool) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        with trio.move_on_after(1):
            while b"\r\n\r\n" not in await stream.receive_some():
                pass
        await stream.send_all(answer)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        assert await probes.check(HERE, HealthCheck.parse(f"http:{port}/x")) is good
        nursery.cancel_scope.cancel()
    assert not await probes.check(HERE, HealthCheck.parse(f"tcp:{port}"))  # nobody is there any more


@pytest.mark.parametrize(("command", "good"), [("true", True), ("false", False), ("/no/such", False)])
async def test_checks_by_a_command(command: str, good: bool) -> None:
    assert await probes.check(HERE, HealthCheck.parse(f"cmd:{command}")) is good


async def test_a_check_that_hangs_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "CHECK_TIMEOUT_S", 0.2)
    assert not await probes.check(HERE, HealthCheck.parse("cmd:sleep 1000"))
