"""Without root: two ordinary users, each with a router of his own, in namespaces that their commands make."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.demo import CONTAINER_SERVER
from router import program

from ..cli import COMMAND, shown

pytestmark = pytest.mark.boot

ALICE, BOB = 62001, 62002  # nobody's: systemd's UIDS-GIDS.md
OURS, USAGE = 125, 2
# A host of the test's own: /dev/net/tun as udev makes it, runtime directories as pam_systemd does, and an outside.
HOST = f"""
set -e
mount -t tmpfs tmpfs /mnt
mknod -m 0666 /mnt/tun c 10 200
mount --bind /mnt/tun /dev/net/tun
for uid in {ALICE} {BOB}; do mkdir -m 0700 /mnt/$uid; chown $uid /mnt/$uid; done
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
ip netns add outside
ip link add toward type veth peer name back netns outside
ip link set toward up
ip address add 192.0.2.1/24 dev toward
ip address add 2001:db8::1/64 dev toward nodad
ip route add default via 192.0.2.2
ip route add default via 2001:db8::2
ip -n outside link set back up
ip -n outside address add 192.0.2.2/24 dev back
ip -n outside address add 2001:db8::2/64 dev back nodad
echo ready
exec sleep infinity
"""
# Asks the container by both families, and then answers it.
GUEST = """
for v in 4 6; do printf 'GET / HTTP/1.0\\r\\n\\r\\n' | netcat -$v -w 5 localhost 9090 | tail -n 1; done
printf 'GET /x HTTP/1.0\\r\\n\\r\\n' | netcat -w 5 192.0.2.2 8000 | head -n 1
mkdir /w; echo hello from the guest >/w/index.html; httpd -f -p 8100 -h /w
"""
OPEN = (
    "import sys; from router import syscall\n"
    "try: syscall.open_pin(sys.argv[1]); print('opened')\n"
    "except PermissionError: print('refused')"
)


@dataclass(frozen=True)
class Machine:
    pid: int

    def command(self, uid: int, *args: str) -> list[str]:
        """As the user would run it; as root for uid 0."""
        whose = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        environment = ["env", f"XDG_RUNTIME_DIR=/mnt/{uid}"] if uid else []
        return [
            "nsenter",
            "--mount",
            "--net",
            f"--wd={Path.cwd()}",
            f"--target={self.pid}",
            *whose,
            *environment,
            *args,
        ]

    def run(self, uid: int, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(uid, *args), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False
        )

    def uklaunch(self, uid: int, *args: str, code: int = 0) -> str:
        done = self.run(uid, *COMMAND, *args)
        assert done.returncode == code, shown(done)
        return done.stdout if code == 0 else done.stderr

    @contextlib.contextmanager
    def router_of(self, uid: int) -> Iterator[None]:
        self.uklaunch(0, "router", "load", "--user", str(uid), "--pods", "2")
        try:
            yield
        finally:
            self.uklaunch(0, "router", "unload", "--user", str(uid))


@pytest.fixture
def machine() -> Iterator[Machine]:
    host = subprocess.Popen(["unshare", "--mount", "--net", "sh", "-c", HOST], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    with host.stdout:
        assert host.stdout.readline() == "ready\n"
        made = Machine(host.pid)
        serve = made.command(0, "ip", "netns", "exec", "outside", "busybox", "httpd", "-f", "-p", "8000", "-h", "/mnt")
        outside = subprocess.Popen(serve)
        try:
            yield made
        finally:
            for process in (outside, host):
                process.kill()
                process.wait()
            for pid in (*processes_of(ALICE), *processes_of(BOB)):  # of a test that failed
                os.kill(pid, signal.SIGKILL)


def processes_of(uid: int) -> dict[int, str]:
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == uid:
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return {pid: line for pid, line in found.items() if line}  # one that is dead and not yet waited for has none


def test_a_guest_and_a_container_reach_each_other(machine: Machine) -> None:
    get = ["curl", "-sS", "-m", "5"]
    with machine.router_of(ALICE):
        machine.uklaunch(ALICE, "pod", "create", "p")
        serve = [*COMMAND, "pod", "exec", "p", "--", sys.executable, "-uc", CONTAINER_SERVER]
        server = subprocess.Popen(machine.command(ALICE, *serve), stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        with server.stdout:
            try:
                assert "listening" in server.stdout.readline()
                guest = ["--name", "one", "--ready-port", "8100", "--cmdline", GUEST]
                machine.uklaunch(ALICE, "run", "default", "--pod", "p", "-d", *guest)
                said = machine.uklaunch(ALICE, "logs", "one")
                for peer in ("127.0.0.1", "::1"):
                    assert f"hello from the container to {peer}" in said
                for host in ("127.0.0.1", "[::1]"):
                    heard = machine.uklaunch(ALICE, "pod", "exec", "p", "--", *get, f"http://{host}:8100/")
                    assert heard == "hello from the guest\n"
                assert "404 Not Found" in said
                assert "one" in machine.uklaunch(ALICE, "flows", "p")
                for host in ("192.0.2.2", "[2001:db8::2]"):
                    assert "404 Not Found" in machine.uklaunch(
                        ALICE, "pod", "exec", "p", "--", *get, f"http://{host}:8000/x"
                    )
                assert machine.uklaunch(BOB, "ps", "-a").count("\n") == 1  # headings alone
            finally:
                server.kill()
                server.wait()
        machine.uklaunch(ALICE, "rm", "--force", "one")
        machine.uklaunch(ALICE, "pod", "rm", "p")
        assert not processes_of(ALICE), "with the last pod go the user's namespaces"
    assert not machine.run(0, "ls", "/run/uklaunch-users").stdout


def test_nobody_opens_what_is_anothers(machine: Machine) -> None:
    with machine.router_of(ALICE), machine.router_of(BOB):
        version = f"uklaunch/{program.version()}"
        pins = {
            ALICE: f"/run/uklaunch-users/{ALICE}/{version}/pods",
            BOB: f"/run/uklaunch-users/{BOB}/{version}/pods",
            0: f"{os.environ.get('UKLAUNCH_BPFFS', '/sys/fs/bpf')}/{version}/pods",
        }
        machine.uklaunch(0, "router", "load")
        for owner, pin in pins.items():
            for uid in (ALICE, BOB):
                done = machine.run(uid, sys.executable, "-c", OPEN, pin)
                assert done.stdout.strip() == ("opened" if uid == owner else "refused"), shown(done)


CASES = {
    "no router": (("pod", "create", "p"), OURS, f"sudo uklaunch router load --user {ALICE}"),
    "a published port": (("pod", "create", "p", "-p", "8080:80"), USAGE, "-p needs root"),
    "another's namespace": (("pod", "create", "p", "--netns", "/proc/1/ns/net"), OURS, "cannot enter"),
    "loading the router": (("router", "load"), OURS, "for root alone"),
    "the demo": (("demo",), OURS, "for root alone"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_needs_root_says_so_in_a_line(machine: Machine, case: str) -> None:
    args, code, says = CASES[case]
    said = machine.uklaunch(ALICE, *args, code=code)
    assert says in said
    assert said.count("\n") == 1, said
    assert not processes_of(ALICE)


def test_doctor_says_what_to_ask_the_administrator_for(machine: Machine) -> None:
    said = machine.run(ALICE, *COMMAND, "doctor").stdout
    assert f"remedy: ask the administrator for it: sudo uklaunch router load --user {ALICE}" in said
    with machine.router_of(ALICE):
        said = machine.uklaunch(ALICE, "doctor")
    assert "FAIL" not in said
    assert "joins pods to the host's network" in said
    assert not processes_of(ALICE)


def test_as_many_pods_as_root_has_made_room_for(machine: Machine) -> None:
    with machine.router_of(ALICE):
        for name in ("one", "two"):
            machine.uklaunch(ALICE, "pod", "create", name)
        assert "2 pods" in machine.uklaunch(ALICE, "pod", "create", "three", code=OURS)
        assert "only root" in machine.uklaunch(ALICE, "drops", "-f", "one", code=OURS)
        for name in ("one", "two"):
            machine.uklaunch(ALICE, "pod", "rm", name)
