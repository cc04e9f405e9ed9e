"""A full flow table: a guest that opens flows without end evicts its own and the pod's idle ones, nothing else."""

from __future__ import annotations

import struct

import pytest

from router import syscall, tables

from .packets import (
    ACK,
    BRIDGE,
    GUEST2,
    LO,
    LOCALHOST,
    MAC2,
    POD,
    REDIRECT,
    SYNACK,
    TAP2,
    UDP,
    Hooks,
    both_families,
    packet,
    parse,
)

pytestmark = pytest.mark.bpf


def flood(hooks: Hooks, flows: int, every: int, keep_alive: tuple[tuple[int, bytes], ...]) -> int:
    """Datagrams by as many flows, the packets in between; returns how many of those were redirected."""
    context = struct.pack("8xI28xI148x", POD, TAP2)
    fd = hooks.table.program_fd
    frames = [packet(GUEST2[4], 1024, BRIDGE[4], 1024, proto=UDP, mac=MAC2, bare=True)]

    def run() -> int:
        alive = 0
        for number in range(flows):
            frame = bytearray(frames[0])
            struct.pack_into("!HH", frame, 34, 1024 + number % 50_000, 1024 + number // 50_000)
            syscall.run_once(fd, bytes(frame), context)
            if number % every == 0:
                for hook, kept in keep_alive:
                    verdict, _ = syscall.run_once(fd, kept, struct.pack("8xI28xI148x", POD, hook))
                    alive += verdict == REDIRECT
        return alive

    return int(hooks.in_thread(run))


@both_families
def test_a_flow_in_use_survives_a_flood(hooks: Hooks, family: int) -> None:
    here, guest, bridge = LOCALHOST[family], GUEST2[family], BRIDGE[family]
    hooks.send(LO, packet(here, 40000, here, 80))
    hooks.send(TAP2, packet(guest, 80, bridge, 40000, flags=SYNACK, mac=MAC2))
    there = (LO, packet(here, 40000, here, 80, flags=ACK, data=b"x"))
    back = (TAP2, packet(guest, 80, bridge, 40000, flags=ACK, mac=MAC2, data=b"x"))
    flows = 2 * tables.FLOWS_PER_POD
    assert flood(hooks, flows, 1000, (there, back)) == 2 * -(-flows // 1000)
    verdict, frame = hooks.send(*back)
    assert (verdict, parse(frame).target) == (REDIRECT, here)
    assert sum(1 for _ in hooks.table._flow_rows(POD)) <= tables.FLOWS_PER_POD


def test_traffic_in_one_direction_keeps_the_way_back(hooks: Hooks) -> None:
    """A sender of datagrams that hears nothing for long, and then does."""
    hooks.send(LO, packet("127.0.0.1", 40000, "127.0.0.1", 514, proto=UDP))
    there = (LO, packet("127.0.0.1", 40000, "127.0.0.1", 514, proto=UDP, data=b"log"))
    flood(hooks, 2 * tables.FLOWS_PER_POD, 1000, (there,))
    verdict, frame = hooks.send(TAP2, packet(GUEST2[4], 514, BRIDGE[4], 40000, proto=UDP, mac=MAC2))
    assert (verdict, parse(frame).target) == (REDIRECT, "127.0.0.1")
