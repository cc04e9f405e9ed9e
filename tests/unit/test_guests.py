"""Families: what each makes of a spec, held as golden files (their diff is the review; `--update-golden` writes them),
and the file formats they write, checked by the tools that read them."""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path

import pycdlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.guests import FAMILIES, cpio, linux, osv, rofs
from launcher.image import identify
from launcher.model import Boot, Disk, Family, GuestSpec

from .. import fixtures
from ..fixtures import NIC

GOLDEN = Path(__file__).parent.parent / "golden"
OSV_DISK = fixtures.osv_disk("--rootfs=rofs --ip=eth0,dhcp /hello.so arg", {"hosts": b"x", "my.conf": b"kept\n"})
IMAGES = {
    "osv-kernel": (fixtures.OSV_ELF, "/redis.so --port 6379"),
    "osv-disk": (OSV_DISK, None),
    "linux": (fixtures.bzimage(), "httpd -f -p 8080"),
    "unikraft": (fixtures.UNIKRAFT_ELF, "-c /nginx.conf"),
    "nanos": (fixtures.nanos_disk(), None),
    "generic": (fixtures.elf(pvh=True), "hello world"),
}


def spec_of(name: str, tmp_path: Path, **changes: object) -> GuestSpec:
    content, cmdline = IMAGES[name]
    path = tmp_path / "image"
    path.write_bytes(content)
    values: dict[str, object] = {
        "name": "web",
        "pod": "p",
        "image": identify(path),
        "cmdline": cmdline,
        "env": {} if name == "nanos" else {"GREETING": 'it\'s "here"', "EMPTY": ""},
        "nameservers": (ip_address("169.254.77.1"),),
    }
    return GuestSpec(**{**values, **changes})  # type: ignore[arg-type]


def render(boot: Boot, tmp_path: Path) -> str:
    """A `Boot` as text, generated archives and disks as the files in them."""

    def shown(value: object) -> str:
        if isinstance(value, Disk):
            source = _rofs_text(value.source) if isinstance(value.source, bytes) else value.source
            patches = "".join(f"\n  at {offset}: {data!r}" for offset, data in value.patches)
            return f"disk qcow2={value.qcow2} readonly={value.readonly} {source}{patches}"
        if isinstance(value, bytes):
            return _cpio_text(value, tmp_path)
        if isinstance(value, tuple):
            return "".join(f"\n- {shown(item)}" for item in value)
        return str(value)

    lines = [f"{field.name}: {shown(getattr(boot, field.name))}" for field in fields(boot) if field.name != "nic"]
    return "\n".join(lines).replace(str(tmp_path), "TMP") + "\n"


def _rofs_text(image: bytes) -> str:
    tree = rofs.read(io.BytesIO(rofs.write({"etc/" + k: v for k, v in _root(image).items()})), 0, "etc")
    return "ROFS" + "".join(f"\n  {path}: {data.decode()!r}" for path, data in sorted(tree.items()))


def _root(image: bytes) -> dict[str, bytes]:
    structures = rofs._structures(io.BytesIO(image), 0)
    assert structures is not None
    return dict(structures.walk(0, ""))


def _cpio_text(archive: bytes, tmp_path: Path) -> str:
    """Unpacked by the real cpio."""
    out = tmp_path / "unpacked"
    out.mkdir(exist_ok=True)
    subprocess.run(["cpio", "-idmu", "--quiet"], input=archive, cwd=out, check=True)
    found = sorted(path for path in out.rglob("*") if path.is_file())
    return "cpio" + "".join(
        f"\n  {path.relative_to(out)} {path.stat().st_mode & 0o777:o}: {path.read_text()!r}" for path in found
    )


@pytest.mark.parametrize("name", IMAGES)
def test_golden(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    spec = spec_of(name, tmp_path)
    text = render(FAMILIES[spec.image.family].configure(spec, NIC), tmp_path)
    golden = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_family_has_its_entry() -> None:
    assert set(FAMILIES) == set(Family)


# --- osv ---


def test_osv_takes_an_application_from_the_command_line_and_keeps_the_images_options(tmp_path: Path) -> None:
    spec = spec_of("osv-disk", tmp_path, cmdline="/other.so", env={})
    boot = osv.configure(spec, NIC)
    assert boot.cmdline.startswith("--rootfs=rofs --ip=eth0,169.254.77.2,255.255.255.0 ")
    assert boot.cmdline.endswith(" /other.so")
    assert "dhcp" not in boot.cmdline
    assert boot.disks[0].patches == ((512, boot.cmdline.encode() + b"\0"),)


def test_osv_without_an_application_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say what to run"):
        osv.configure(spec_of("osv-kernel", tmp_path, cmdline=None), NIC)


def test_osv_refuses_a_command_line_that_its_image_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="over the 1023"):
        osv.configure(spec_of("osv-disk", tmp_path, cmdline="/x.so " + "y" * 1000), NIC)


