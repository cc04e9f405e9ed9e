"""Other people's programs across the pod's localhost, both ways: a Debian guest and a real container with one userland.

    container (runc, tests/debian.py's tree)  ◄── localhost ──►  guest (QEMU, the same tree on its disk)

No program is told of uklaunch: each dials `localhost`, 127.0.0.1 or ::1. Servers in the container are bound to loopback
only. The guest is driven over ssh, through the pod's localhost too: one connection, many sessions.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import shlex
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from launcher import container as containers
from launcher import state

from .. import debian
from ..cli import shown, uklaunch

pytestmark = pytest.mark.boot

POD = "boot-tools"
START_S = 60
STOP_S = 10
POSTGRES = "101:101"  # which refuses to run as root
BULK = random.Random(0).randbytes(5 << 20).hex().encode()  # 10 MiB; as text, for those who print it
SHA256 = hashlib.sha256(BULK).hexdigest()

ports = itertools.count(7000)


class Side:
    """One end of the pod's localhost."""

    name: ClassVar[str]
    localhost: ClassVar[dict[int, str]]  # what the name means to its programs, and where their clients come from
    bound: ClassVar[dict[int, str]]  # what its servers listen on

    def argv(self, *command: str, user: str = "0:0", terminal: bool = False) -> list[str]:
        raise NotImplementedError

    def run(self, *command: str, stdin: bytes = b"", user: str = "0:0", timeout_s: float = 60) -> str:
        done = subprocess.run(
            self.argv(*command, user=user), capture_output=True, input=stdin, timeout=timeout_s, check=False
        )
        out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        assert done.returncode == 0, f"{self.name}: {shlex.join(command)}\nexit {done.returncode}\n{out}\n{err}"
        return out.strip()

    @contextlib.contextmanager
    def serving(self, *command: str, says: str, user: str = "0:0") -> Iterator[None]:
        """A server for the length of the block, which is entered when the server says so."""
        with subprocess.Popen(
            self.argv(*command, user=user, terminal=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            output: list[str] = []
            heard = threading.Event()

            def read() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    output.append(line)
                    if says in line:
                        heard.set()
                heard.set()

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            try:
                heard.wait(START_S)
                assert says in "".join(output), f"{self.name}: {shlex.join(command)}\n{''.join(output)}"
                yield
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
                process.kill()  # of no effect on what has ended
                reader.join(STOP_S)


@dataclass(frozen=True)
class ContainerSide(Side):
    box: containers.Container
    name = "container"
    localhost: ClassVar = {4: "127.0.0.1", 6: "::1"}
    bound: ClassVar = localhost

    def argv(self, *command: str, user: str = "0:0", terminal: bool = False) -> list[str]:
        return self.box.argv(*command, user=user)


@dataclass(frozen=True)
class GuestSide(Side):
    box: containers.Container
    name = "guest"
    localhost: ClassVar = {4: "169.254.77.1", 6: "fd00:77::1"}
    bound: ClassVar = {4: "0.0.0.0", 6: "::"}

    def argv(self, *command: str, user: str = "0:0", terminal: bool = False) -> list[str]:
        # With a terminal the program ends with its session.
        options = ["-tt"] if terminal else []
        words = ["chroot", "--userspec", user, "/", *command]
        return self.box.argv("ssh", "-S", "/run/guest", *options, "localhost", shlex.join(words))


@pytest.fixture(scope="module")
def sides() -> Iterator[dict[str, Side]]:
    if not debian.BUNDLE.exists():
        pytest.skip("no Debian image: make setup-test")
    with contextlib.ExitStack() as stack:
        stack.callback(uklaunch, "rm", "-f", f"{POD}/debian")
        started = uklaunch("run", str(debian.BUNDLE), "--pod", POD, "--name", "debian", "-d", "--ready-port", "22")
        assert started.returncode == 0, shown(started)
        pod = state.read_pod(POD)
        assert pod is not None
        box = stack.enter_context(
            containers.container(
                Path(pod.netns), ["sh", "-c", "echo up; exec sleep infinity"], says="up", root=debian.TREE
            )
        )
        made: dict[str, Side] = {"container": ContainerSide(box), "guest": GuestSide(box)}
        connection = ["ssh", "-M", "-S", "/run/guest", "localhost", "echo connected; exec sleep infinity"]
        stack.enter_context(made["container"].serving(*connection, says="connected"))
        yield made


@dataclass(frozen=True)
class Pair:
    client: Side
    server: Side


@pytest.fixture(params=["container-to-guest", "guest-to-container"])
def pair(request: pytest.FixtureRequest, sides: dict[str, Side]) -> Pair:
    client, _, server = request.param.partition("-to-")
    return Pair(sides[client], sides[server])


def names(side: Side) -> list[str]:
    """What a program there may call localhost."""
    return ["localhost", *side.localhost.values()]


def networks(side: Side) -> list[str]:
    return [f"{side.localhost[4]}/32", f"{side.localhost[6]}/128"]


def url(host: str, port: str, path: str) -> str:
    return f"http://[{host}]:{port}/{path}" if ":" in host else f"http://{host}:{port}/{path}"


def test_redis(pair: Pair) -> None:
    """A server without a password takes clients from loopback only: a guest is such a one."""
    port = str(next(ports))
    protection = ["--protected-mode", "yes" if pair.server.name == "container" else "no"]
    bind = ["--bind", *pair.server.bound.values()]
    with pair.server.serving(
        "redis-server", "--port", port, *bind, *protection, "--save", "", says="Ready to accept connections"
    ):
        for host in names(pair.client):
            assert pair.client.run("redis-cli", "-h", host, "-p", port, "ping") == "PONG"
            peer = pair.client.run("redis-cli", "-h", host, "-p", port, "client", "info")
            if pair.server.name == "container":
                assert "addr=127.0.0.1:" in peer or "addr=[::1]:" in peer, peer
        cli = ["redis-cli", "-h", "localhost", "-p", port]
        pair.client.run(*cli, "-x", "set", "bulk", stdin=BULK)
        assert hashlib.sha256(pair.client.run(*cli, "--raw", "get", "bulk").encode()).hexdigest() == SHA256
        load = ["redis-benchmark", "-h", "localhost", "-p", port, "-n", "1000", "-c", "20", "-t", "set,get", "--csv"]
        assert '"GET"' in pair.client.run(*load)


def test_redis_refuses_those_who_are_not_local(sides: dict[str, Side]) -> None:
    """That the protected mode above protects: the same server, any-bound, reached by the bridge's address."""
    box, port = sides["container"], str(next(ports))
    with box.serving("redis-server", "--port", port, "--bind", "*", "-::*", "--save", "", says="Ready to accept"):
        assert "DENIED" in box.run("redis-cli", "-h", "169.254.77.1", "-p", port, "ping")
        assert sides["guest"].run("redis-cli", "-h", "localhost", "-p", port, "ping") == "PONG"


def test_postgres(pair: Pair) -> None:
    """A server that knows no clients but those from its localhost: pg_hba.conf refuses all others."""
    port = str(next(ports))
    rules = "".join(f"host all all {address} trust\n" for address in networks(pair.server))
    data = f"/tmp/postgres-{port}"
    pair.server.run("cp", "-a", "/var/lib/postgresql/data", data, user=POSTGRES)
    pair.server.run("tee", f"{data}/pg_hba.conf", stdin=rules.encode(), user=POSTGRES)
    listen = f"listen_addresses={','.join(pair.server.bound.values())}"
    options = ["-D", data, "-p", port, "-k", "", "-c", listen, "-c", "jit=off", "-c", "fsync=off"]

    def ask(host: str, query: str) -> str:
        return pair.client.run("psql", "-h", host, "-p", port, "-U", "postgres", "-tAc", query)

    with pair.server.serving("postgres", *options, says="ready to accept connections", user=POSTGRES):
        assert ask("localhost", "select inet_client_addr()") in pair.server.localhost.values()
        for version, address in pair.client.localhost.items():
            assert ask(address, "select inet_client_addr()") == pair.server.localhost[version]
            assert ask(address, "select repeat('x', 1000000)") == "x" * 1000000
        pgbench = ["pgbench", "-h", "localhost", "-p", port, "-U", "postgres"]
        pair.client.run(*pgbench, "-i", "-q", "postgres")
        load = pair.client.run(*pgbench, "-c", "4", "-t", "25", "postgres")
        assert "number of transactions actually processed: 100/100" in load
        assert "number of failed transactions: 0" in load


@pytest.fixture
def dnsmasq(pair: Pair) -> Iterator[str]:
    """A name server with a short answer and with one of 2 KB; its port."""
    port = str(next(ports))
    listen = [f"--listen-address={address}" for address in pair.server.bound.values()] + ["--bind-interfaces"]
    with pair.server.serving(
        *(
            "dnsmasq",
            "--no-daemon",
            f"--port={port}",
            "--user=root",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
        ),
        *(listen if pair.server.name == "container" else []),
        "--edns-packet-max=4096",
        *("--address=/short.test/192.0.2.7", "--address=/short.test/2001:db8::7"),
        *(f"--txt-record=long.test,{letter * 250}" for letter in "abcdefgh"),
        says="started, version",
    ):
        yield port


def dig(client: Side, port: str, host: str, *question: str) -> str:
    return client.run("dig", f"@{host}", "-p", port, "+tries=1", "+time=3", *question)


def test_dns(pair: Pair, dnsmasq: str) -> None:
    for host in names(pair.client):
        assert dig(pair.client, dnsmasq, host, "+short", "a.short.test") == "192.0.2.7"
        assert dig(pair.client, dnsmasq, host, "+short", "aaaa", "a.short.test") == "2001:db8::7"


def test_dns_falls_back_to_tcp(pair: Pair, dnsmasq: str) -> None:
    for host in names(pair.client):
        answer = dig(pair.client, dnsmasq, host, "+bufsize=512", "txt", "long.test")
        assert all(letter * 250 in answer for letter in "abcdefgh")
        assert "(TCP)" in answer


@pytest.mark.parametrize("version", [4, 6])
def test_dns_answers_larger_than_a_packet(
    pair: Pair, dnsmasq: str, version: int, request: pytest.FixtureRequest
) -> None:
    """2 KB in one UDP datagram."""
    host = pair.client.localhost[version]
    answer = dig(pair.client, dnsmasq, host, "+bufsize=4096", "+ignore", "txt", "long.test")
    assert all(letter * 250 in answer for letter in "abcdefgh")
    assert "(UDP)" in answer


def test_ssh(pair: Pair) -> None:
    """10 MB there, through a command, and back as a file."""
    port = str(next(ports))
    pair.server.run("mkdir", "-p", "/run/sshd")
    listen = [word for address in pair.server.bound.values() for word in ("-o", f"ListenAddress={address}")]
    with pair.server.serving("/usr/sbin/sshd", "-D", "-e", "-p", port, *listen, says="Server listening on ::"):
        there, back = pair.client.localhost.values()
        summed = pair.client.run("ssh", "-p", port, there, "tee /tmp/bulk | sha256sum", stdin=BULK)
        assert summed.split()[0] == SHA256
        pair.client.run("scp", "-q", "-P", port, f"[{back}]:/tmp/bulk", "/tmp/back")
        assert pair.client.run("sha256sum", "/tmp/back").split()[0] == SHA256


def test_http2(pair: Pair) -> None:
    port = str(next(ports))
    for address in pair.server.bound.values():
        host = pair.client.localhost[6 if ":" in address else 4]
        with pair.server.serving(
            "nghttpd", "--no-tls", "-v", "-a", address, "-d", "/etc/ssh", port, says=f"listen {address}:{port}"
        ):
            page = url(host, port, "key.pub")
            assert pair.client.run("nghttp", page) == (debian.TREE / "etc/ssh/key.pub").read_text().strip()
            load = pair.client.run("h2load", "-n", "1000", "-c", "4", "-m", "10", page)
            assert "1000 succeeded, 0 failed, 0 errored, 0 timeout" in load


GRPC_SERVER = """
import concurrent.futures, sys, grpc

def count(request, context):
    for number in range(int(request)):
        yield b"%d" % number

def echo(requests, context):
    yield from requests

def handler(details):
    return {"/t/count": grpc.unary_stream_rpc_method_handler(count),
            "/t/echo": grpc.stream_stream_rpc_method_handler(echo)}.get(details.method)

class Handlers(grpc.GenericRpcHandler):
    def service(self, details):
        return handler(details)

server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), handlers=[Handlers()])
for address in sys.argv[1:]:
    assert server.add_insecure_port(address)
server.start()
print("serving", flush=True)
server.wait_for_termination()
"""
GRPC_CLIENT = """
import sys, grpc
for address in sys.argv[1:]:
    with grpc.insecure_channel(address) as channel:
        counted = list(channel.unary_stream("/t/count")(b"500", timeout=30))
        assert counted == [b"%d" % number for number in range(500)], counted
        blocks = [bytes([number]) * 100000 for number in range(20)]
        assert list(channel.stream_stream("/t/echo")(iter(blocks), timeout=30)) == blocks
        print(address, "good")
"""


def test_grpc_streams(pair: Pair) -> None:
    port = str(next(ports))

    def endpoints(addresses: list[str]) -> list[str]:
        return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]

    bound = ["::"] if pair.server.name == "guest" else list(pair.server.bound.values())
    with pair.server.serving("python3", "-c", GRPC_SERVER, *endpoints(bound), says="serving"):
        answer = pair.client.run("python3", "-c", GRPC_CLIENT, *endpoints(names(pair.client)))
        assert answer.count("good") == len(names(pair.client))


def test_curl(pair: Pair) -> None:
    """HTTP/1.1, two requests on one connection; the server is dual-stack, where it may be.

    In a guest only by address: curl asks nobody what `localhost` is.
    """
    port = str(next(ports))
    pair.server.run("tee", "/tmp/page", stdin=BULK)
    server = ["python3", "-u", "-m", "http.server", "-p", "HTTP/1.1", "-d", "/tmp"]
    with contextlib.ExitStack() as stack:
        for address in ["::"] if pair.server.name == "guest" else pair.server.bound.values():
            stack.enter_context(pair.server.serving(*server, "-b", address, port, says="Serving HTTP"))
        for host in names(pair.client)[pair.client.name == "guest" :]:
            page = url(host, port, "page")
            told = "%{http_version} %{num_connects} %{size_download}\\n"
            fetched = pair.client.run("curl", "-sS", "-w", told, "-o", "/tmp/one", page, "-o", "/tmp/two", page)
            assert fetched.splitlines() == [f"1.1 1 {len(BULK)}", f"1.1 0 {len(BULK)}"]
            assert pair.client.run("sha256sum", "/tmp/two").split()[0] == SHA256


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_iperf3(pair: Pair, version: int, protocol: str) -> None:
    port = str(next(ports))
    host = pair.client.localhost[version]
    client = ["iperf3", "-c", host, "-p", port, "-t", "1", "--bidir", "-J"]
    client += ["-u", "-b", "5M", "-l", "1400"] if protocol == "udp" else []
    listen = ["-B", pair.server.bound[version]]
    with pair.server.serving("iperf3", "-s", "-p", port, *listen, "--forceflush", says="Server listening"):
        result = json.loads(pair.client.run(*client))["end"]
    for direction in ("", "_bidir_reverse"):
        if protocol == "tcp":
            assert result[f"sum_received{direction}"]["bytes"] > 1 << 20
        else:
            assert result[f"sum{direction}"]["packets"] > 300
            assert result[f"sum{direction}"]["lost_percent"] < 20  # a busy host may stop the guest for a while
