"""What a VMM can see and do: its descriptors, Debian's /usr to read, itself in /proc; nothing else.

    a thread of the supervisor   namespaces ─► empty root ─► fork, and it ends
    its child                                                 └─► sh waits ───► /proc ─► setpriv ─► the VMM
    the supervisor                                                └─► limits, cgroup, uid ─┘

The child is the supervisor's own, with no monitor between them: its pid is the VMM's, and so is its exit code. It
lives on when the supervisor dies. Inside it is process 1, which no signal ends by default that comes from inside: a
VMM that aborts shows SIGSEGV (abort(3) sees to that) and not SIGABRT.

There is no Landlock here: it takes away files, and where none is there is nothing to take.

Sources: namespaces(7), pid_namespaces(7), pivot_root(2), proc(5), setpriv(1).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import trio

from .. import rootless
from ..errors import EXHAUSTED, UklaunchError
from ..threads import in_a_new_thread
from ..timeline import mark

UID_BASE = 0x70000000  # right above systemd's range for containers (systemd's UIDS-GIDS.md); ours ends at 0x703FFFFF
OOM_SCORE_ADJ = 200  # when memory runs out, guests go before the host's services

# Of what is in /: where programs and libraries are. All else there is the host's own business.
PROGRAMS = Path("/usr")
LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
DEVICES = (Path("/dev/null"), Path("/dev/urandom"))
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin"}

NEEDS = "needed: CAP_SYS_ADMIN, a / that is a mount and no initramfs, no seccomp filter of a container against mounts"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# include/uapi/linux/sched.h, mount.h; arch/x86/entry/syscalls/syscall_64.tbl, for glibc has no pivot_root
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 0x20, 0x1000, 0x4000, 0x40000,
)  # fmt: skip
_MNT_DETACH = 2
_NR_PIVOT_ROOT = 155


def vmm_uid(pid: int) -> int:
    """The uid, and gid, of the VMM that is process `pid` (at most 2^22): no two that run share one.

    The pod's id would not do: a pod that is being made has none when its VMM starts.
    """
    return UID_BASE + pid


class Process:
    """A child that runs. `stderr`: what it says there."""

    def __init__(self, popen: subprocess.Popen[bytes], stderr: trio.lowlevel.FdStream) -> None:
        self.pid = popen.pid
        self.stderr = stderr
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self._waiting = trio.Lock()  # one task at a time may wait for a descriptor

    @property
    def returncode(self) -> int | None:
        """None: it runs. Negative: the signal that ended it."""
        return self._popen.poll()

    async def wait(self) -> int:
        async with self._waiting:
            if self._pidfd >= 0:
                await trio.lowlevel.wait_readable(self._pidfd)
                os.close(self._pidfd)
                self._pidfd = -1
        return self._popen.wait()

    def kill(self) -> None:
        self._popen.kill()


async def start(
    command: Sequence[str],
    *,
    fds: Iterable[int],
    groups: Iterable[int] = (),
    devices: Iterable[Path] = (),
    write_limit_bytes: int = 0,
    admit: Callable[[int], None] = lambda pid: None,
) -> Process:
    """Start the command confined, with these descriptors, supplementary groups and device nodes.

    Beyond `write_limit_bytes` it can write to no file (setrlimit(2), RLIMIT_FSIZE).

    `admit` is given its pid while it waits, before it is the VMM: what it is put into there, it has never been out of.
    Raises UklaunchError if the kernel does not let us, and what `admit` raises; then nothing runs.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    stderr = trio.lowlevel.FdStream(ours)
    try:
        popen = await trio.to_thread.run_sync(
            lambda: spawn(
                command,
                fds=fds,
                groups=groups,
                devices=devices,
                write_limit_bytes=write_limit_bytes,
                admit=admit,
                stderr=theirs,
            )
        )
        try:
            return Process(popen, stderr)
        except OSError:  # no descriptor left for it
            popen.kill()
            popen.wait()
            raise
    except BaseException:
        await trio.aclose_forcefully(stderr)
        raise
    finally:
        os.close(theirs)


