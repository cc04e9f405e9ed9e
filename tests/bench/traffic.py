"""Traffic between two namespaces, measured at its ends: iperf3 for throughput, a ping-pong of one byte for latency.

Both ends run on one core. Left alone, the scheduler puts them there most of the time, and the times when it does not
(6 µs become 44 in a virtual machine, for the wake-up is an interrupt to the other core) are the noise that hides the
differences we look for: measured, the spread of the median falls from 118 % to 1.2 %. It is the hardest case for
whatever spends CPU time on a packet.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WARM_UP = 500
PING_PONGS = 20_000

_SERVER = """
import socket, sys
address, port = sys.argv[1], int(sys.argv[2])
with socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, receive, send = bytearray(1), connection.recv_into, connection.send
    while receive(data):
        send(data)
"""
_CLIENT = """
import gc, json, socket, sys, time
address, port, warm_up, count = sys.argv[1], *map(int, sys.argv[2:5])
with socket.create_connection((address, port), 5) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(None)
    data, receive, send, now = bytearray(1), connection.recv_into, connection.send, time.perf_counter_ns
    times = [0] * (warm_up + count + 1)
    gc.disable()
    times[0] = now()
    for i in range(1, len(times)):
        send(data)
        if not receive(data):
            sys.exit("the connection ended")
        times[i] = now()
took = sorted(b - a for a, b in zip(times[warm_up:], times[warm_up + 1:]))
print(json.dumps([took[len(took) // 2] / 1000, took[len(took) * 99 // 100] / 1000]))
"""


class Unmeasurable(Exception):
    """Something could not be measured; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From a client to a server: their namespaces, what the server binds, what the client dials."""

    client: Path
    server: Path
    bind: str
    dial: str
    port: int
    listen_port: int | None = None  # the server's, where a proxy holds `port`


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """This thread, and all that it starts, on the last core: the first is where devices interrupt."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def inside(netns: Path, *command: str) -> list[str]:
    return ["nsenter", f"--net={netns}", *command]


@contextlib.contextmanager
def serving(command: list[str], says: str) -> Iterator[None]:
    """A server for the length of a block, which begins when the server has said that it listens."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        heard = ""
        for line in process.stdout:
            heard = line
            if says in line:
                break
        else:
            raise Unmeasurable(f"{' '.join(command[2:4])} does not start: {heard.strip()}")
        yield
    finally:
        process.terminate()
        process.communicate()


def _client(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise Unmeasurable(f"{command[2]} got no answer within {timeout_s:g} s") from None


def throughput_gbps(way: Way, seconds: float) -> float:
    port = str(way.listen_port or way.port)
    server = inside(way.server, "iperf3", "--server", "--one-off", "--forceflush", "--bind", way.bind, "--port", port)
    with serving(server, "listening"):
        client = ["iperf3", "--client", way.dial, "--port", str(way.port), "--time", str(seconds), "--json"]
        result = json.loads(_client(inside(way.client, *client), seconds + 15).stdout or "{}")
    if "error" in result or "end" not in result:
        raise Unmeasurable(f"iperf3: {result.get('error', 'no result')}")
    return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9


def latency_us(way: Way) -> tuple[float, float]:
    """(p50, p99) of one byte there and back, what Python needs at both ends included."""
    server = inside(way.server, sys.executable, "-c", _SERVER, way.bind, str(way.listen_port or way.port))
    with serving(server, "ready"):
        words = (way.dial, str(way.port), str(WARM_UP), str(PING_PONGS))
        done = _client(inside(way.client, sys.executable, "-c", _CLIENT, *words), 30)
    if done.returncode != 0:
        why = done.stderr.strip().splitlines()
        raise Unmeasurable(f"ping-pong: {why[-1] if why else done.returncode}")
    p50, p99 = json.loads(done.stdout)
    return p50, p99
