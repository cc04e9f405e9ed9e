"""Traffic between two namespaces, measured at its ends: iperf3 for throughput, a ping-pong of one byte for latency."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PING_PONGS = 8000

_SERVER = """
import socket, sys
address, port = sys.argv[1], int(sys.argv[2])
with socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := connection.recv(1):
        connection.send(data)
"""
_CLIENT = """
import json, socket, sys, time
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with socket.create_connection((address, port), 5) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    took = []
    for _ in range(count):
        began = time.perf_counter_ns()
        connection.send(b"x")
        connection.recv(1)
        took.append(time.perf_counter_ns() - began)
took.sort()
print(json.dumps([took[len(took) // 2] / 1000, took[len(took) * 99 // 100] / 1000]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From a client to a server: their namespaces, what the server binds, what the client dials."""

    client: Path
    server: Path
    bind: str
    dial: str
    port: int
    listen_port: int | None = None  # the server's, where a proxy holds `port`


def inside(netns: Path, *command: str) -> list[str]:
    return ["nsenter", f"--net={netns}", *command]


@contextlib.contextmanager
def _serving(command: list[str], says: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if says in line:
                break
        else:
            raise RuntimeError(f"{command} did not start")
        yield
    finally:
        process.terminate()
        process.communicate()


def throughput_gbps(way: Way, seconds: int) -> float:
    port = str(way.listen_port or way.port)
    server = inside(way.server, "iperf3", "--server", "--one-off", "--forceflush", "--bind", way.bind, "--port", port)
    with _serving(server, "listening"):
        client = inside(
            way.client, "iperf3", "--client", way.dial, "--port", str(way.port), "--time", str(seconds), "--json"
        )
        done = subprocess.run(client, capture_output=True, text=True, timeout=seconds + 20, check=False)
        result = json.loads(done.stdout)
        if "error" in result:
            raise RuntimeError(f"iperf3: {result['error']}")
        return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9


def latency_us(way: Way) -> tuple[float, float]:
    """(p50, p99) of one byte there and back."""
    server = inside(way.server, sys.executable, "-c", _SERVER, way.bind, str(way.listen_port or way.port))
    with _serving(server, "ready"):
        client = inside(way.client, sys.executable, "-c", _CLIENT, way.dial, str(way.port), str(PING_PONGS))
        done = subprocess.run(client, capture_output=True, text=True, timeout=60, check=True)
        p50, p99 = json.loads(done.stdout)
        return p50, p99


def summary(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
