"""Traffic between two namespaces, measured at its ends: iperf3 for throughput, small Python programs for latency,
connections and datagrams, where Python's part is small (of a connection 15 %) and the same for every alternative.

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
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WARM_UP = 500
PING_PONGS = 20_000
CONNECTIONS = 20_000  # at most, and a second: fewer than a client has ports, so that none comes twice
OPENING_PORTS, OPENING_REPEATS = 8, 200  # few: what they leave in the flow table must not push others out
DATAGRAM_WINDOW = 64
DATAGRAM_BYTES = 16

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

# Connections: opened, closed by the server, closed by the client, one after the other.
_ACCEPTING = """
import socket, sys
address, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
with socket.create_server((address, port), family=family, backlog=1024) as server:
    print("ready", flush=True)
    while True:
        server.accept()[0].close()
"""
_CONNECTING = """
import gc, socket, sys, time
address, count = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
def connect():
    with socket.socket(family) as connection:
        connection.settimeout(5)
        connection.connect(address)
        connection.recv(1)
for _ in range(100):
    connect()
gc.disable()
began, done, now = time.perf_counter(), 0, time.perf_counter
while done < count and now() - began < 1:
    connect()
    done += 1
print(done / (now() - began))
"""

# Datagrams: WINDOW of them, then the receiver says that it has them all. So none is lost, and those that arrive count.
_RECEIVER = """
import socket, sys
address, port, window, size = sys.argv[1], *map(int, sys.argv[2:5])
with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
    server.bind((address, port))
    print("ready", flush=True)
    data = bytearray(size)
    _, peer = server.recvfrom_into(data)
    server.connect(peer)
    receive, send, turn = server.recv_into, server.send, range(window)
    send(b"!")
    while True:
        for _ in turn:
            receive(data)
        send(b"!")
"""
_SENDER = """
import gc, socket, sys, time
address, port, window, size, seconds = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.connect((address, port))
    client.settimeout(5)
    data, count, turn, now = bytes(size), 0, range(window), time.perf_counter
    client.send(data)
    client.recv(1)
    client.settimeout(None)
    send, receive = client.send, client.recv
    gc.disable()
    began = now()
    while now() - began < seconds:
        for _ in turn:
            send(data)
        receive(1)
        count += window
    print(count / (now() - began))
"""

# Opening: the first connection to each of several ports, then more to the last of them; microseconds of connect(2).
_LISTENERS = """
import selectors, socket, sys
address, port, ports = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with selectors.DefaultSelector() as ready:
    for number in range(port, port + ports):
        ready.register(socket.create_server((address, number), backlog=1024), selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in ready.select():
            key.fileobj.accept()[0].close()
"""
_OPENER = """
import gc, json, socket, statistics, sys, time
address, port, ports, repeats = sys.argv[1], *map(int, sys.argv[2:5])
def connect(port):
    with socket.socket() as connection:
        connection.settimeout(5)
        began = time.perf_counter_ns()
        connection.connect((address, port))
        took = time.perf_counter_ns() - began
        connection.recv(1)
    return took / 1000
gc.disable()
first = [connect(number) for number in range(port, port + ports)]
later = [connect(port + ports - 1) for _ in range(repeats)]
print(json.dumps([statistics.median(first), statistics.median(later)]))
"""

# Flows: opened, and kept until the client is told to end.
_KEEPING = """
import resource, socket, sys
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, count + 100))
kept = []
with socket.create_server((address, port), backlog=4096) as server:
    print("ready", flush=True)
    while True:
        kept.append(server.accept()[0])
"""
_OPENING = """
import resource, signal, socket, sys
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, count + 100))
kept = [socket.create_connection((address, port), 5) for _ in range(count)]
print("ready", flush=True)
signal.pause()
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
        # A proxy goes on to tell of every connection: somebody must read it, or it stops when the pipe is full.
        reader = threading.Thread(target=process.stdout.read, daemon=True)
        reader.start()
        try:
            yield
        finally:
            process.terminate()
            reader.join()
    finally:
        process.terminate()
        process.communicate()


def _client(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise Unmeasurable(f"{command[2]} got no answer within {timeout_s:g} s") from None


def _python(way: Way, server: str, client: str, words: tuple[object, ...], timeout_s: float, what: str) -> str:
    """What the client prints; both are programs that take an address, a port and the words."""
    command = inside(way.server, sys.executable, "-c", server, way.bind, str(way.listen_port or way.port))
    said = [str(word) for word in words]
    with serving([*command, *said], "ready"):
        done = _client(inside(way.client, sys.executable, "-c", client, way.dial, str(way.port), *said), timeout_s)
    if done.returncode != 0:
        why = done.stderr.strip().splitlines()
        raise Unmeasurable(f"{what}: {why[-1] if why else done.returncode}")
    return done.stdout


def throughput_gbps(way: Way, seconds: float, *options: str) -> float:
    port = str(way.listen_port or way.port)
    server = inside(way.server, "iperf3", "--server", "--one-off", "--forceflush", "--bind", way.bind, "--port", port)
    with serving(server, "listening"):
        client = ["iperf3", "--client", way.dial, "--port", str(way.port), "--time", str(seconds), "--json", *options]
        result = json.loads(_client(inside(way.client, *client), seconds + 15).stdout or "{}")
    if "error" in result or "end" not in result:
        raise Unmeasurable(f"iperf3: {result.get('error', 'no result')}")
    return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9


def latency_us(way: Way) -> tuple[float, float]:
    """(p50, p99) of one byte there and back, what Python needs at both ends included."""
    p50, p99 = json.loads(_python(way, _SERVER, _CLIENT, (WARM_UP, PING_PONGS), 30, "ping-pong"))
    return p50, p99


def opening_us(way: Way) -> tuple[float, float]:
    """Medians of connect(2): to OPENING_PORTS ports, from the way's on, nobody has dialled yet; and again. IPv4."""
    words = (OPENING_PORTS, OPENING_REPEATS)
    first, later = json.loads(_python(way, _LISTENERS, _OPENER, words, 30, "connect"))
    return first, later


def connections_per_second(way: Way) -> float:
    return float(_python(way, _ACCEPTING, _CONNECTING, (CONNECTIONS,), 60, "connections"))


def datagrams_per_second(way: Way, seconds: float) -> float:
    """Datagrams of DATAGRAM_BYTES that arrive, when none is lost."""
    words = (DATAGRAM_WINDOW, DATAGRAM_BYTES, seconds)
    return float(_python(way, _RECEIVER, _SENDER, words, seconds + 15, "datagrams"))


def cpu_ms_per_gbit(way: Way, seconds: float) -> float:
    """CPU time of the whole machine for a gigabit, sender on the first core and receiver on the last. Python, iperf3's
    start and whoever else is awake are in it, the same for every alternative."""
    cores = sorted(os.sched_getaffinity(0))
    before = _busy_s()
    gbps = throughput_gbps(way, seconds, "--affinity", f"{cores[0]},{cores[-1]}")
    return (_busy_s() - before) * 1000 / (gbps * seconds)


def _busy_s() -> float:
    """Seconds that all cores together were not idle, since boot: proc(5), /proc/stat."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = fields
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def background(way: Way, flows: int) -> Iterator[None]:
    """That many TCP connections open along a way, and idle, for the length of a block."""
    server = inside(way.server, sys.executable, "-c", _KEEPING, way.bind, str(way.port), str(flows))
    client = inside(way.client, sys.executable, "-c", _OPENING, way.dial, str(way.port), str(flows))
    with serving(server, "ready"), serving(client, "ready"):
        yield