def test_osv_hosts_has_ipv4_first_and_ends_in_a_newline(tmp_path: Path) -> None:
    boot = osv.configure(spec_of("osv-kernel", tmp_path), NIC)
    source = boot.disks[-1].source
    assert isinstance(source, bytes)
    hosts = _root(source)["hosts"].decode()
    assert hosts.startswith("169.254.77.1 localhost ")
    assert hosts.endswith(" osv.local\n")
    assert all(len(line) <= 511 for line in hosts.splitlines())


@pytest.mark.parametrize(
    ("text", "options", "application"),
    [
        ("/a.so b", [], "/a.so b"),
        ("--x=1 --env=A=b\\ c /a.so --y", ["--x=1", "--env=A=b\\ c"], "/a.so --y"),
        ("", [], ""),
        ("--only", ["--only"], ""),
    ],
)
def test_osv_command_lines_are_split_where_osv_splits_them(text: str, options: list[str], application: str) -> None:
    assert osv.split(text) == (options, application)


@pytest.mark.parametrize(
    ("console", "status"),
    [
        (b"hello\r\n", None),
        (b"Failed to load object: /x.so. Powering off.\r\n", 127),
        (b"Aborted\r\n\r\n[backtrace]\r\n", 134),
        (b"not Aborted\r\n", None),
    ],
)
def test_osv_endings(console: bytes, status: int | None) -> None:
    assert osv.exit_status(console) == status


# --- linux ---


@pytest.mark.parametrize(
    ("console", "status"),
    [
        (b"uklaunch: exit status 7\r\n[    1.0] reboot: Power down\r\n", 7),
        (b"uklaunch: exit status 1\r\nuklaunch: exit status 0\r\n", 0),
        (b"no newlineuklaunch: exit status 7\r\n", 7),
        (b"", None),
    ],
)
def test_linux_exit_status(console: bytes, status: int | None) -> None:
    assert linux.exit_status(console) == status


def test_a_linux_kernel_has_the_disks_of_its_bundle(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(fixtures.bzimage())
    (tmp_path / "data.img").write_bytes(bytes(512))
    (tmp_path / "uklaunch.toml").write_text("kernel = 'vmlinuz'\ndisks = ['data.img']")
    boot = linux.configure(GuestSpec(name="web", pod="p", image=identify(tmp_path)), NIC)
    assert [str(disk.source) for disk in boot.disks] == [str(tmp_path / "data.img")]


def test_a_linux_disk_gets_a_nocloud_seed(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(fixtures.mbr(b"\xeb", (8, 8))) + bytes(16 * 512))
    spec = GuestSpec(name="web", pod="p", image=identify(path), cmdline="echo 'a b'", env={"A": "b c"})
    boot = linux.configure(spec, NIC)
    assert boot.kernel is None
    seed = boot.disks[1].source
    assert isinstance(seed, bytes)
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(seed))
    assert iso.pvd.volume_identifier.strip() == b"CIDATA"

    def read(name: str) -> str:
        out = io.BytesIO()
        iso.get_file_from_iso_fp(out, rr_path=f"/{name}")
        return out.getvalue().decode()

    assert json.loads(read("meta-data"))["local-hostname"] == "web"
    network = json.loads(read("network-config"))["ethernets"]["pod"]
    assert network["addresses"] == ["169.254.77.2/24", "fd00:77::2/64"]
    header, body = read("user-data").split("\n", 1)
    assert header == "#cloud-config"
    assert json.loads(body)["runcmd"] == [["env", "A=b c", "sh", "-c", "echo 'a b'"]]
    assert "169.254.77.1 localhost" in json.loads(body)["write_files"][0]["content"]
    iso.close()


# --- formats ---

NAMES = st.text(st.characters(codec="ascii", min_codepoint=33, exclude_characters="/"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)
FILES = st.dictionaries(NAMES, st.binary(max_size=1500), max_size=8)


@given(top=FILES, etc=FILES)
def test_rofs_round_trip(top: dict[str, bytes], etc: dict[str, bytes]) -> None:
    top.pop("etc", None)
    image = rofs.write({**top, **{f"etc/{name}": data for name, data in etc.items()}})
    assert len(image) % rofs.BLOCK == 0
    assert rofs.read(io.BytesIO(bytes(512) + image), 512, "etc") == etc


@given(st.binary(max_size=2048))
def test_a_damaged_rofs_is_no_rofs(garbage: bytes) -> None:
    assert isinstance(rofs.read(io.BytesIO(rofs.write({"etc/hosts": b"x"})[:64] + garbage), 0, "etc"), dict)


def test_cpio_is_read_by_cpio(tmp_path: Path) -> None:
    archive = cpio.archive(
        (cpio.directory("d"), cpio.file("d/odd", b"123", 0o600), cpio.link("l", "d/odd"), cpio.file("empty", b""))
    )
    listing = subprocess.run(
        ["cpio", "-itv", "--quiet"], input=archive, check=True, capture_output=True
    ).stdout.decode()
    assert "-rw-------" in listing
    assert "l -> d/odd" in listing
    assert len(listing.splitlines()) == 4
