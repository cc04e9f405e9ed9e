"""`uklaunch demo`: the promise, shown and proven. Two guests and a container in one pod, each with servers, each
reaching the others' on localhost."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from . import pod, state
from .container import Container, container
from .errors import UklaunchError, first_error
from .guest import Guest, RunOptions
from .image import identify
from .model import GuestSpec
from .run import run_guest

POD = "demo"
READY_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 20

# Bound to loopback only, on purpose: such servers (databases, sidecars, DNS) are what guests elsewhere cannot reach.
CONTAINER_SERVER = """
import http.server, socket, threading

class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"hello from the container to {self.client_address[0]}\\n".encode())
    def log_message(self, *args):
        pass

class Hello6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

def echo(family, address):
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 9091))
        ready.release()
        while True:
            data, peer = sock.recvfrom(2048)
            sock.sendto(f"the container heard from {peer[0]}: ".encode() + data, peer)

ready = threading.Semaphore(0)
for server in (http.server.ThreadingHTTPServer(("127.0.0.1", 9090), Hello), Hello6(("::1", 9090), Hello)):
    threading.Thread(target=server.serve_forever).start()
for where in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    threading.Thread(target=echo, args=where).start()
    ready.acquire()
print("listening", flush=True)
"""

# UDP ports: HTTP's + 1 for IPv4, + 2 for IPv6. At the end a shell, which takes what we type.
GUEST_COMMAND = """
mkdir /www && echo "hello from guest $NAME" >/www/index.html && httpd -p $PORT -h /www
for v in 4 6; do
    test $v = 4 && udp=$((PORT + 1)) || udp=$((PORT + 2))
    mkfifo /tmp/f$v
    netcat -$v -u -l $udp </tmp/f$v | while read -r line; do echo "guest $NAME heard: $line"; done >/tmp/f$v &
done
stty -echo; sh 2>&1 | cat
"""

GET = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=10).read().decode().strip())"
SEND = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    sock.settimeout(10)
    sock.connect((sys.argv[1], int(sys.argv[2])))
    sock.send(b"hello\\n")
    print(sock.recv(2048).decode().strip())
"""


@dataclass
class Shell:
    """A guest's console with a shell behind it."""

    said: bytearray = field(default_factory=bytearray)
    more: trio.Event = field(default_factory=trio.Event)
    guest: Guest | None = None
    _asked: int = 0

    async def hear(self, data: bytes) -> None:
        self.said += data
        self.more.set()
        self.more = trio.Event()

    async def ask(self, command: str) -> str:
        """Type a command; what it prints. Raises trio.TooSlowError."""
        assert self.guest is not None
        self._asked += 1
        self.said.clear()
        end = f"end-{self._asked}".encode()
        await self.guest.send(f"{command}; echo end''-{self._asked}\n".encode())
        with trio.fail_after(ANSWER_TIMEOUT_S):
            while end not in self.said:
                await self.more.wait()
        lines = bytes(self.said).split(end)[0].decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if line.strip()).strip()


@dataclass
class Demo:
    say: Callable[[str], None]
    failures: int = 0

    def check(self, title: str, answer: str, wanted: str) -> None:
        good = wanted in answer
        self.failures += not good
        shown = answer.replace("\n", " / ") or "(nothing)"
        self.say(f"  {'ok  ' if good else 'FAIL'}  {title:<46} {shown if good else f'{shown}, wanted: {wanted}'}")

    async def from_container(self, box: Container) -> None:
        async def run(title: str, script: str, *args: str, wanted: str) -> None:
            def body() -> str:
                done = box.run("/usr/bin/python3", "-c", script, *args)
                return done.stdout.strip() or (done.stderr.strip().splitlines() or [""])[-1]

            self.check(title, await trio.to_thread.run_sync(body), wanted)

        self.say("\nin the container:")
        for name, port in (("web", 8080), ("two", 8090)):
            for host in ("127.0.0.1", "[::1]", "localhost"):
                url = f"http://{host}:{port}"
                await run(f"GET {url}", GET, url, wanted=f"hello from guest {name}")
            for host, udp in (("127.0.0.1", port + 1), ("::1", port + 2)):
                await run(f"UDP {host} {udp}", SEND, host, str(udp), wanted=f"guest {name} heard: hello")
        await run("UDP 127.0.0.1 7, where nobody listens", SEND, "127.0.0.1", "7", wanted="refused")

    async def from_guest(self, name: str, shell: Shell, other: tuple[str, int]) -> None:
        self.say(f"\nin guest {name}:")

        async def run(command: str, wanted: str) -> None:
            self.check(command, await shell.ask(command), wanted)

        await run("wget -qO- http://localhost:9090", "hello from the container to")
        for version, loopback in ((4, "127.0.0.1"), (6, "::1")):
            await run(
                f"echo hello | netcat -{version} -u -w 1 localhost 9091", f"the container heard from {loopback}: hello"
            )
        await run(f"wget -qO- http://localhost:{other[1]}", f"hello from guest {other[0]}")
        await run("wget -qO- http://localhost:7 2>&1", "refused")


