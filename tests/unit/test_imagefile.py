"""What was looked at is what runs: whatever becomes of an image's path, and whatever its author has written into it."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.arguments import parser
from launcher.commands.run import cmd_run
from launcher.errors import ImageError, ImageNotFound, UsageError
from launcher.image import identify, split_digest
from launcher.imagefile import ImageFile
from launcher.model import Boot, Disk, Image
from launcher.vmm.files import Opened, open_fds

from .. import fixtures
from ..fixtures import NIC

KERNEL = fixtures.OSV_ELF
DISK = fixtures.osv_disk("/hello.so", {"hosts": b"x"})


def boot(image: Image) -> Boot:
    disks = tuple(Disk(source=file, readonly=True) for file in image.disks)
    return Boot(kernel=image.kernel, initrds=image.initrds, disks=disks, memory_mib=64, cpus=1, nic=NIC)


def contents(image: Image) -> list[bytes]:
    """What a VMM that is started now would get."""
    with Opened() as opened:
        fds = open_fds(opened, boot(image), 0, 0, 0)
        found = [fd for fd in (fds.kernel, fds.initrd, *(disk.base for disk in fds.disks)) if fd is not None]
        return [os.pread(fd, 1 << 20, 0) for fd in found]


def bundle(directory: Path, manifest: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "kernel").write_bytes(KERNEL)
    (directory / "initrd").write_bytes(b"initrd")
    (directory / "disk").write_bytes(DISK)
    (directory / "uklaunch.toml").write_text(manifest)
    return directory


def descriptors() -> set[str]:
    return {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_file_that_takes_its_place_does_not_run(mode: int, tmp_path: Path) -> None:
    image = identify(bundle(tmp_path / "b", "kernel='kernel'\ninitrd='initrd'\ndisks=['disk']"))
    for name in ("kernel", "initrd", "disk"):
        (tmp_path / "b" / name).chmod(mode)
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(tmp_path / "b" / name)
    for _ in range(2):  # the first run, and one after a restart
        assert contents(image) == [KERNEL, b"initrd", DISK]


@pytest.mark.parametrize("name", ["kernel", "initrd", "disk"])
def test_a_file_that_is_written_to_does_not_run(name: str, tmp_path: Path) -> None:
    image = identify(bundle(tmp_path, "kernel='kernel'\ninitrd='initrd'\ndisks=['disk']"))
    with (tmp_path / name).open("r+b") as file:
        file.seek(4)
        file.write(b"!")
    with pytest.raises(ImageError, match=f"/{name} has been changed since"):
        contents(image)


def test_no_file_stays_open_behind_an_image(tmp_path: Path) -> None:
    image = identify(bundle(tmp_path, "kernel='kernel'\ninitrd='initrd'\ndisks=['disk']"))
    assert {path for path in descriptors() if path.startswith(str(tmp_path))} == {
        str(tmp_path / name) for name in ("kernel", "initrd", "disk")
    }
    contents(image)
    del image
    assert not any(path.startswith(str(tmp_path)) for path in descriptors())


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize("name", ["image", "uklaunch.toml", "initrd"])
def test_what_is_no_file_is_not_even_opened(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    """A pipe without a writer would keep us for ever."""
    if name == "image":
        make(path := tmp_path / name)
    else:
        path = bundle(tmp_path / "b", "kernel='kernel'\ninitrd='initrd'")
        (path / name).unlink()
        make(path / name)
    with pytest.raises(ImageError, match="is a device, a pipe"):
        identify(path)


# --- an image's author, against the host ---


def test_a_bundle_does_not_hand_the_hosts_secrets_to_its_guest(tmp_path: Path) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:x")
    secret.chmod(0o600)
    path = bundle(tmp_path / "b", "kernel='kernel'\ninitrd=['initrd', '../shadow']")
    with pytest.raises(UsageError, match="which not everybody may read"):
        identify(path)
    (path / "initrd").unlink()
    (path / "initrd").symlink_to(secret)
    (path / "uklaunch.toml").write_text("kernel='kernel'\ninitrd='initrd'")
    with pytest.raises(UsageError, match="which not everybody may read"):
        identify(path)
    secret.chmod(0o644)
    private = next(parent for parent in tmp_path.parents if not parent.stat().st_mode & 1)  # pytest's own
    with pytest.raises(UsageError, match="which not everybody may read"):  # it is behind a closed door
        identify(path)
    assert private.is_dir()
    (path / "initrd").unlink()
    (path / "initrd").symlink_to("/etc/passwd")
    assert contents(identify(path))[1] == Path("/etc/passwd").read_bytes()


@pytest.mark.parametrize("options", [("-b", "host", "-F", "raw"), ("-o", "data_file=host,data_file_raw=on")])
def test_no_tool_sees_a_disk_that_names_other_files(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As qemu-img has opened them before (CVE-2024-4467)."""
    (tmp_path / "host").write_bytes(DISK)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *options, tmp_path / "disk", "1M"], cwd=tmp_path, check=True
    )
    monkeypatch.setenv("PATH", "")  # whoever calls a tool now hears that it is missing
    with pytest.raises(ImageError, match=r"overlay|another file"):
        identify(tmp_path / "disk")


