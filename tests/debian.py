"""A Debian userland from packages, for the tests: `python -m tests.debian` builds it once, `make setup-test` asks.

The same tree is the root of a guest (an ext4 disk, booted by the default image's kernel and init) and of a container
(read-only), so nothing is installed on the machine, and both ends have the same programs. What packages, and from
where, apt decides by the machine's own configuration; they are unpacked, never configured.

    /var/lib/uklaunch/test-debian/   uklaunch.toml, disk.ext4: the guest    tree/: the container    .stamp
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from launcher.arguments import DEFAULT_BUNDLE

BUNDLE = Path("/var/lib/uklaunch/test-debian")
TREE = BUNDLE / "tree"
PACKAGES = (
    *("dash", "coreutils", "procps"),
    *("redis-server", "redis-tools"),
    "postgresql",
    *("dnsmasq-base", "bind9-dnsutils"),
    *("openssh-server", "openssh-client"),
    *("nghttp2-client", "nghttp2-server", "python3-grpcio"),
    *("iperf3", "curl"),
)
# They depend on these, but do without them here: PostgreSQL's JIT, and what configures packages.
UNUSED = ("libllvm", "libz3-", "perl", "libperl", "locales", "libc-l10n", "dpkg", "adduser", "debconf", "ucf", "gcc-")
EXCLUDED = ("doc", "man", "info", "locale", "i18n", "lintian", "bash-completion", "icons", "bug", "postgresql-common")
DISK_SPARE_MIB = 96  # what the guest may write, next to its files

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
sshd:x:100:65534::/run/sshd:/usr/sbin/nologin
postgres:x:101:101::/tmp:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
GROUP = """\
root:x:0:
tty:x:5:
postgres:x:101:
nogroup:x:65534:
"""
SSHD_CONFIG = """\
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
UsePAM no
UseDNS no
MaxSessions 100
Subsystem sftp internal-sftp
"""
SSH_CONFIG = """\
IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
# The guest's part of the boot, behind our init: from the initramfs to Debian on the disk, and there sshd.
ENTER = (
    "mkdir /debian && mount -t ext4 -o noatime /dev/vda /debian && cp /etc/hosts /etc/hostname /debian/etc && "
    "for path in proc sys dev dev/pts run; do mount --bind /$path /debian/$path; done && "
    "for path in tmp dev/shm; do mount -t tmpfs tmpfs /debian/$path; done && "
    "mkdir /run/sshd && exec chroot /debian /usr/sbin/sshd -D -e"
)
MANIFEST = f"""\
# Debian's programs on the default image's kernel: for uklaunch's own tests.
kernel = "{DEFAULT_BUNDLE}/vmlinuz"
initrd = "{DEFAULT_BUNDLE}/initrd"
disks = ["disk.ext4"]
family = "linux"
memory = "512M"
cmdline = "{ENTER}"
"""


def build() -> None:
    """Make BUNDLE, unless the one there is of the same packages and recipe. Needs root, as the tests do."""
    stamp_file = BUNDLE / ".stamp"
    if stamp_file.exists() and stamp_file.read_text() == _stamp(_resolve()):
        return
    _run("apt-get", "update", "-qq")  # old lists name packages that are gone
    packages = _resolve()
    BUNDLE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=BUNDLE.parent) as scratch:
        new = Path(scratch) / "bundle"
        new.mkdir(mode=0o700)  # set-user-id programs that nobody keeps up to date are in the tree
        _unpack(packages, Path(scratch), new / "tree")
        _configure(new / "tree")
        _disk(new / "tree", new / "disk.ext4")
        (new / "uklaunch.toml").write_text(MANIFEST)
        (new / ".stamp").write_text(_stamp(packages))
        if BUNDLE.exists():
            BUNDLE.rename(Path(scratch) / "old")
        new.rename(BUNDLE)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=cwd).stdout


def _resolve() -> list[str]:
    """`name=version` of all that a machine without any package would install for PACKAGES, but for UNUSED."""
    with tempfile.NamedTemporaryFile() as nothing:
        planned = _run(
            *("apt-get", "install", "--simulate", "--no-install-recommends", "-qq"),
            *("-o", f"Dir::State::status={nothing.name}", *PACKAGES),
        )
    # Inst libc6 (2.36-9+deb12u14 Debian:12.14/oldstable [amd64])
    words = [line.split() for line in planned.splitlines() if line.startswith("Inst ")]
    return sorted(f"{word[1]}={word[2].lstrip('(')}" for word in words if not word[1].startswith(UNUSED))


def _stamp(packages: list[str]) -> str:
    return hashlib.sha256("\n".join([*packages, Path(__file__).read_text()]).encode()).hexdigest()


def _unpack(packages: list[str], scratch: Path, tree: Path) -> None:
    # As root: apt's own user may not write here.
    _run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *packages, cwd=scratch)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    excluded = [f"--exclude=./usr/share/{name}" for name in EXCLUDED]
    for package in sorted(scratch.glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as content:
            subprocess.run(
                ["tar", "--extract", "--keep-directory-symlink", "--directory", tree, *excluded],
                stdin=content.stdout,
                check=True,
            )
        assert content.returncode == 0, package


def _configure(tree: Path) -> None:
    for directory in ("dev/shm", "etc", "proc", "root", "run", "sys", "tmp", "var/tmp"):
        (tree / directory).mkdir(parents=True, exist_ok=True)
    (tree / "tmp").chmod(0o1777)  # a runtime's tmpfs there takes the mode over
    _run("mknod", "-m", "666", tree / "dev/null", "c", "1", "3")  # ssh-keygen wants it
    etc = tree / "etc"
    (etc / "passwd").write_text(PASSWD)
    (etc / "group").write_text(GROUP)
    (etc / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")  # a container's; a guest has its own
    (etc / "host.conf").write_text("multi on\n")  # as Debian's: else the first line for a name is all there is of it
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    (etc / "ssh/sshd_config").write_text(SSHD_CONFIG)
    (etc / "ssh/ssh_config").write_text(SSH_CONFIG)
    _run("chroot", tree, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", "/etc/ssh/key")
    _run("chroot", tree, "ldconfig")
    for program in (tree / "usr/lib/postgresql").glob("*/bin/*"):  # whatever its version
        link = tree / "usr/bin" / program.name
        link.unlink(missing_ok=True)  # a wrapper in Perl
        link.symlink_to(f"/{program.relative_to(tree)}")
    # Now and once, for an emulated CPU takes long over it.
    initdb = f"chroot --userspec=postgres:postgres {tree} initdb -N -A reject --wal-segsize=1 /tmp/postgres"
    _run("unshare", "--mount", "sh", "-ec", f"mount -t tmpfs -o mode=1777 tmpfs {tree}/dev/shm; {initdb}")
    (tree / "tmp/postgres").rename(tree / "var/lib/postgresql/data")


def _disk(tree: Path, image: Path) -> None:
    size_mib = int(_run("du", "--summarize", "--block-size=1M", tree).split()[0]) + DISK_SPARE_MIB
    mke2fs = shutil.which("mke2fs", path="/usr/sbin:/sbin") or "mke2fs"
    # No journal, no reserve: the disk is never written, an overlay over it is, and goes with its guest.
    _run(mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", tree, image, f"{size_mib}M")


if __name__ == "__main__":
    build()
