"""Guests and pods from outside their supervisor: stop, remove, and clean up after the dead.

Imports neither trio nor pyroute2 before there is something to clean up: `uklaunch stop` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cgroup, events, state
from .errors import UklaunchError, UsageError

RELOAD_TIMEOUT_S = 30.0
_NOT_LET_RUN = ("starting", "restarting")


@contextlib.contextmanager
def _pidfd(pid: int, lock: Path) -> Iterator[int | None]:
    """A handle on the process if it holds the lock, else None: the pid, or the lock, may be another's by now."""
    with contextlib.ExitStack() as stack:
        yield state.holder(pid, lock, stack)


def _ends_within(pidfd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def stop(record: state.GuestRecord, timeout_s: float | None = None) -> None:
    """Ask the guest's supervisor to stop it, and wait until both are gone.

    After `timeout_s` (None: what it was started with) the guest gets no more time to power down. A guest that does
    not run is no error, and one without a supervisor gets one for that. Raises UklaunchError if it does not obey.
    """
    with _pidfd(record.supervisor_pid, record.directory / "supervisor.lock") as pidfd:
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            if timeout_s is not None and not _ends_within(pidfd, timeout_s):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)  # once more: make haste
            if not _ends_within(pidfd, 60):
                raise UklaunchError(
                    f"the supervisor of {record.pod}/{record.name} (pid {record.supervisor_pid}) does not end",
                    f"kill -9 {record.supervisor_pid}, then: uklaunch gc --kill",
                )
            return
    if unsupervised(record):
        from . import foreground

        with contextlib.suppress(UklaunchError):  # it cannot be taken over: then it is killed
            foreground.stop_left_behind(record, timeout_s)
    kill_vmm(record)
    _bury(record)


def reload(record: state.GuestRecord) -> None:
    """Have the guest's supervisor start anew, from the code that is installed now, and wait until it has.

    Raises UsageError if the guest has none, UklaunchError if it does not come back.
    """
    name = f"{record.pod}/{record.name}"
    with _pidfd(record.supervisor_pid, record.directory / "supervisor.lock") as pidfd, events.watching() as news:
        if pidfd is None:
            raise UsageError(f"guest {name} has no supervisor", f"take it over: uklaunch supervise -d {name}")
        asked_at = time.time()
        signal.pidfd_send_signal(pidfd, signal.SIGHUP)
        poller = select.poll()
        for fd in (pidfd, news):
            poller.register(fd, select.POLLIN)
        deadline = time.monotonic() + RELOAD_TIMEOUT_S
        while time.monotonic() < deadline and poller.poll((deadline - time.monotonic()) * 1000):
            if _ends_within(pidfd, 0):
                raise UklaunchError(
                    f"the supervisor of {name} has ended", f"see: uklaunch ps -a; {record.supervisor_log}"
                )
            with contextlib.suppress(BlockingIOError):
                os.read(news, 1 << 16)
            if any(
                event.what == "taken over" and (event.pod, event.guest) == (record.pod, record.name)
                for event in events.read()
                if event.time >= asked_at - 0.001
            ):
                return
    raise UklaunchError(f"the supervisor of {name} did not start anew", f"see {record.supervisor_log}")


def unsupervised(record: state.GuestRecord) -> bool:
    """Does the VMM run on without its supervisor? In this order: a supervisor's lock is taken before its VMM's."""
    return state.vmm_runs(record) and not state.supervised(record)


def left_behind(pod: str, name: str) -> bool:
    """Is there such a guest, running without a supervisor, to be taken over? One that was never let run is ended."""
    record = state.read_guest(pod, name)
    if record is None or not unsupervised(record):
        return False
    record = state.read_guest(pod, name) or record  # what its supervisor wrote last
    if record.status not in _NOT_LET_RUN:
        return True
    kill_vmm(record)
    return False


def kill_vmm(record: state.GuestRecord) -> None:
    """End a VMM that nobody supervises, also one whose pid nobody had the time to put down."""
    with state.pod_lock(record.pod):  # or the next supervisor of that name holds the VMM's lock too
        if unsupervised(record):
            lock = record.directory / "vmm.lock"
            with state.holders(lock) as pidfds:
                for pidfd in pidfds:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                for pidfd in pidfds:
                    _ends_within(pidfd, 10)
            state.released_within(lock, 10)


def remove(record: state.GuestRecord, *, force: bool = False) -> None:
    """Forget an ended guest and its console. Raises UsageError if it runs, unless `force`, which stops it."""
    if state.alive(record):
        if not force:
            name = f"{record.pod}/{record.name}"
            raise UsageError(f"guest {name} is running", f"stop it first, or: uklaunch rm --force {name}")
        stop(record)
    _bury(record)
    with state.pod_lock(record.pod):
        if not state.alive(record):  # else another run has taken the name meanwhile: that guest is not the one meant
            state.forget_guest(record.pod, record.name)
            events.note("removed", record.pod, record.name)


