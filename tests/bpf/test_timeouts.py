"""What becomes of flows that nobody uses: by the pod's timeouts, not by a clock that somebody watches."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

import router
from router import tables

from .packets import (
    BRIDGE,
    GUEST2,
    LO,
    LOCALHOST,
    MAC2,
    POD,
    REDIRECT,
    RST,
    SYNACK,
    TAP2,
    UDP,
    Hooks,
    guest_row,
    packet,
)

pytestmark = pytest.mark.bpf

HERE = LOCALHOST[4]


@pytest.fixture
def impatient(hooks: Hooks) -> Hooks:
    """A pod that forgets a UDP flow after one second, an idle connection after 1,000 and a closed one after 100."""
    address = {"ipv4": tables.IPv4Address(BRIDGE[4]), "ipv6": tables.IPv6Address(BRIDGE[6])}
    timeouts = router.Timeouts(udp_s=1, tcp_s=1000, tcp_closed_s=100)
    hooks.table.add_pod(POD, router.PodRow(ifindex=5, mac=bytes(6), timeouts=timeouts, **address))
    hooks.table.add_guest(POD, guest_row(2, seen_ipv4=True))
    return hooks


def test_an_idle_udp_flow_is_decided_anew(impatient: Hooks) -> None:
    """So a container that has begun to listen gets the next datagram, but not one of a flow in use."""
    datagram = packet(HERE, 40000, HERE, 53, proto=UDP)
    assert impatient.send(LO, datagram)[0] == REDIRECT
    with impatient.in_thread(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server:
        server.bind((HERE, 53))
        assert impatient.send(LO, datagram)[0] == REDIRECT
        (flow,) = impatient.table.flows(POD)
        time.sleep(1.01 - flow.idle_s)  # it is the clock that is tested
        assert impatient.send(LO, datagram)[0] != REDIRECT


@pytest.mark.parametrize(
    ("frames", "kept_s", "gone_s"),
    [
        ([(LO, packet(HERE, 40000, HERE, 53, proto=UDP))], 0, 2),
        ([(LO, packet(HERE, 40000, HERE, 80))], 99, 101),
        (
            [
                (LO, packet(HERE, 40000, HERE, 80)),
                (TAP2, packet(GUEST2[4], 80, BRIDGE[4], 40000, flags=SYNACK, mac=MAC2)),
            ],
            999,
            1001,
        ),
        (
            [
                (LO, packet(HERE, 40000, HERE, 80)),
                (TAP2, packet(GUEST2[4], 80, BRIDGE[4], 40000, flags=SYNACK, mac=MAC2)),
                (LO, packet(HERE, 40000, HERE, 80, flags=RST)),
            ],
            99,
            101,
        ),
    ],
    ids=["udp", "never answered", "open", "closed"],
)
def test_what_is_too_old_is_forgotten(
    impatient: Hooks, frames: list[Any], kept_s: int, gone_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hook, frame in frames:
        assert impatient.send(hook, frame)[0] == REDIRECT
    now = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now + kept_s * 10**9)
    assert len(impatient.table.flows(POD)) == 1
    monkeypatch.setattr(time, "monotonic_ns", lambda: now + gone_s * 10**9)
    assert impatient.table.flows(POD) == []
    assert list(impatient.table._flow_rows(POD)) == []
