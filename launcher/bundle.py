"""Build the default bundle from Debian's packages: a Linux microVM of a kernel, a few modules, busybox and our init.

The packages are fetched and unpacked, never installed. The bundle is built beside its place and moved there whole.
"""

from __future__ import annotations

import hashlib
import lzma
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UklaunchError
from .guests import cpio
from .guests.hosts import template

KERNEL = "linux-image-cloud-amd64"  # depends on the newest concrete kernel
BUSYBOX = "busybox-static"
# For UDP, which busybox's nc has not: `netcat` in the guest, for busybox takes its own `nc` first.
NETCAT = ("netcat-openbsd", "libbsd0", "libmd0", "libc6")
NETCAT_LIBRARIES = ("libbsd.so.0", "libmd.so.0", "libc.so.6", "libresolv.so.2")
# The drivers of what the VMMs offer, by name; those that a kernel has built in are not found, and not missed.
MODULES = ("virtio_mmio", "virtio_pci", "virtio_net", "virtio_blk", "virtio_rng", "evdev", "button", "pvpanic_pci")
MANIFEST = """\
# The default image of uklaunch: {kernel}
kernel = "vmlinuz"
initrd = "initrd"
family = "linux"
memory = "128M"
"""


def build_default(directory: Path) -> None:
    """Make the bundle there, unless the one there is of the same packages and files. Raises UklaunchError."""
    _update_lists()
    packages = [_concrete_kernel(), BUSYBOX, *NETCAT]
    stamp = hashlib.sha256("\n".join([*_versions(packages), _sources()]).encode()).hexdigest()
    stamp_file = directory / ".stamp"
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=directory.parent) as scratch:
            new = Path(scratch) / "bundle"
            new.mkdir(mode=0o755)
            _build(new, Path(scratch), packages)
            (new / ".stamp").write_text(stamp)
            if directory.exists():
                directory.rename(Path(scratch) / "old")
            new.rename(directory)
    except OSError as exc:
        raise UklaunchError(f"cannot build the default image in {directory}: {exc.strerror}") from exc


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout
    except FileNotFoundError:
        raise UklaunchError(f"the command {command[0]} is missing", "the default image is built on Debian") from None
    except subprocess.CalledProcessError as exc:
        why = (exc.stderr.strip().splitlines() or [str(exc)])[-1]
        raise UklaunchError(f"{' '.join(command[:2])} failed: {why}", "apt-get update", exc.stderr) from exc


def _concrete_kernel() -> str:
    for line in _run("apt-cache", "depends", KERNEL).splitlines():
        relation, _, package = line.strip().partition(": ")
        if relation == "Depends" and package.startswith("linux-image-"):
            return package
    raise UklaunchError(f"Debian's package lists have no kernel for {KERNEL}", "apt-get update")


def _update_lists() -> None:
    """A fresh machine has no package lists, and one that was installed from an image may have lost them."""
    if not _run("apt-cache", "pkgnames", KERNEL):
        _run("apt-get", "update", "-qq")


def _versions(packages: list[str]) -> list[str]:
    """`name version` of each package's candidate."""
    shown = _run("apt-cache", "show", "--no-all-versions", *packages).splitlines()
    return sorted(line for line in shown if line.startswith(("Package:", "Version:", "SHA256:")))


def _sources() -> str:
    return template("linux", "init") + Path(__file__).read_text()


def _build(new: Path, scratch: Path, packages: list[str]) -> None:
    # As root: apt's own user may not write here.
    _run("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *packages, cwd=scratch)
    tree = scratch / "tree"
    for package in sorted(scratch.glob("*.deb")):
        _run("dpkg-deb", "--extract", str(package), str(tree))
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    shutil.copyfile(kernel, new / "vmlinuz")
    (new / "initrd").write_bytes(cpio.archive(_initrd(tree)))
    (new / "uklaunch.toml").write_text(MANIFEST.format(kernel=kernel.name.removeprefix("vmlinuz-")))


def _initrd(tree: Path) -> Iterator[cpio.Entry]:
    """Not compressed: unpacking costs an emulated CPU more than reading does."""
    for name in ("bin", "dev", "etc", "lib", "lib/modules", "lib64", "proc", "root", "run", "sys", "tmp"):
        yield cpio.directory(name)
    yield cpio.character_device("dev/console", 5, 1)  # pid 1's own, before devtmpfs is there
    busybox = _find(tree, "busybox")
    yield cpio.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in _run(str(busybox), "--list").split():
        if applet != "busybox":
            yield cpio.link(f"bin/{applet}", "busybox")
    yield cpio.file("bin/netcat", _find(tree, "nc.openbsd").read_bytes(), 0o755)
    yield cpio.file("lib64/ld-linux-x86-64.so.2", _find(tree, "ld-linux-x86-64.so.2").read_bytes(), 0o755)
    for library in NETCAT_LIBRARIES:
        yield cpio.file(f"lib/{library}", _find(tree, library).read_bytes(), 0o755)
    yield cpio.file("init", template("linux", "init"), 0o755)
    order = []
    for module in _modules(tree):
        name = module.name.removesuffix(".xz")
        data = module.read_bytes()
        yield cpio.file(f"lib/modules/{name}", lzma.decompress(data) if module.suffix == ".xz" else data)
        order.append(f"/lib/modules/{name}\n")
    yield cpio.file("lib/modules/order", "".join(order))


def _find(tree: Path, name: str) -> Path:
    """A program or library of the packages: Debian 12 has some of them outside /usr, Debian 13 none."""
    for directory in ("bin", "lib/x86_64-linux-gnu", "lib64"):
        for path in (tree / directory / name, tree / "usr" / directory / name):
            if path.is_file():
                return path
    raise UklaunchError(f"Debian's packages have no file {name}", "report this: the packages have changed")


def _modules(tree: Path) -> list[Path]:
    """The module files, each behind those that it needs; depmod(8) reads what the modules say of themselves."""
    version = next(path for directory in ("lib", "usr/lib") for path in (tree / directory / "modules").glob("*"))
    root = version.parent.parent.parent
    _run("depmod", "-b", str(root), version.name)
    needs = {}
    for line in (version / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    names = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    ordered: dict[str, None] = {}
    for name in MODULES:
        if name in names:
            # modules.dep lists what is needed nearest first
            for path in (*reversed(needs[names[name]]), names[name]):
                ordered.setdefault(path)
    return [version / path for path in ordered]