def remove_pod(name: str, *, force: bool = False) -> None:
    """Remove a pod. Raises UsageError if guests of it run, unless `force`, which stops them."""
    from . import pod

    if force:
        for record in pod.running_guests(name):
            stop(record)
        if state.read_pod(name) is None:
            return  # it went with its last guest
    pod.delete(name)


def _bury(record: state.GuestRecord) -> None:
    """Put down how a guest ended whose supervisor died before it could."""
    from .errors import ExitCode

    with state.pod_lock(record.pod):
        current = state.read_guest(record.pod, record.name)
        if current is None or current.exited_at is not None or state.alive(current):
            return
        state.update_guest(
            current,
            status="exited",
            reason="supervisor died",
            exit_code=int(ExitCode.OURS),
            exited_at=time.time(),
            health=None,
            vmm_pid=0,
        )
        _remove_cgroup(current)
    events.note("stopped", record.pod, record.name, exit_code=int(ExitCode.OURS), reason="supervisor died")
    from . import pod

    pod.forget_dead_guests(record.pod)
    pod.delete_if_abandoned(record.pod)


def _remove_cgroup(record: state.GuestRecord) -> bool:
    left = cgroup.existing(record.cgroup)
    return left is not None and cgroup.remove(left)


@dataclass(frozen=True, slots=True)
class Collected:
    """One thing that `collect` did, or saw and left."""

    what: str
    name: str
    action: str


def collect(*, kill: bool = False) -> Iterator[Collected]:
    """Clean up after supervisors that died and launches that were cut off. Idempotent; touches only what is ours.

    A guest that runs without a supervisor is reported, and ended only if `kill`, or if it has yet to run. All is tried,
    also when a part of it fails, which is raised at the end.
    """
    failures = []
    for step in _collecting(kill):
        try:
            yield from step
        except UklaunchError as exc:  # no reason not to do the rest
            failures.append(exc)
    if failures:
        raise failures[0]


def _collecting(kill: bool) -> Iterator[Iterator[Collected]]:
    for pod, guest in state.guest_names():
        yield _collect_guest(pod, guest, kill=kill)
    for record in state.pods():
        yield _collect_pod(record.name)
    for pod, guest in state.guest_names():
        yield _collect_half_made(pod, guest)
    state.forget_unknown_pods()
    yield _collect_uplinks()
    yield _collect_router()
    yield _make_room()


def _make_room() -> Iterator[Collected]:
    try:
        if (made := cgroup.make_room()) is not None:
            yield Collected("cgroup", str(made), "its supervisor had died; open to the next")
    except OSError as exc:
        raise UklaunchError(f"{exc.filename}: {exc.strerror}") from exc


def _collect_guest(pod: str, guest: str, *, kill: bool) -> Iterator[Collected]:
    name = f"{pod}/{guest}"
    record = state.read_guest(pod, guest)
    if record is None or state.supervised(record):
        return
    if unsupervised(record):
        record = state.read_guest(pod, guest) or record  # what its supervisor wrote last
        if not kill and record.status not in _NOT_LET_RUN:
            left = f"runs without a supervisor; left (supervise {name} takes it over, gc --kill ends it)"
            yield Collected("guest", name, left)
            return
        kill_vmm(record)
        yield Collected("guest", name, "ran without a supervisor; ended")
    if record.exited_at is None:
        _bury(record)
        if record.remove_when_done or record.status == "starting":
            _forget_dead(pod, guest)
            yield Collected("guest", name, "its supervisor had died; removed")
        else:
            yield Collected("guest", name, "its supervisor had died; recorded as ended")
    elif _remove_cgroup(record):
        yield Collected("cgroup", record.cgroup, "its guest had ended; removed")


def _forget_dead(pod: str, guest: str) -> bool:
    """Remove what is kept of a guest unless it lives. Returns whether there was anything to remove."""
    directory = state.guest_dir(pod, guest)
    with state.pod_lock(pod):
        if not directory.exists() or any(state.is_held(directory / f"{who}.lock") for who in ("supervisor", "vmm")):
            return False
        state.forget_guest(pod, guest)
        return True


def _collect_pod(name: str) -> Iterator[Collected]:
    import router

    from . import pod

    if pod.delete_if_abandoned(name):
        yield Collected("pod", name, "nobody's any more; removed")
    elif router.is_loaded():  # else the pod is of another version's
        pod.forget_dead_guests(name)


def _collect_half_made(pod: str, guest: str) -> Iterator[Collected]:
    """A guest's directory without a record: a launch that was cut off between the two, or a removal."""
    if state.read_guest(pod, guest) is None and _forget_dead(pod, guest):
        yield Collected("guest", f"{pod}/{guest}", "half made; removed")


def _collect_uplinks() -> Iterator[Collected]:
    from . import pod

    for name in pod.forget_unknown_uplinks():
        yield Collected("uplink", f"of pod {name}", "of no pod; removed")


def _collect_router() -> Iterator[Collected]:
    from . import pod

    for pod_id in pod.forget_unknown_ids():
        yield Collected("router", f"pod id {pod_id}", "of no pod; its rows removed")
    for version in pod.unload_superseded():
        yield Collected("router", version, "superseded, and without pods; unloaded")
