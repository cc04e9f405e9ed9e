"""Without root: a "host" of the user's own, where he is root, and where all else of uklaunch is as it is for root.

    initial namespaces          the user's user, mount and network namespace
    ┌───────────────────┐      ┌────────────────────────────────────────────────────────────┐
    │ uklaunch run      │ ───► │ holder (sleep)   /run: a tmpfs with /run/netns, and the    │
    │ uklaunch ps       │ ───► │ supervisors      host's under /run/.host     pods: uk-POD  │
    └───────────────────┘      └────────────────────────────────────────────────────────────┘

pasta(1), if it is there, joins their network to the host's. It stays outside, and is ended with the holder.
A command enters before it does anything else; who comes first makes them. They last as long as their holder, which the
last to leave ends, if no pod is left. State is where it would be for root, but under $XDG_RUNTIME_DIR:

    uklaunch/               as state.py says
        rootless/
            users           held, shared, by every command and supervisor inside
            making          held while a holder is made
            holder          its pid; held for as long as it lives
            pasta           its pid

Only BPF asks for more than a user namespace can give: router/users.py.
Sources: user_namespaces(7), mount_namespaces(7), setns(2).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import select
import signal
from pathlib import Path

import router

from . import state
from .errors import UklaunchError

HOST_RUN = Path("/run/.host")
GONE_S = 5

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000

# /run as it is, but for what `ip netns` keeps there: in its own place, which no user could make on the host. Any
# directory serves to put it together, for the mount namespace is ours alone.
_SET_UP = """
set -e
mount -n -t tmpfs -o mode=0755,nosuid,nodev tmpfs /tmp
mkdir /tmp/.host /tmp/netns
mount -n --rbind /run /tmp/.host
for name in $(ls -A /run); do
    [ "$name" = netns ] || ln -s ".host/$name" "/tmp/$name"
done
mount -n --move /tmp /run
ip link set lo up
echo ready
exec sleep infinity >/dev/null 2>&1
"""

_users_fd = -1


def is_active() -> bool:
    """Is this process in a user namespace with one single user, who is root there?"""
    return [line.split()[0::2] for line in Path("/proc/self/uid_map").read_text().splitlines()] == [["0", "1"]]


def enter() -> None:
    """Be root in the user's namespaces from here to the end of this process; made now if they are not there.

    For a process of one thread. Raises UklaunchError.
    """
    uid = os.getuid()
    check_runtime_directory()
    os.environ["UKLAUNCH_STATE"] = str(state.root())  # for root's is elsewhere, and root is what we become
    atexit.register(leave)
    _come()
    router.select(uid, HOST_RUN)


def check_runtime_directory() -> None:
    """Raises UklaunchError if this user has none that is his."""
    if "UKLAUNCH_STATE" in os.environ:
        return
    path = state.root().parent
    try:
        why = "" if path.stat().st_uid == os.getuid() else "is another user's"
    except OSError as exc:
        why = exc.strerror or str(exc)
    if why:
        raise UklaunchError(
            f"no directory for what is remembered of guests: {path}: {why}",
            "log in as this user, or as root: loginctl enable-linger USER; or set XDG_RUNTIME_DIR",
        )


def leave() -> None:
    """What the last to leave does: end the holder, unless pods are left. Idempotent; called once by each process."""
    global _users_fd
    if _users_fd < 0:
        return
    os.close(_users_fd)  # and open it anew: processes that we have forked share that one
    _users_fd = -1
    with contextlib.suppress(OSError, UklaunchError), _file("users").open("rb") as users:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if state.pods() or (pidfd := _holder()) is None:
            return
        try:
            _kill(pidfd)
            _file("holder").unlink()
            _end_pasta()
        finally:
            os.close(pidfd)


def _kill(pidfd: int) -> None:
    """Neither the holder nor pasta has anything to tidy up."""
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [], GONE_S)


def _file(name: str) -> Path:
    return state.root() / "rootless" / name


def _come() -> None:
    import ctypes

    global _users_fd
    try:
        _file("users").parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _users_fd = os.open(_file("users"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(_users_fd, fcntl.LOCK_SH)
    except OSError as exc:
        raise state.state_error(_file("users"), exc) from exc
    pidfd = _holder()
    if pidfd is None:
        with state.lock(_file("making")):
            if (pidfd := _holder()) is None:
                _make_holder()
                pidfd = _holder()
    if pidfd is None:
        raise UklaunchError("the holder of this user's namespaces was killed", "try again")
    here = Path.cwd()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(pidfd, _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET) != 0:
            why = os.strerror(ctypes.get_errno())
            raise UklaunchError(f"cannot enter this user's namespaces: {why}", "use Linux 5.8 or newer")
    finally:
        os.close(pidfd)
    os.chdir(here)  # setns(2) has put us into /


def _holder() -> int | None:
    """A handle on the living holder; it holds its lock for as long as it lives, so its pid cannot be another's."""
    try:
        pidfd = os.pidfd_open(int(_file("holder").read_text()))
    except (OSError, ValueError):
        return None
    if state.is_held(_file("holder")):
        return pidfd
    os.close(pidfd)
    return None


def _make_holder() -> None:
    import subprocess

    _end_pasta()  # a killed holder's
    fd = os.open(_file("holder"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        made = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "--net", "--propagation", "slave", "sh", "-c", _SET_UP],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[fd],
            start_new_session=True,  # a Ctrl-C on our terminal is for us alone
            cwd="/",
        )
        assert made.stdout is not None
        assert made.stderr is not None
        with made.stdout, made.stderr:
            if made.stdout.readline() != b"ready\n":
                said = made.stderr.read().decode(errors="replace").strip().splitlines()
                made.wait()
                raise UklaunchError(
                    f"cannot make a user namespace: {said[-1] if said else 'it died without a word'}", _remedy()
                )
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(made.pid).encode(), 0)
        _start_pasta(made.pid)
        made.returncode = 0  # not ours to wait for
    except FileNotFoundError:
        raise UklaunchError("the command unshare is missing", "apt-get install util-linux") from None
    finally:
        os.close(fd)


def _remedy() -> str:
    """Why a kernel, Debian's or another, refuses namespaces to users."""
    for name, forbids, wanted in (
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user.max_user_namespaces", "0", "10000"),
    ):
        with contextlib.suppress(OSError):
            if (Path("/proc/sys") / name.replace(".", "/")).read_text().strip() == forbids:
                return f"ask the administrator for it: sudo sysctl {name}={wanted}"
    return "in a container: give it user namespaces, or root"


def _start_pasta(pid: int) -> None:
    """Returns when the network is there. Without pasta, or a host that is connected, there is none."""
    import subprocess

    # No port leads in or out by itself, and the gateway's address is the gateway's, not the host's localhost.
    closed = ["-t", "none", "-u", "none", "-T", "none", "-U", "none", "--no-map-gw"]
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(
            ["pasta", "--config-net", *closed, "--pid", str(_file("pasta")), str(pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )


def _end_pasta() -> None:
    """Idempotent. Debian 12's does not notice that the namespace has gone."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(_file("pasta").read_text())
        pidfd = os.pidfd_open(pid)
        try:
            if Path(f"/proc/{pid}/comm").read_text().startswith(("pasta", "passt")):  # one program, two names
                _kill(pidfd)
        finally:
            os.close(pidfd)
    _file("pasta").unlink(missing_ok=True)