@contextlib.asynccontextmanager
async def _guest(image: Path, name: str, port: int, shell: Shell, say: Callable[[str], None]) -> AsyncIterator[Guest]:
    spec = GuestSpec(
        name=name,
        pod=POD,
        image=identify(image),
        cmdline=GUEST_COMMAND,
        env={"NAME": name, "PORT": str(port)},
    )
    options = RunOptions(ready_port=port, remove_when_done=True, on_console=shell.hear, note=say)
    async with run_guest(spec, options) as guest:
        shell.guest = guest
        yield guest


async def _demo(image: Path, demo: Demo) -> None:
    web, two = Shell(), Shell()
    async with (
        pod.open_pod(POD) as record,
        _guest(image, "web", 8080, web, demo.say) as first,
        _guest(image, "two", 8090, two, lambda text: None) as second,
    ):
        demo.say(f"pod {POD}: namespace {record.netns}")
        for guest in (first, second):
            await guest.wait_ready(READY_TIMEOUT_S)
            seconds = (guest.record.ready_at or 0) - guest.record.started_at
            demo.say(
                f"guest {guest.record.name}: {guest.vmm.machine}, {guest.record.accel}, "
                f"{guest.ipv4} and {guest.ipv6}, ready in {seconds:.1f} s"
            )

        def enter() -> contextlib.AbstractContextManager[Container]:
            return container(Path(record.netns), ["/usr/bin/python3", "-c", CONTAINER_SERVER], says="listening")

        with enter() as box:
            demo.say(f"container: {Path(box.runtime[0]).name}, joined {record.netns}; its servers bind loopback only")
            await demo.from_container(box)
            await demo.from_guest("web", web, ("two", 8090))
            await demo.from_guest("two", two, ("web", 8080))
            await demo.from_guest("web, to itself", web, ("web", 8080))


def demo(image: Path, say: Callable[[str], None]) -> bool:
    """Run the demo; say each step. True if all of it was as it should be."""
    shown = Demo(say)
    if state.read_pod(POD) is not None:
        raise UklaunchError(f"pod {POD!r} exists", f"remove it first: uklaunch pod rm --force {POD}")
    with pod.open_router() as table:
        before = set(pod.unknown_ids(table))
    try:
        trio.run(_demo, image, shown)
    except BaseExceptionGroup as group:
        if (error := first_error(group)) is not None:
            raise error from group
        raise
    say("\nafterwards:")
    with pod.open_router() as table:
        left = [
            *(f"namespace {path}" for path in state.NETNS_DIR.glob(f"{pod.NAMESPACE_PREFIX}{POD}")),
            *(f"guest {record.name}" for record in state.guests(POD)),
            *(f"pod {record.name}" for record in state.pods() if record.name == POD),
            *(f"router rows of pod id {pod_id}" for pod_id in set(pod.unknown_ids(table)) - before),
        ]
    shown.check("namespace, links, guests, processes, rows", ", ".join(left) or "all gone", "all gone")
    say(f"\n{'all good' if not shown.failures else f'{shown.failures} checks FAILED'}")
    return not shown.failures
