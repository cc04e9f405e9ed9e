"""Images are known by their content; whatever is thrown at `identify`, it answers with an image or a clear error."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import ImageError, ImageNotFound, UklaunchError, UsageError
from launcher.guests import rofs
from launcher.image import identify
from launcher.model import Family, Image, ImageFormat, Port

from .. import fixtures

CMDLINE = "--rootfs=rofs /hello.so arg"
ETC = {"hosts": b"127.0.0.1 localhost\n", "ssl/cert.pem": b"x" * 700}
SAMPLES = {
    "osv elf": (fixtures.OSV_ELF, ImageFormat.PVH_ELF, Family.OSV),
    "unikraft elf": (fixtures.UNIKRAFT_ELF, ImageFormat.MULTIBOOT_ELF, Family.UNIKRAFT),
    "vmlinux": (fixtures.elf(pvh=True, text=b"\0Linux version 6.1\0"), ImageFormat.PVH_ELF, Family.LINUX),
    "some pvh elf": (fixtures.elf(pvh=True), ImageFormat.PVH_ELF, Family.GENERIC),
    "bzImage": (fixtures.bzimage(), ImageFormat.BZIMAGE, Family.LINUX),
    "osv bzImage": (fixtures.bzimage()[:-64] + b"_ZN3osv".ljust(64, b"\0"), ImageFormat.BZIMAGE, Family.OSV),
    "osv disk": (fixtures.osv_disk(CMDLINE, ETC), ImageFormat.RAW_DISK, Family.OSV),
    "nanos disk": (fixtures.nanos_disk(), ImageFormat.RAW_DISK, Family.NANOS),
    "linux disk": (
        bytes(fixtures.mbr(b"\xeb", (8, 8))) + b"\xeb\x58GRUB" + bytes(16 * 512),
        ImageFormat.RAW_DISK,
        Family.LINUX,
    ),
    "some disk": (bytes(fixtures.mbr(b"\xfa")) + bytes(512), ImageFormat.RAW_DISK, Family.GENERIC),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_by_content(name: str, tmp_path: Path) -> None:
    content, format_, family = SAMPLES[name]
    path = tmp_path / "misleading.txt"
    path.write_bytes(content)
    image = identify(path)
    assert (image.format, image.family) == (format_, family)
    assert (image.kernel is None) == (format_ is ImageFormat.RAW_DISK)
    assert identify(path, Family.GENERIC).family is Family.GENERIC
    assert path.read_bytes() == content


@pytest.mark.parametrize("as_qcow2", [False, True])
def test_an_osv_disk_tells_its_command_line_and_its_etc(as_qcow2: bool, tmp_path: Path) -> None:
    path = tmp_path / "usr.img"
    disk = fixtures.osv_disk(CMDLINE, ETC)
    if as_qcow2:
        fixtures.qcow2(disk, path)
    else:
        path.write_bytes(disk)
    image = identify(path)
    assert image.cmdline == CMDLINE
    assert image.etc == ETC
    assert [file.path for file in image.disks] == [path]
    assert image.disks_qcow2 == (as_qcow2,)


QCOW2_LAYOUTS = ((), ("-c",), ("-o", "compat=0.10"), ("-o", "cluster_size=4k"))


@pytest.mark.parametrize("options", QCOW2_LAYOUTS, ids=" ".join)
def test_a_broken_download_of_a_qcow2_disk_is_noticed(options: tuple[str, ...], tmp_path: Path) -> None:
    raw = fixtures.osv_disk(CMDLINE, {"big": os.urandom(400_000)})
    path = fixtures.qcow2(raw, tmp_path / "disk", *options)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ImageError, match="cut off"):
        identify(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-b", "base", "-F", "raw"), "an overlay"),
        (("-o", "data_file=data,data_file_raw=on"), "another file"),
    ],
    ids=["overlay", "data file"],
)
def test_qcow2_disks_that_are_not_whole_in_themselves(options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(fixtures.osv_disk(CMDLINE, ETC))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, "disk", "1M"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(ImageError, match=says):
        identify(tmp_path / "disk")


def test_an_encrypted_qcow2_disk(tmp_path: Path) -> None:
    path = fixtures.qcow2(fixtures.osv_disk(CMDLINE, ETC), tmp_path / "disk")
    content = bytearray(path.read_bytes())
    struct.pack_into(">I", content, 32, 1)  # crypt_method: AES
    path.write_bytes(content)
    with pytest.raises(ImageError, match="encrypted"):
        identify(path)


def test_a_qcow2_disk_whose_name_qemu_would_take_apart(tmp_path: Path) -> None:
    path = tmp_path / "a,b=c.img"
    fixtures.qcow2(fixtures.osv_disk(CMDLINE, ETC), tmp_path / "disk").rename(path)
    assert identify(path).etc == ETC


def test_an_osv_kernel_tells_the_etc_of_its_own_files(tmp_path: Path) -> None:
    files = {
        "/app.so": b"x" * 999,
        "/etc/hosts": b"a\n",
        "/etc/mtab@": b"/proc/mounts",
        "/etc/d/": b"",
        "/etc/d/c": b"c",
    }
    path = tmp_path / "loader.elf"
    path.write_bytes(fixtures.elf(pvh=True, text=b"\0OSv v0.57\0/etc/hosts\0" + fixtures.bootfs_image(files)))
    assert identify(path).etc == {"hosts": b"a\n", "d/c": b"c"}


@pytest.mark.parametrize("as_qcow2", [False, True])
def test_an_osv_kernel_with_a_whole_disk_runs_what_the_disk_says(as_qcow2: bool, tmp_path: Path) -> None:
    (tmp_path / "loader.elf").write_bytes(fixtures.OSV_ELF)
    disk = fixtures.osv_disk(CMDLINE, ETC)
    if as_qcow2:
        fixtures.qcow2(disk, tmp_path / "usr.img")
    else:
        (tmp_path / "usr.img").write_bytes(disk)
    (tmp_path / "uklaunch.toml").write_text("kernel = 'loader.elf'\ndisks = ['usr.img']")
    image = identify(tmp_path)
    assert (image.family, image.cmdline, image.etc) == (Family.OSV, CMDLINE, ETC)
    assert image.disks_qcow2 == (as_qcow2,)


@pytest.mark.parametrize("name", ["osv elf", "bzImage", "osv disk", "unikraft elf", "nanos disk"])
def test_a_truncated_image_is_called_so(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    content = SAMPLES[name][0]
    path.write_bytes(content[: len(content) - 16])
    with pytest.raises(ImageError, match="truncated"):
        identify(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\x7fELF", "truncated"),
        (b"#!/bin/sh\n", "a script"),
        (b"hello\n", "a text file"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"070701" + bytes(100), "cpio"),
        (rofs.write({"x": b""}), "an OSv file system"),
        (bytes(1024), "unknown kind"),
        (fixtures.elf(), "no kernel"),
        (fixtures.OSV_ELF[:18] + b"\xb7\0" + fixtures.OSV_ELF[20:], "another CPU"),
    ],
)
def test_what_was_found_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=says):
        identify(path)


def test_missing_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound):
        identify(tmp_path / "none")
    with pytest.raises(ImageNotFound):
        identify(Path("/etc/passwd/x"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="pipe"):
        identify(tmp_path / "pipe")


# --- bundles ---


def bundle(tmp_path: Path, manifest: str) -> Path:
    (tmp_path / "vmlinuz").write_bytes(fixtures.bzimage())
    (tmp_path / "initrd").write_bytes(b"x")
    (tmp_path / "uklaunch.toml").write_text(manifest)
    return tmp_path


def test_a_whole_manifest(tmp_path: Path) -> None:
    directory = bundle(
        tmp_path,
        """
        kernel = "vmlinuz"
        initrd = ["initrd"]
        cmdline = "httpd -f"
        family = "linux"
        memory = "96M"
        cpus = 2
        ports = ["8080/tcp", 53]
        [env]
        A = "b"
        """,
    )
    image = identify(directory)
    assert image.kernel is not None
    assert (image.kernel.path, [file.path for file in image.initrds]) == (directory / "vmlinuz", [directory / "initrd"])
    assert replace(image, kernel=None, initrds=()) == Image(
        path=directory,
        format=ImageFormat.BZIMAGE,
        family=Family.LINUX,
        cmdline="httpd -f",
        env={"A": "b"},
        memory_mib=96,
        cpus=2,
        ports=(Port(8080), Port(53)),
    )


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ("", "neither a kernel nor disks"),
        ("kernal = 'vmlinuz'", "kernal is unknown"),
        ("kernel = 'none'", "which is no file"),
        ("kernel = 3", "kernel is neither"),
        ("kernel = ['vmlinuz', 'initrd']", "several files"),
        ("disks = ['vmlinuz']", "begins with a bzImage"),
        ("kernel = 'vmlinuz'\nenv = {'A B' = 'x'}", "not a variable's name"),
        ("kernel = 'vmlinuz'\nfamily = 'beos'", "'beos' is unknown"),
        ("kernel = 'vmlinuz'\nfamily = ['linux']", "is unknown"),
        ("kernel = 'vmlinuz'\nmemory = 128", "memory is not a text"),
        ("kernel = 'vmlinuz'\nmemory = '12Q'", "memory does not do: .*12Q"),
        ("kernel = 'vmlinuz'\ncpus = true", "cpus"),
        ("kernel = 'vmlinuz'\nports = [70000]", "ports does not do: .*70000"),
        ("kernel = 'vmlinuz'\nports = 80", "ports is not a list"),
        ("kernel = 'vmlinuz'\nenv = {A = 1}", "env"),
        ("kernel = ", "Invalid value"),
    ],
)
def test_a_bad_manifest_names_the_key(manifest: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        identify(bundle(tmp_path, manifest))


# --- fuzz ---


@pytest.fixture(scope="session")
def qcow2_sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("qcow2") / "disk"
    return fixtures.qcow2(SAMPLES["osv disk"][0], path, "-o", "cluster_size=512").read_bytes()


@settings(max_examples=50 * fixtures.FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_qcow2_disks_never_give_a_traceback(data: st.DataObject, qcow2_sample: bytes, tmp_path: Path) -> None:
    content = bytearray(qcow2_sample)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "image"
    path.write_bytes(content[: data.draw(st.integers(4, len(content)))])
    with contextlib.suppress(UklaunchError):
        identify(path)


@settings(max_examples=300 * fixtures.FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_images_never_give_a_traceback(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(data.draw(st.sampled_from([sample[0] for sample in SAMPLES.values()])))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 2048) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "image"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    said = ""
    try:
        identify(path)
    except UklaunchError as exc:
        said = exc.message
    assert "\n" not in said
