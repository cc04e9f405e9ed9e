"""What this machine offers, need by need, each with its remedy. Looks, and changes nothing that lasts."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import cgroup, net, rootless
from .errors import UklaunchError
from .vmm.accel import kvm_status

CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_BPF": 39}  # include/uapi/linux/capability.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`required`: uklaunch cannot run a guest without it."""

    need: str
    ok: bool
    found: str
    remedy: str = ""
    required: bool = True


def examine() -> list[Finding]:
    """Every need, in the order in which it stops a launch."""
    if os.geteuid() != 0:
        return _examine_rootless()
    checks: tuple[Callable[[], Finding], ...] = (
        _privileges,
        _kernel,
        _tun,
        _bpffs,
        _bcc,
        _headers,
        _router,
        _ip,
        _nftables,
        _sandbox,
        _qemu,
        _qemu_img,
        _kvm,
        _cgroup,
        _runtime,
        _dumpcap,
    )
    return [check() for check in checks]


def _examine_rootless() -> list[Finding]:
    """What a user has without root: looked at from inside, in namespaces of his own."""
    anywhere = [_kernel(oldest=(5, 19)), _tun(), _ip(), _nftables(), _qemu(), _qemu_img(), _kvm()]
    try:
        rootless.enter()
    except UklaunchError as exc:
        return [Finding(need="namespaces", ok=False, found=exc.message, remedy=exc.hint), *anywhere]
    own = Finding(need="namespaces", ok=True, found="a user may make his own")
    return [own, *anywhere, _router(), _sandbox(), _way_out()]


def _way_out() -> Finding:
    joined = net.find_uplink(Path("/proc/self/ns/net"))[0] != ""
    return Finding(
        need="pasta",
        ok=joined,
        found="joins pods to the host's network" if joined else "pods have no way out",
        remedy="connect the host" if shutil.which("pasta") else "apt-get install passt",
        required=False,
    )


def _privileges() -> Finding:
    status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    missing = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    return Finding(
        need="root",
        ok=not missing,
        found=f"without {', '.join(missing)}" if missing else "with the capabilities needed",
        remedy="give them to the container or service that uklaunch runs in",
    )


def _kernel(oldest: tuple[int, int] = (5, 10)) -> Finding:
    release = platform.release()
    major, minor = (int(part) for part in release.split(".")[:2])
    remedy = "use Linux {}.{} or newer".format(*oldest)
    return Finding(need="kernel", ok=(major, minor) >= oldest, found=release, remedy=remedy)


def _tun() -> Finding:
    device = Path("/dev/net/tun")
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        remedy = "load it: modprobe tun" if isinstance(exc, FileNotFoundError) else "let root open it"
        return Finding(need=str(device), ok=False, found=str(exc.strerror), remedy=remedy)
    return Finding(need=str(device), ok=True, found="opens")


def _bpffs() -> Finding:
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    mounted = any(line.split()[1:3] == ["/sys/fs/bpf", "bpf"] for line in mounts)
    return Finding(
        need="bpffs",
        ok=mounted,
        found="mounted at /sys/fs/bpf" if mounted else "not mounted",
        remedy="mount -t bpf bpf /sys/fs/bpf",
    )


def _bcc() -> Finding:
    found = importlib.util.find_spec("bcc") is not None
    return Finding(
        need="bcc",
        ok=found,
        found="importable" if found else f"not importable from {sys.executable}",
        remedy="apt-get install python3-bpfcc; use a venv of /usr/bin/python3 with --system-site-packages",
    )


def _headers() -> Finding:
    """bcc wants a kernel tree; ours is a shim over the C library's own kernel headers."""
    found = Path("/usr/include/linux/bpf.h").exists()
    return Finding(
        need="kernel headers",
        ok=found,
        found="our shim over /usr/include/linux (no linux-headers package needed)" if found else "none",
        remedy="apt-get install linux-libc-dev",
    )


def _router() -> Finding:
    """The proof that the kernel has the BPF features: it takes the router."""
    import router

    try:
        loaded = router.is_loaded()
        with router.open_router():
            pass
    except router.RouterError as exc:
        return Finding(need="BPF router", ok=False, found=exc.message, remedy=exc.hint)
    return Finding(need="BPF router", ok=True, found="is loaded" if loaded else "the kernel took it")


def _ip() -> Finding:
    return _command("ip", "iproute2", ["-V"])


def _nftables() -> Finding:
    found = importlib.util.find_spec("nftables") is not None
    return Finding(
        need="nftables",
        ok=found,
        found="its Python binding is importable" if found else "no Python binding (pods need --uplink none)",
        remedy="apt-get install python3-nftables",
        required=False,
    )


def _sandbox() -> Finding:
    """The proof that a VMM can be confined: something is."""
    from .vmm import sandbox

    try:
        with sandbox.spawn(["/usr/bin/true"], stderr=subprocess.PIPE) as process:
            said = process.communicate(timeout=10)[1].decode(errors="replace").strip()
    except UklaunchError as exc:
        return Finding(need="sandbox", ok=False, found=exc.message, remedy=exc.hint)
    if process.returncode != 0:
        found = said or f"exit code {process.returncode}"
        return Finding(need="sandbox", ok=False, found=found, remedy=sandbox.NEEDS)
    return Finding(need="sandbox", ok=True, found="a VMM gets namespaces, an empty root and a uid of its own")


def _qemu() -> Finding:
    return _command("qemu-system-x86_64", "qemu-system-x86", ["--version"])


def _qemu_img() -> Finding:
    return _command("qemu-img", "qemu-utils", ["--version"], required=False)


def _command(command: str, package: str, version: list[str], *, required: bool = True) -> Finding:
    path = shutil.which(command)
    if path is None:
        return Finding(need=command, ok=False, found="missing", remedy=f"apt-get install {package}", required=required)
    said = subprocess.run([path, *version], capture_output=True, text=True, check=False).stdout
    return Finding(need=command, ok=True, found=(said.splitlines() or [path])[0], required=required)


def _kvm() -> Finding:
    status = kvm_status()
    return Finding(
        need="KVM",
        ok=status.usable,
        found="hardware virtualisation" if status.usable else f"{status.why}; guests run slowly, by TCG",
        remedy=status.remedy,
        required=False,
    )


def _cgroup() -> Finding:
    try:
        home = cgroup.find_home()
    except OSError as exc:
        home, found = None, str(exc.strerror)
    else:
        found = "not mounted"
    if home is not None:
        missing = [name for name in cgroup.CONTROLLERS if name not in home.controllers]
        found = f"{home.path}, without {', '.join(missing)}" if missing else str(home.path)
    return Finding(
        need="cgroup v2",
        ok=home is not None and not missing,
        found=f"{found}: QEMU runs without those limits" if home is None or missing else found,
        remedy=cgroup.HINT.partition(", or leave")[0],
        required=False,
    )


def _runtime() -> Finding:
    found = [name for name in ("runc", "crun") if shutil.which(name)]
    return Finding(
        need="runc or crun",
        ok=bool(found),
        found=", ".join(found) or "neither (only the demo needs one)",
        remedy="apt-get install runc",
        required=False,
    )


def _dumpcap() -> Finding:
    return _command("dumpcap", "wireshark-common", ["--version"], required=False)
