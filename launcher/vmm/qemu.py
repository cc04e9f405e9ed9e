"""QEMU: from a `Boot` to its argument list, its process and its QMP session.

QEMU gets every descriptor ready-made (TAP, QMP and console sockets, image files) and so needs nothing: it runs
in a sandbox (see there), under seccomp. It starts paused, so that it can load while the pod is being made.

A kernel's command line may hold its guest's environment, and arguments are for all to read in /proc: so it is told by
QMP, before the board is made (`--preconfig`; the machine's property `append` is what `-append` sets). Not by
`-readconfig`: that takes lines of up to 1,023 bytes, and no quotes.

Sources: qemu-system-x86_64(1), docs/system/i386/microvm.rst, docs/interop/qmp-spec.rst, qapi/misc.json (`qom-set` and
`x-exit-preconfig` were tried with QEMU 7.2 and 10.0).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import trio

from ..errors import UklaunchError, UsageError
from ..limits import UNLIMITED, Limits
from ..model import DEFAULT_MTU, Accel, Boot, Machine, format_mac
from ..timeline import mark
from . import qmp, sandbox
from .accel import KVM
from .files import DiskFds, Fds, Opened, missing, open_fds

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

BINARY = "qemu-system-x86_64"
TCG_CACHE_MIB = 128  # of translated code; QEMU's own default is 1 GiB, or an eighth of the host's memory
STDERR_LINES_KEPT, STDERR_LINE_LIMIT = 20, 300
QMP_TIMEOUT_S = 30
QMP_SOCKET, CONSOLE_SOCKET = "qmp.sock", "console.sock"
WAITED = b".sock,server=on"  # at the end of what QEMU says of each connection that it waits for: we are there
LAST_WORDS_S = 1  # for what a VMM says on its way out
CONSOLE_POLL_S = 0.05
COM1_IER = 0x3F9  # the Interrupt Enable Register of a 16550, whose reading changes nothing
IER_RECEIVED, IER_ALL = 0x1, 0xF

MACHINES = {
    Machine.MICROVM: "microvm,acpi=on,pcie=off,rtc=on,pit=on,pic=on,isa-serial=on,usb=off,graphics=off",
    # Not graphics=off: that makes the firmware draw on the serial console.
    Machine.PC: "pc,usb=off,smbus=off,vmport=off",
    Machine.Q35: "q35,usb=off,smbus=off,sata=off,vmport=off",
}


def arguments(boot: Boot, machine: Machine, accel: Accel, fds: Fds, limits: Limits = UNLIMITED) -> list[str]:
    """QEMU's argument list."""
    bus = "device" if machine is Machine.MICROVM else "pci"
    csum = "" if boot.guest_csum else ",guest_csum=off"
    mtu = "" if boot.nic.mtu == DEFAULT_MTU else f",host_mtu={boot.nic.mtu}"
    args = [
        *("-machine", MACHINES[machine]),
        *("-accel", "kvm" if accel is Accel.KVM else f"tcg,thread=multi,tb-size={TCG_CACHE_MIB}"),
        *("-cpu", "host" if accel is Accel.KVM else "max"),
        *("-m", f"{boot.memory_mib}M"),
        *("-smp", str(boot.cpus)),
        "-nodefaults",  # only the devices named here
        "-no-user-config",
        *("-display", "none"),
        "-no-reboot",  # a guest that resets ends; starting it again is the supervisor's decision
        "-S",  # paused, until the pod is made
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        # Both listen: a supervisor that comes after one that died finds its way in. We are there already, and let in
        # first: else QEMU's main loop and its monitor's thread may both do so, and once in 1,000 starts none answers.
        *("-chardev", f"socket,id=qmp,fd={fds.qmp},server=on,wait=on"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={fds.console},server=on,wait=on"),
        *("-serial", "chardev:console"),
        *("-netdev", f"tap,id=net0,fd={fds.tap}"),
        *(
            "-device",
            f"virtio-net-{bus},netdev=net0,mac={format_mac(boot.nic.mac)}{csum}{mtu}"
            + (",romfile=" if bus == "pci" else ""),  # no network boot
        ),
        *("-device", f"virtio-rng-{bus}"),
    ]
    if machine is Machine.MICROVM:
        args += ["-global", "virtio-mmio.force-legacy=off"]
    # QEMU opens these by name: /proc/self/fd opens what the descriptor is, whatever is at its path by now.
    if fds.kernel is not None:
        args += ["-kernel", f"/proc/self/fd/{fds.kernel}", "--preconfig"]  # its command line: see `connect`
    if fds.initrd is not None:
        args += ["-initrd", f"/proc/self/fd/{fds.initrd}"]
    throttled = limits.disk_bytes is not None or limits.disk_iops is not None
    if throttled:
        args += _throttle_arguments(limits)
    for number, disk in enumerate(fds.disks):
        args += _disk_arguments(number, disk, bus, boots=boot.kernel is None and number == 0, throttled=throttled)
    if boot.tells_panics and bus == "pci":
        args += ["-device", "pvpanic-pci"]
    if boot.watchdog:
        args += ["-device", "i6300esb", "-action", "watchdog=reset"]
    return args


def _throttle_arguments(limits: Limits) -> Iterator[str]:
    """One bucket for all disks, read and written, that holds a tenth of a second's worth: docs/throttle.txt."""
    wanted = {"bps-total": limits.disk_bytes, "iops-total": limits.disk_iops}
    rates = {key: rate for key, rate in wanted.items() if rate is not None}
    yield from ("-object", json.dumps({"qom-type": "throttle-group", "id": "disks", "limits": rates}))


def _disk_arguments(number: int, disk: DiskFds, bus: str, *, boots: bool, throttled: bool) -> Iterator[str]:
    def blockdev(**options: Any) -> tuple[str, str]:
        return "-blockdev", json.dumps({key.replace("_", "-"): value for key, value in options.items()})

    def file_node(name: str, fd: int, fdset: int, *, read_only: bool) -> Iterator[str]:
        yield from ("-add-fd", f"fd={fd},set={fdset}")
        yield from blockdev(
            driver="file",
            node_name=name,
            filename=f"/dev/fdset/{fdset}",
            read_only=read_only,
            locking="off",  # two guests may run from one image
        )

    top = f"disk{number}"
    base = top if disk.overlay is None else f"{top}-base"
    yield from file_node(f"{base}-file", disk.base, 2 * number + 1, read_only=True)
    whole = {"driver": "qcow2", "backing": None} if disk.qcow2 else {"driver": "raw"}  # whatever its header says
    yield from blockdev(**whole, node_name=base, file=f"{base}-file", read_only=True)
    if disk.overlay is not None:
        yield from file_node(f"{top}-file", disk.overlay, 2 * number + 2, read_only=False)
        yield from blockdev(driver="qcow2", node_name=top, file=f"{top}-file", backing=base)
    if throttled:
        yield from blockdev(driver="throttle", node_name=f"{top}-rate", throttle_group="disks", file=top)
        top = f"{top}-rate"
    yield from ("-device", f"virtio-blk-{bus},drive={top}" + (",bootindex=0" if boots else ""))


# --- the process ---


class Process(Protocol):
    """What is asked of a process: of `sandbox.Process`, and of one that was started by another."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int: ...
    def kill(self) -> None: ...


class AdoptedProcess:
    """A process that a supervisor before us has started. `pidfd` is borrowed."""

    UNKNOWN = 255  # the exit code of what is not our child: init's to know. QEMU's own are 0 and 1

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._waiting = trio.Lock()  # one task at a time may wait for a descriptor

    async def wait(self) -> int:
        async with self._waiting:
            await trio.lowlevel.wait_readable(self._pidfd)
        if self.returncode is None:
            try:
                ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222
            except ChildProcessError:
                ended = None
            if ended is None:
                self.returncode = self.UNKNOWN
            else:
                self.returncode = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


@dataclass
class Vmm:
    """A running QEMU. `console` is a byte stream, both ways."""

    process: Process
    machine: Machine
    console: trio.SocketStream
    command: list[str] = field(default_factory=list)
    adopted: bool = False  # its guest runs already
    ours: bool = True  # to end, when the block ends
    stderr: list[str] = field(default_factory=list)
    stderr_ended: trio.Event = field(default_factory=trio.Event)
    _loop: Any = None  # trio-asyncio's event loop: named, so that any task can give commands
    _client: QMPClient | None = None
    _ending: qmp.Ending | None = None
    _reason: str | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait(self) -> int:
        """QEMU's exit code; negative: the signal that ended it."""
        code = await self.process.wait()
        if code == AdoptedProcess.UNKNOWN and self.adopted:
            return 0 if await self.shutdown_reason() else code  # one that ends in order says so before
        return code

    async def resume(self) -> None:
        """Let the guest run. Raises UklaunchError if QEMU has died."""
        await self._execute("cont")

    async def power_down(self) -> None:
        """Press the power button; the guest may take its time, or ignore it. A dead QEMU is no error."""
        with contextlib.suppress(UklaunchError):
            await self._execute("system_powerdown")

    async def quit(self) -> None:
        """Ask QEMU to end, whatever the guest thinks of it. A dead QEMU is no error."""
        with contextlib.suppress(UklaunchError):
            await self._execute("quit")

    def kill(self) -> None:
        self.process.kill()

    async def status(self) -> str:
        """QEMU's run state, such as `prelaunch` or `running` (qapi/run-state.json)."""
        answer = await self._execute("query-status")
        return str(answer.get("status"))[:40] if isinstance(answer, dict) else ""

    async def console_open(self) -> None:
        """Wait until the guest's driver has its serial port interrupt for what comes in, as it does when it opens it.

        What comes before that is lost: Linux, for one, empties the FIFO then (serial8250_do_startup). QEMU has no event
        for it, so the port is asked. A guest that polls its port never gets there. Raises UklaunchError.
        """
        while True:
            said = await self._execute("human-monitor-command", {"command-line": f"i /xb {COM1_IER:#x}"})
            try:
                enabled = int(str(said)[:100].rpartition("=")[2], 16)
            except ValueError:
                raise UklaunchError("QEMU does not say how its console is") from None
            if enabled & IER_RECEIVED and enabled != IER_ALL:  # all: the driver only looks what kind of port this is
                return
            await trio.sleep(CONSOLE_POLL_S)

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        assert self._client is not None
        async with self._explained(f"QEMU did not do {command!r}"):
            return await self._loop.run_aio_coroutine(self._client.execute(command, arguments))

    async def connect(self, sock: socket.socket, boot: Boot | None) -> None:
        """Wait until QEMU has set itself up, when it has been told its kernel's command line (if `boot` is given: it is
        new). Raises UklaunchError if it cannot."""

        self._client, self._ending = qmp.make_client()
        client = self._client

        async def set_up() -> None:
            await client.connect(sock)
            if boot is not None and boot.kernel is not None:
                await client.execute("qom-set", {"path": "/machine", "property": "append", "value": boot.cmdline})
                await client.execute("x-exit-preconfig")
            await client.execute("query-status")  # the greeting can come before QEMU gives up on, say, a bad CPU model

        async with self._explained("QEMU did not start" if not self.adopted else "QEMU does not answer"):
            await self._loop.run_aio_coroutine(set_up())

    @contextlib.asynccontextmanager
    async def _explained(self, what: str) -> AsyncIterator[None]:
        """A QEMU that dies under a command shows as one of QMP's errors, as EOF, or as both in a group."""
        from qemu.qmp import QMPError

        failure: BaseExceptionGroup | None = None
        try:
            with trio.fail_after(QMP_TIMEOUT_S):
                yield
        except* (QMPError, EOFError, OSError, trio.TooSlowError) as group:
            failure = group
        if failure is not None:
            with trio.move_on_after(LAST_WORDS_S):  # its exit code and last words follow the end of its socket
                await self.process.wait()
                await self.stderr_ended.wait()
            if self.process.returncode is None:
                slow = failure.subgroup(trio.TooSlowError) is not None
                what += f": no answer within {QMP_TIMEOUT_S:g} s" if slow else f": {_said(failure)}"
            raise self.failure(what) from failure

    async def disconnect(self) -> None:
        assert self._client is not None
        from asyncio import CancelledError

        # A dead QEMU is no news here, and one that is alive need not let us go.
        with trio.move_on_after(LAST_WORDS_S, shield=True), contextlib.suppress(Exception, CancelledError):
            await self._loop.run_aio_coroutine(self._client.disconnect())

    async def shutdown_reason(self) -> str:
        """Why QEMU ended: one of `qmp.SHUTDOWN_REASONS`, once it has; "" if it did not say."""
        if self._reason is None:
            self._reason = await self._hear_reason()
        return self._reason

    async def _hear_reason(self) -> str:
        from qemu.qmp import Runstate

        client = self._client
        if client is None or self._ending is None:
            return ""

        async def hung_up() -> None:
            # Asked inside the loop: a change between the question and the wait would be missed.
            while client.runstate == Runstate.RUNNING:
                await client.runstate_changed()

        with trio.move_on_after(LAST_WORDS_S):  # what QEMU wrote last is read, then its end of the socket
            await self._loop.run_aio_coroutine(hung_up())
        return self._ending.reason

    def failure(self, what: str) -> UklaunchError:
        code = self.process.returncode
        known = code is not None and not (self.adopted and code == AdoptedProcess.UNKNOWN)
        state = f", {_end(code)}" if code is not None and known else ""
        why = f": {self.stderr[-1]}" if self.stderr else ""
        detail = "\n".join([*self.stderr, *(["command: " + " ".join(self.command)] if self.command else [])])
        return UklaunchError(f"{what}{state}{why}", "-v shows the command and all it said", detail)


def _said(failure: BaseException) -> str:
    """The innermost error's own words, or its name; it may quote what a hostile VMM has sent."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return _printable(lines[0].encode(errors="replace"))


def _end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else _signal(-code)


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def overhead_mib(accel: Accel, memory_mib: int, cpus: int) -> int:
    """What QEMU may take beside its guest's memory, with room to spare: what takes more than that has gone wrong.

    Measured, a Linux guest at work under TCG: 92 MiB, 60 of them code; half as much before it has done anything.
    """
    own = 128 + 16 * cpus + memory_mib // 32
    return own if accel is not Accel.TCG else own + TCG_CACHE_MIB + memory_mib // 4  # a TLB for each CPU and mode


def pick_machine(boot: Boot, accel: Accel) -> Machine:
    """The best of the guest's boards, but not microvm without KVM.

    Its only other clock is the PIT, against which a guest on a busy host fails to calibrate its CPU ("tsc: Unable to
    calibrate against PIT"); it then hangs, often before it can say so. Nor with a watchdog, which needs PCI.
    """
    with_pci = [machine for machine in boot.machines if machine is not Machine.MICROVM]
    if boot.watchdog and not with_pci:
        raise UsageError("--watchdog: the watchdog is a PCI device, and this guest's board, microvm, has no PCI")
    if accel is Accel.KVM and not boot.watchdog:
        return boot.machines[0]
    return (with_pci or boot.machines)[0]


@contextlib.asynccontextmanager
async def run_qemu(
    boot: Boot,
    *,
    tap_fd: int,
    accel: Accel,
    kvm_group: int | None,
    lock_fd: int,
    directory: Path,
    limits: Limits = UNLIMITED,
    admit: Callable[[int], None] = lambda pid: None,
) -> AsyncIterator[Vmm]:
    """A paused QEMU for the length of a block; killed at its end if it still runs.

    `lock_fd` is inherited: its lock is held while QEMU lives. `directory` is for its sockets, and private. `limits`:
    those of its disks; `admit` is given its pid before it is QEMU. The caller watches `wait()`. Raises UklaunchError if
    QEMU cannot start.
    """
    binary = shutil.which(BINARY)
    if binary is None:
        raise missing(BINARY, "qemu-system-x86")
    machine = pick_machine(boot, accel)
    async with contextlib.AsyncExitStack() as stack:
        with contextlib.ExitStack() as theirs, Opened() as opened:
            qmp, console = (theirs.enter_context(_listening(directory, name)) for name in (QMP_SOCKET, CONSOLE_SOCKET))
            # It will find us waiting.
            qmp_ours, console_ours = (
                stack.enter_context(_dial(directory, name)) for name in (QMP_SOCKET, CONSOLE_SOCKET)
            )
            fds = open_fds(opened, boot, tap_fd, qmp.fileno(), console.fileno())
            command = [binary, *arguments(boot, machine, accel, fds, limits)]
            process = await sandbox.start(
                command,
                fds=[*fds.all(), lock_fd],
                groups=() if kvm_group is None else (kvm_group,),
                devices=(KVM,) if accel is Accel.KVM else (),
                write_limit_bytes=fds.write_limit_bytes,
                admit=admit,
            )
        vmm = Vmm(process, machine, _stream(console_ours), command)
        stack.push_async_callback(_reap, vmm)
        mark("vmm-exec")
        async with _attended(vmm, process.stderr, qmp_ours, boot):
            mark("qmp")
            yield vmm


@contextlib.asynccontextmanager
async def adopt_qemu(
    *, pid: int, pidfd: int, directory: Path, machine: Machine, console_fd: int | None = None
) -> AsyncIterator[Vmm]:
    """A QEMU that a supervisor before us has started, for the length of a block.

    It is left running at the end, until the caller says that it is `ours`.

    `console_fd`: a connection to its console, if one is there already; it is closed at the end. Raises UklaunchError,
    and leaves QEMU as it is, if it does not answer or its guest was never let run.
    """
    async with contextlib.AsyncExitStack() as stack:
        qmp = stack.enter_context(_dial(directory, QMP_SOCKET))
        console = stack.enter_context(
            _dial(directory, CONSOLE_SOCKET) if console_fd is None else socket.socket(fileno=console_fd)
        )
        vmm = Vmm(AdoptedProcess(pid, pidfd), machine, _stream(console), adopted=True, ours=False)
        try:  # its pipe can be opened anew for as long as it has the other end
            stderr = trio.lowlevel.FdStream(os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as exc:
            raise UklaunchError(f"QEMU (pid {pid}) has just ended: {exc.strerror}") from None
        async with _attended(vmm, await stack.enter_async_context(stderr), qmp, None):
            if (status := await vmm.status()) in ("prelaunch", "inmigrate"):
                raise UklaunchError(f"QEMU (pid {pid}) was never let run: it is in state {status!r}")
            try:
                yield vmm
            finally:
                if vmm.ours:
                    await _reap(vmm)


@contextlib.asynccontextmanager
async def _attended(
    vmm: Vmm, stderr: trio.abc.ReceiveStream | None, qmp: socket.socket, boot: Boot | None
) -> AsyncIterator[None]:
    """With what it says collected, and its QMP session begun."""
    assert stderr is not None
    async with contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(_collect_stderr, vmm, stderr)
        from trio_asyncio import open_loop  # while QEMU loads

        vmm._loop = await stack.enter_async_context(open_loop())
        vmm._loop.set_exception_handler(lambda loop, context: None)  # of what was cut short nobody asks for the result
        stack.push_async_callback(vmm.disconnect)
        await vmm.connect(qmp, boot)
        yield
        nursery.cancel_scope.cancel()


async def _reap(vmm: Vmm) -> None:
    with trio.CancelScope(shield=True):
        if vmm.process.returncode is None:
            vmm.kill()
        await vmm.process.wait()


async def _collect_stderr(vmm: Vmm, stderr: trio.abc.ReceiveStream) -> None:
    rest = b""
    async for chunk in stderr:
        *lines, rest = (rest + chunk).split(b"\n")
        vmm.stderr += [_printable(line) for line in lines if line.strip() and not line.endswith(WAITED)]
        del vmm.stderr[:-STDERR_LINES_KEPT]
        rest = rest[-4096:]
    vmm.stderr_ended.set()


# --- its sockets ---


@contextlib.contextmanager
def _short(directory: Path, name: str) -> Iterator[str]:
    """A path of the file that a socket's address has room for: 107 bytes (unix(7))."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def _listening(directory: Path, name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        (directory / name).unlink(missing_ok=True)  # the last run's
        with _short(directory, name) as path:
            sock.bind(path)
        (directory / name).chmod(0o600)  # the directory is private, too
        sock.listen(1)
    except OSError as exc:
        sock.close()
        raise UklaunchError(f"cannot make {directory / name}: {exc.strerror}") from exc
    return sock


def _dial(directory: Path, name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        with _short(directory, name) as path:
            sock.connect(path)
    except OSError as exc:
        sock.close()
        raise UklaunchError(f"cannot reach QEMU at {directory / name}: {exc.strerror}") from exc
    return sock


def _stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def _printable(line: bytes) -> str:
    """Not more of it than a person reads, and nothing that a terminal would obey."""
    text = line[: 4 * STDERR_LINE_LIMIT].decode(errors="replace").strip()[:STDERR_LINE_LIMIT]
    return "".join(letter if letter.isprintable() else "?" for letter in text)