@pytest.mark.parametrize("manifest", ["kernel='kernel'\ndisks=['disk', 'more']", "disks=['disk', 'more']"])
def test_nor_one_that_comes_second(manifest: str, tmp_path: Path) -> None:
    path = bundle(tmp_path, manifest)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", path / "more"], check=True
    )
    with pytest.raises(ImageError, match="more is an overlay"):
        identify(path)


def test_a_small_disk_that_claims_to_be_huge_takes_no_time_and_no_space(tmp_path: Path) -> None:
    """Half a mebibyte whose root says that it is as large as its partition: 1 TiB."""
    root = bytearray(fixtures.osv_disk("/hello.so", {"hosts": b"x"}))
    struct.pack_into("<I", root, 446 + 16 + 12, (1 << 40) // 512)
    struct.pack_into("<Q", root, 128 * 512 + 24, (1 << 40) // 512 - 1)  # its structure area begins there
    (tmp_path / "raw").write_bytes(root)
    os.truncate(tmp_path / "raw", (1 << 40) + 128 * 512)
    raw, disk = str(tmp_path / "raw"), str(tmp_path / "disk")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
    assert Path(disk).stat().st_size < 1 << 20
    with pytest.raises(ImageError, match="File too large"):
        identify(disk)


def test_no_tool_sees_a_qcow2_disk_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"QFI\xfb" + struct.pack(">I", 1) + bytes(200))
    with pytest.raises(ImageError, match="version 1"):
        identify(tmp_path / "disk")
    (tmp_path / "disk").write_bytes(b"QFI\xfb")
    with pytest.raises(ImageError, match="cut off"):
        identify(tmp_path / "disk")


# --- digests ---


@pytest.mark.parametrize("mib", [1, 96])
def test_an_overlay_takes_all_that_its_disk_holds_and_no_more_than_that(mib: int, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(fixtures.mbr(b""))
    os.truncate(raw, mib << 20)
    with Opened() as opened:
        disk = opened.disk(Disk(source=ImageFile(raw)))
        assert disk.overlay is not None
        limit = disk.overlay_limit_bytes
        for size in range(0, mib, 8):  # each part twice: what is written again is written in place
            write = f"write -P 7 {size}M {min(8, mib - size)}M"
            command = ["qemu-io", "-f", "qcow2", "-c", write, "-c", write, f"/proc/self/fd/{disk.overlay}"]
            subprocess.run(
                ["prlimit", f"--fsize={limit}", *command],
                check=True,
                stdout=subprocess.DEVNULL,
                pass_fds=(disk.overlay, disk.base),
            )
        written = os.fstat(disk.overlay).st_size
    assert mib << 20 < written <= limit < (mib << 20) * 1.1 + (8 << 20)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_digest_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "me@home@sha256:abc.img"
    path.write_bytes(KERNEL)
    right = f"{path}@sha256:{digest(KERNEL).upper()}"
    assert split_digest(str(path)) == (str(path), None)
    assert split_digest(right) == (str(path), digest(KERNEL))
    assert identify(path, sha256=digest(KERNEL)).kernel is not None
    with pytest.raises(ImageError, match=f"its SHA-256 digest is {digest(KERNEL)}"):
        identify(path, sha256=digest(DISK))


def test_what_has_another_digest_is_not_looked_at(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image").write_bytes(b"not an image at all")
    args = parser().parse_args(["run", f"{tmp_path}/image@sha256:{digest(KERNEL)}", "--pod", "p"])
    with pytest.raises(ImageError, match="is not the image that was asked for") as caught:
        cmd_run(args)
    assert caught.value.exit_code == 126


@pytest.mark.parametrize("text", ["x@sha256:", "x@sha256:abc", "x@sha256:" + "0" * 65])
def test_half_a_digest(text: str) -> None:
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        split_digest(text)


@pytest.mark.parametrize("text", ["x@sha512:" + "0" * 128, "x@sha256:" + "g" * 64, "@sha256:" + "0" * 64])
def test_what_is_no_digest_is_a_path(text: str) -> None:
    assert split_digest(text) == (text, None)
    with pytest.raises(ImageNotFound):
        identify(text)


def test_a_manifest_with_digests(tmp_path: Path) -> None:
    manifest = f"kernel='kernel@sha256:{digest(KERNEL)}'\ninitrd='initrd@sha256:{digest(b'initrd')}'"
    path = bundle(tmp_path, manifest)
    assert contents(identify(path, sha256=digest(manifest.encode()))) == [KERNEL, b"initrd"]
    with pytest.raises(ImageError, match=r"uklaunch\.toml is not the image"):
        identify(path, sha256=digest(b""))
    (path / "initrd").write_bytes(b"other")
    with pytest.raises(ImageError, match="initrd is not the image"):
        identify(path)


def test_a_digest_of_a_manifest_is_one_of_all_its_files_or_none(tmp_path: Path) -> None:
    manifest = f"kernel='kernel@sha256:{digest(KERNEL)}'\ninitrd='initrd'"
    path = bundle(tmp_path, manifest)
    assert identify(path).kernel is not None
    with pytest.raises(UsageError, match="without a digest"):
        identify(path, sha256=digest(manifest.encode()))