def spawn(
    command: Sequence[str],
    *,
    fds: Iterable[int] = (),
    groups: Iterable[int] = (),
    devices: Iterable[Path] = (),
    write_limit_bytes: int = 0,
    admit: Callable[[int], None] = lambda pid: None,
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    """As `start`; the caller waits for it."""
    _check(command[0])
    keep = ",".join(str(group) for group in groups)
    as_groups = f"--groups={keep}" if keep else "--clear-groups"
    if alone := rootless.is_active():  # one uid is all that there is, and its groups are the user's: among them kvm
        as_groups = "--keep-groups"
    # The uid comes when we know the pid, and have done with it; no line means that we have died.
    script = (
        "unset PWD; read -r uid && mount -n -t proc -o nosuid,nodev,noexec,subset=pid proc /proc && "
        'exec setpriv --reuid="$uid" --regid="$uid" "$@" </dev/null'
    )
    confined = [
        *("/bin/sh", "-c", script, "sh"),
        as_groups,
        *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"),
        *command,
    ]

    def enter_and_fork() -> subprocess.Popen[bytes]:
        _enter((*DEVICES, *devices))
        return subprocess.Popen(
            confined,
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=tuple(fds),
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,  # a Ctrl-C on our terminal is for us alone
        )

    theirs, ours = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(ours, "wb", buffering=0) as gate:
        try:
            popen = in_a_new_thread(enter_and_fork, "sandbox")
        except OSError as exc:
            hint = EXHAUSTED.get(exc.errno or 0, "does a limit forbid more processes? ulimit -u, TasksMax= of its unit")
            raise UklaunchError(f"a VMM cannot be started: {exc.strerror}", hint) from exc
        finally:
            os.close(theirs)
        try:
            mark("vmm-fork")
            resource.prlimit(popen.pid, resource.RLIMIT_CORE, (0, 0))  # a core holds all of the guest's memory
            resource.prlimit(popen.pid, resource.RLIMIT_FSIZE, (write_limit_bytes, write_limit_bytes))
            Path(f"/proc/{popen.pid}/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
            admit(popen.pid)
            with contextlib.suppress(BrokenPipeError):  # it has died: its exit code tells
                gate.write(f"{0 if alone else vmm_uid(popen.pid)}\n".encode())
        except BaseException:
            popen.kill()
            popen.wait()
            raise
    return popen


def _check(program: str) -> None:
    """Raises UklaunchError if it, or what confines it, is not there."""
    for tool, package in (("mount", "mount"), ("setpriv", "util-linux")):
        if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None:
            raise UklaunchError(f"the command {tool} is missing", f"apt-get install {package}")
    if not Path(program).resolve().is_relative_to(PROGRAMS):
        raise UklaunchError(
            f"{program} is not in {PROGRAMS}, which is all that a VMM sees of the host", f"install it below {PROGRAMS}"
        )


# --- the root; all this in a thread that ends afterwards ---


def _enter(devices: Iterable[Path]) -> None:
    """Move the calling thread into namespaces of its own (as to pids: its children), and an empty root, read-only.

    Sources and targets of mounts are paths of the old root, until it goes. Raises UklaunchError.
    """
    _call(
        "make namespaces",
        _libc.unshare(_CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS),
    )
    _mount("none", Path("/"), flags=_MS_REC | _MS_PRIVATE)  # nothing of this shows outside
    root = Path("/tmp")  # any directory will do: it is ours alone by now
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "mode=0755,size=64k,nr_inodes=64")
    for name in LINKS:
        with contextlib.suppress(OSError):  # not there, or no link: before Debian 12, or 32 bit
            (root / name).symlink_to((Path("/") / name).readlink())
    for name in ("usr", "proc", "dev"):
        (root / name).mkdir(0o755)
    if rootless.is_active():
        # Who is no real root may mount a /proc only where another is to be seen; the VMM's own comes on top of it.
        _mount("/proc", root / "proc", flags=_MS_BIND | _MS_REC)
    read_only = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    _mount(PROGRAMS, root / "usr", flags=_MS_BIND)
    _mount("none", root / "usr", flags=_MS_BIND | _MS_REMOUNT | read_only)
    for device in devices:
        node = root / device.relative_to("/")
        node.touch()
        _mount(device, node, flags=_MS_BIND)
    _mount("none", root, flags=_MS_BIND | _MS_REMOUNT | read_only | _MS_NOEXEC)
    os.chdir(root)
    # Onto itself: the old root is then mounted over the new one, and can go (pivot_root(2)).
    _call("change the root", _libc.syscall(_NR_PIVOT_ROOT, b".", b"."))
    _call("drop the old root", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _mount(source: Path | str, target: Path, kind: str = "none", flags: int = 0, options: str = "") -> None:
    _call(
        f"mount {source} on {target}" if source != "none" else f"change the mount {target}",
        _libc.mount(
            os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode() or None
        ),
    )


def _call(what: str, result: int) -> None:
    if result != 0:
        why = os.strerror(ctypes.get_errno())
        raise UklaunchError(f"a VMM cannot be confined: cannot {what}: {why}", NEEDS)
