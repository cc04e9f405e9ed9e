"""A host whose PID 1 is a real systemd, in namespaces of its own: pid, mount, cgroup, network, IPC, UTS.

    this machine                     the host under test
    tests ── nsenter ──────────────► systemd (PID 1) ── our units, the generator, real guests
      ▲                                 │
      └── READY=1 of PID 1, and a line from each unit that becomes active or has stopped (a FIFO)

Its root is this machine's; its own are /run with a journal, /sys, bpffs, cgroups, /etc/uklaunch, and the units that it
sees: ours and the few of systemd's own that they need. A reboot ends it and starts another over the same /etc.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import systemd as package

SYSTEMD = Path("/lib/systemd/systemd")
UNITS = Path(package.__file__).parent
BIN = Path(sys.executable).parent
BOOT_TIMEOUT_S = 120

# Of systemd's own units: those that order a start, and what a shutdown takes. Without them, for one, the mounts that
# pods are would go before their guests.
_ITS = (
    *("systemd-journald.service", "systemd-journald.socket"),
    *("sysinit.target", "basic.target", "local-fs.target", "local-fs-pre.target", "network.target"),
    *("shutdown.target", "umount.target", "final.target", "poweroff.target", "systemd-poweroff.service"),
)
_MULTI_USER = "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n"

_SETUP = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/lock /run/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\n' >/run/systemd/journald.conf.d/test.conf
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mkdir -p /etc/uklaunch
mount --bind "$1/etc" /etc/uklaunch
mount --bind "$2" /usr/local/sbin
ip link set lo up
exec "$3" --system --unit=multi-user.target --log-target=null --show-status=no
"""


