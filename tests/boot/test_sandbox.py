"""Where a VMM that a hostile guest has taken over finds itself: read from outside, in /proc, and tried from inside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import capabilities, control, state
from launcher.arguments import DEFAULT_BUNDLE
from launcher.errors import UklaunchError
from launcher.vmm import sandbox
from launcher.vmm.files import OVERLAY_DIR

from .. import leaks
from ..cli import shown, uklaunch

pytestmark = pytest.mark.boot

POD = "sandboxed"


def start(name: str, *args: str, image: str = "default") -> state.GuestRecord:
    result = uklaunch("run", image, "--pod", POD, "--name", name, "-d", "--rm", "--stop-timeout", "0", *args)
    assert result.returncode == 0, shown(result)
    return state.find_guest(f"{POD}/{name}")


@pytest.fixture(scope="module")
def guest() -> Iterator[state.GuestRecord]:
    before = leaks.ours()
    yield start("n")
    assert uklaunch("stop", f"{POD}/n").returncode == 0
    assert leaks.ours() == before


@pytest.fixture
def proc(guest: state.GuestRecord) -> Path:
    return Path("/proc") / str(guest.vmm_pid)


def inside(guest: state.GuestRecord, script: str) -> str:
    """What a shell says that has the VMM's place and rights."""
    uid = sandbox.vmm_uid(guest.vmm_pid)
    result = subprocess.run(
        [
            *("nsenter", f"--target={guest.vmm_pid}", "--root", "--wd"),
            *("--mount", "--pid", "--net", "--ipc", "--uts"),
            *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"),
            *("--bounding-set=-all", "--no-new-privs", "--", "sh", "-c", script),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=sandbox.ENVIRONMENT,
    )  # fmt: skip
    return result.stdout + result.stderr


def test_its_rights(guest: state.GuestRecord, proc: Path) -> None:
    uid = str(sandbox.vmm_uid(guest.vmm_pid))
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert status["Uid"].split() == status["Gid"].split() == [uid] * 4
    assert status["Groups"].strip() == ""
    assert all(int(status[key], 16) == 0 for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert (status["PPid"], status["NSpid"].split()[-1]) == (str(guest.supervisor_pid), "1")
    limits = (proc / "limits").read_text().splitlines()
    for what in ("core", ""):  # it has no disk
        name = " ".join(("Max", *what.split(), "file size"))
        assert next(line for line in limits if line.startswith(name)).removeprefix(name).split()[:2] == ["0", "0"]
    assert (proc / "oom_score_adj").read_text().strip() == str(sandbox.OOM_SCORE_ADJ)
    assert [word.split(b"=")[0] for word in (proc / "environ").read_bytes().split(b"\0") if word] == [b"PATH"]


@pytest.mark.parametrize("kind", ["mnt", "pid", "net", "ipc", "uts"])
def test_its_namespaces(guest: state.GuestRecord, proc: Path, kind: str) -> None:
    other = start("other", "--no-wait")
    try:
        others = (Path("/proc/self"), *(Path("/proc") / str(pid) for pid in (guest.supervisor_pid, other.vmm_pid)))
        assert (proc / "ns" / kind).readlink() not in [(path / "ns" / kind).readlink() for path in others]
        assert proc.stat().st_uid != others[-1].stat().st_uid
        if kind == "net":
            assert f"net:[{Path(state.get_pod(POD).netns).stat().st_ino}]" != str((proc / "ns/net").readlink())
            links = inside(guest, "ip -o link").splitlines()
            assert len(links) == 1
            assert "lo: <LOOPBACK>" in links[0]  # down
    finally:
        uklaunch("stop", f"{POD}/other")


def test_its_root(guest: state.GuestRecord, proc: Path) -> None:
    mounts = {}
    for line in (proc / "mountinfo").read_text().splitlines():
        _, _, _, root, target, options, *rest = line.split()
        mounts[target] = (root, options.split(","), rest[rest.index("-") + 1])
    assert set(mounts) == {"/", "/usr", "/proc", *map(str, sandbox.DEVICES)}
    assert all("ro" in mounts[path][1] and "nosuid" in mounts[path][1] for path in ("/", "/usr"))
    assert (mounts["/"][0], mounts["/"][2], mounts["/proc"][0], mounts["/proc"][2]) == ("/", "tmpfs", "/", "proc")
    seen = {path.name for path in (proc / "root").iterdir()}
    assert seen <= {"usr", "proc", "dev", *sandbox.LINKS}
    assert seen.isdisjoint(("etc", "root", "home", "run", "var", "srv", "tmp", "sys", "boot", "mnt", "opt"))


def test_what_it_finds_and_can_do(guest: state.GuestRecord) -> None:
    assert inside(guest, "cd /proc && echo [0-9]*").split()[0] == "1"
    assert set(inside(guest, "cd /proc && echo [a-z]*").split()) == {"self", "thread-self"}
    assert "No such file" in inside(guest, "cat /etc/shadow")
    for path in ("/x", "/usr/x", "/dev/x", "/usr/bin/x"):
        assert "Read-only file system" in inside(guest, f": >{path}")
    assert "must be superuser" in inside(guest, "mount -t tmpfs none /proc")
    assert "Operation not permitted" in inside(guest, "unshare --mount true")


def descriptors(guest: state.GuestRecord) -> set[tuple[str, str]]:
    """Files with r, w or rw; of the rest, which has no path, what it is."""
    found = set()
    unix = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    for fd in Path(f"/proc/{guest.vmm_pid}/fd").iterdir():
        name = str(fd.readlink())
        assert not fd.is_dir(), name
        if name.startswith("socket:"):
            assert name.removeprefix("socket:[")[:-1] in unix  # none that leads to a network, or of netlink
            name = "socket"
        elif name.startswith("pipe:"):
            name = f"pipe {fd.name}"
        flags = int((fd.parent.parent / "fdinfo" / fd.name).read_text().split()[3], 8)
        found.add((name.removesuffix(" (deleted)"), ("r", "w", "rw")[flags & os.O_ACCMODE]))
    events = {("anon_inode:[eventfd]", "rw"), ("anon_inode:[eventpoll]", "rw"), ("anon_inode:[signalfd]", "rw")}
    return found - events


def test_its_descriptors(guest: state.GuestRecord, tmp_path: Path) -> None:
    always = {
        ("/dev/null", "r"),
        ("/dev/null", "rw"),  # its stdout
        ("pipe 2", "w"),
        ("socket", "rw"),  # its console and its QMP
        ("/dev/net/tun", "rw"),
        (f"{guest.directory}/vmm.lock", "r"),
        (f"{DEFAULT_BUNDLE}/vmlinuz", "r"),
        ("/memfd:initrd", "r"),
    }
    assert descriptors(guest) == always

    for file in ("vmlinuz", "initrd"):
        (tmp_path / file).symlink_to(DEFAULT_BUNDLE / file)
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    manifest = (DEFAULT_BUNDLE / "uklaunch.toml").read_text()
    (tmp_path / "uklaunch.toml").write_text(f'disks = ["disk.raw"]\n{manifest}')
    other = start("disk", "--no-wait", image=str(tmp_path))
    try:
        found = descriptors(other)
        overlays = {item for item in found if item[0].startswith(f"{OVERLAY_DIR}/#")}
        assert found - overlays == {item for item in always if item[0] != f"{guest.directory}/vmm.lock"} | {
            (f"{other.directory}/vmm.lock", "r"),
            (str(tmp_path / "disk.raw"), "r"),
        }
        assert [mode for _, mode in overlays] == ["rw"]
    finally:
        uklaunch("stop", f"{POD}/disk")


def test_its_supervisor_keeps_only_the_capabilities_that_it_needs(guest: state.GuestRecord) -> None:
    needed = sum(1 << bit for bit in capabilities.NEEDED.values())
    threads = list(Path(f"/proc/{guest.supervisor_pid}/task").iterdir())
    for thread in threads:
        status = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines() if ":\t" in line)
        sets = {name: int(status[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Bnd", "Inh", "Amb")}
        assert sets["Eff"] == sets["Prm"] == sets["Bnd"] != 0
        assert sets["Eff"] & ~needed == sets["Inh"] == sets["Amb"] == 0
    assert threads


def test_it_outlives_its_supervisor_and_gc_ends_it() -> None:
    before = leaks.ours()
    guest = start("orphan", "--no-wait")
    with contextlib.closing(os.fdopen(os.pidfd_open(guest.supervisor_pid))) as supervisor:
        os.kill(guest.supervisor_pid, signal.SIGKILL)
        assert control._ends_within(supervisor.fileno(), 10)
    assert control.unsupervised(guest)
    assert state.vmm_runs(guest)
    assert [item.name for item in control.collect(kill=True) if item.name == f"{POD}/orphan"]
    assert not state.vmm_runs(guest)
    assert leaks.ours() <= before


def test_what_is_put_somewhere_before_it_runs_has_never_been_elsewhere() -> None:
    seen: list[int] = []

    def admit(pid: int) -> None:
        seen.append(Path(f"/proc/{pid}").stat().st_uid)

    with sandbox.spawn(["/usr/bin/true"], admit=admit) as process:
        assert process.wait(10) == 0
    assert seen == [0]


def test_who_is_not_admitted_does_not_run() -> None:
    pids = []

    def refuse(pid: int) -> None:
        pids.append(pid)
        raise UklaunchError("no room")

    with pytest.raises(UklaunchError, match="no room"):
        sandbox.spawn(["/usr/bin/true"], admit=refuse)
    assert not Path(f"/proc/{pids[0]}").exists()


def test_a_vmm_elsewhere_than_in_usr_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UklaunchError, match="is not in /usr"):
        sandbox.spawn([str(tmp_path / "qemu")])