@dataclass
class Host:
    """`booted` starts PID 1 for the length of a block; what is in `directory` stays."""

    directory: Path
    pid: int = 0
    _events: int = -1
    _unread: list[str] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def install(cls, directory: Path) -> Iterator[Host]:
        """What a package and an administrator put there."""
        for name in ("etc", "units", "generators", "log"):
            (directory / name).mkdir()
        units = directory / "units"
        for path in UNITS.iterdir():
            if path.suffix in (".service", ".target"):
                shutil.copy(path, units)
        for name in _ITS:
            (units / name).symlink_to(f"/lib/systemd/system/{name}")
        (units / "multi-user.target").write_text(_MULTI_USER)
        shutil.copy(UNITS / "uklaunch-generator", directory / "generators")
        os.mkfifo(directory / "events")
        host = cls(directory, _events=os.open(directory / "events", os.O_RDWR | os.O_NONBLOCK))
        for template in ("uklaunch@", "uklaunch-pod@", "uklaunch-router"):
            host.drop_in(
                f"{template}.service",
                f"[Service]\nStandardOutput=append:{directory}/log/%n\nStandardError=inherit\n"
                f"ExecStartPost=+/bin/sh -c 'echo active %n >{directory}/events'\n"
                f"ExecStopPost=+/bin/sh -c 'echo stopped %n $$SERVICE_RESULT >{directory}/events'\n",
            )
        # Shut in, it sees neither /tmp nor homes, and this checkout may be there.
        host.drop_in("uklaunch-router.service", f"[Service]\nBindReadOnlyPaths={UNITS.parent.parent} {BIN.parent}\n")
        host.want("sysinit.target", "systemd-journald.service")
        host.want("multi-user.target", "uklaunch.target")
        host.want("uklaunch.target", "uklaunch-router.service")
        try:
            yield host
        finally:
            os.close(host._events)

    def drop_in(self, unit: str, text: str) -> None:
        into = self.directory / "units" / f"{unit}.d"
        into.mkdir(exist_ok=True)
        (into / f"{unit.partition('.')[0]}-{len(list(into.iterdir()))}.conf").write_text(text)

    def want(self, target: str, unit: str) -> None:
        """As `systemctl enable` does."""
        wants = self.directory / "units" / f"{target}.wants"
        wants.mkdir(exist_ok=True)
        template = unit.partition("@")[0] + "@.service" if "@" in unit else unit
        (wants / unit).symlink_to(f"../{template}")

    def without_guests(self) -> None:
        for path in (self.directory / "etc").iterdir():
            path.unlink()
        (self.directory / "units" / "uklaunch.target.wants" / "uklaunch@db.service").unlink()

    @contextlib.contextmanager
    def booted(self) -> Iterator[None]:
        """From PID 1's start until it says that all that is wanted is active; at the block's end, power off."""
        with contextlib.ExitStack() as stack:
            cgroup = stack.enter_context(_cgroup())
            namespaces = ("--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--net", "--ipc", "--uts")
            environment = {
                "PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
                "container": "uklaunch-test",
                "NOTIFY_SOCKET": str(self.directory / "notify"),
                "SYSTEMD_UNIT_PATH": f"{self.directory}/units:/run/systemd/generator",
                "SYSTEMD_GENERATOR_PATH": str(self.directory / "generators"),
            }
            said = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            (self.directory / "notify").unlink(missing_ok=True)
            said.bind(str(self.directory / "notify"))
            said.settimeout(BOOT_TIMEOUT_S)
            command = ["unshare", *namespaces, "--propagation", "private", "bash", "-c", _SETUP, "setup"]
            unshare = subprocess.Popen(
                [*command, str(self.directory), str(BIN), str(SYSTEMD)],
                env=environment,
                stdin=subprocess.DEVNULL,
                preexec_fn=lambda: (cgroup / "cgroup.procs").write_text("0"),
            )
            try:
                self._wait_ready(said, unshare)
                self.pid = int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())
                yield
                self.systemctl("poweroff")
                unshare.wait(60)
            finally:
                unshare.kill()
                unshare.wait()

    def _wait_ready(self, said: socket.socket, unshare: subprocess.Popen[bytes]) -> None:
        while True:
            try:
                if b"READY=1" in said.recv(4096).split(b"\n"):
                    return
            except TimeoutError:
                raise AssertionError(f"systemd is not ready:\n{self.log()}") from None

    def log(self) -> str:
        files = sorted((self.directory / "log").iterdir())
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-6000:]}" for file in files)

    def run(self, *command: str, code: int | None = 0) -> str:
        """A command on that host, from its root directory. `code`: its exit code; None: any."""
        enter = ("nsenter", f"--target={self.pid}", "--all", "--wd=/")
        result = subprocess.run(
            [*enter, *command], capture_output=True, text=True, errors="backslashreplace", timeout=60
        )
        assert result.returncode == code or code is None, f"{command}: {result.stdout}{result.stderr}\n{self.log()}"
        return result.stdout

    def systemctl(self, *args: str, code: int | None = 0) -> str:
        return self.run("systemctl", *args, code=code)

    def uklaunch(self, *args: str, code: int | None = 0) -> str:
        return self.run("/usr/local/sbin/uklaunch", *args, code=code)

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "--value", "--property", name, unit).strip()

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """What is in it by now, and is on its way there."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "--quiet", "--all", "--output=json", *matches).splitlines()
        return [json.loads(line) for line in lines]

    def kill(self, pid: int, number: signal.Signals) -> None:
        """By a pid of that host."""
        self.run("kill", f"-{int(number)}", str(pid))

    def wait_event(self, wanted: str, timeout_s: float = BOOT_TIMEOUT_S) -> list[str]:
        """Until a unit has said this; returns what has been said, up to it."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self._unread:
            if not select.select([self._events], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{wanted!r} never came, but {self._unread}:\n{self.log()}")
            self._unread += os.read(self._events, 4096).decode().splitlines()
        at = self._unread.index(wanted) + 1
        seen, self._unread = self._unread[:at], self._unread[at:]
        return seen


@contextlib.contextmanager
def _cgroup() -> Iterator[Path]:
    """One of our own, which is the root of what that host sees."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(where) for where, kind in mounts if kind == "cgroup2"]
    root = next(
        (root for root in roots if (root / "cgroup.procs").exists()), None
    )  # others may lie under a later mount
    if root is None:
        raise RuntimeError("no cgroup2 is mounted")
    cgroup = root / f"uklaunch-test-{os.getpid()}"
    cgroup.mkdir()
    try:
        yield cgroup
    finally:
        (cgroup / "cgroup.kill").write_text("1")
        _await_empty(cgroup)
        for path in sorted(cgroup.rglob("*/"), reverse=True):
            path.rmdir()
        cgroup.rmdir()


def _await_empty(cgroup: Path) -> None:
    """cgroup.events is polled for priority: Documentation/admin-guide/cgroup-v2.rst."""
    with (cgroup / "cgroup.events").open() as file:
        poll = select.poll()
        poll.register(file, select.POLLPRI)
        while "populated 1" in (file.seek(0), file.read())[1]:
            assert poll.poll(10_000), f"{cgroup} is not empty"
