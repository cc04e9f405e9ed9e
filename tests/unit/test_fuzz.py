"""What others have written, as they would not: the answer is a result or one line, soon, and takes little memory.

`UKLAUNCH_FUZZ=100 pytest tests/unit/test_fuzz.py` looks a hundred times as long, as it does with test_image.py and
test_hostile_vmm.py. The router has a fuzzer of its own: tests/fuzz.py.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import json
import struct
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import cli, cni, environment, events, resolver, runfile, state
from launcher.errors import UklaunchError
from launcher.guest import RunOptions
from launcher.guests import bootfs, rofs
from launcher.image import identify
from launcher.imagefile import ImageFile
from launcher.model import Family, GuestSpec, Image, ImageFormat

from .. import fixtures

QUICK_S, SMALL_MIB = 10, 64  # of one hostile image: without limits it is hours, and gigabytes


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples * fixtures.FUZZ,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    said = ""
    try:
        yield
    except UklaunchError as exc:
        said = f"{exc.message} {exc.hint}"
    assert said.isprintable()
    assert len(said) < 3000


@contextlib.contextmanager
def soon_and_small() -> Iterator[None]:
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < QUICK_S
    assert peak < SMALL_MIB << 20


# --- OSv's file systems: found by hand, for no fuzzer builds these ---


def hostile_rofs(dirents: list[tuple[int, bytes]], inodes: list[tuple[int, int, int, int]], blocks: int = 1) -> bytes:
    structures = b"".join(struct.pack("<QH", number, len(name)) + name for number, name in dirents)
    structures += b"".join(struct.pack("<4Q", *inode) for inode in inodes)
    structures += bytes(-len(structures) % 512)
    head = struct.pack("<8Q", rofs.MAGIC, 1, 512, 1 + blocks, len(structures) // 512, len(dirents), 0, len(inodes))
    return head.ljust(512, b"\0") + bytes(512 * blocks) + structures


def test_a_directory_that_holds_itself_a_hundred_times_over() -> None:
    image = hostile_rofs([(1, b"etc")] * 100, [(rofs.DIRECTORY, 1, 0, 100)])
    with soon_and_small():
        assert rofs.read(io.BytesIO(image), 0, "etc") == {}


def test_one_large_file_under_a_thousand_names() -> None:
    dirents = [(2, b"etc"), *((3, b"%d" % n) for n in range(1000))]
    inodes = [(rofs.DIRECTORY, 1, 0, 1), (rofs.DIRECTORY, 2, 1, 1000), (rofs.FILE, 3, 1, 1 << 20)]
    with soon_and_small():
        assert rofs.read(io.BytesIO(hostile_rofs(dirents, inodes, blocks=2048)), 0, "etc") == {}


def test_a_kernel_with_one_large_file_under_a_thousand_names() -> None:
    count = 1000
    start = (count + 1) * bootfs.RECORD.size
    sizes = [0, *[1 << 20] * (count - 1)]
    records = b"".join(bootfs.RECORD.pack(size, start, 0, b"/etc/%d" % n) for n, size in enumerate(sizes))
    content = records + bytes(bootfs.RECORD.size) + bytes(1 << 20)
    with soon_and_small():
        assert bootfs.read(content, len(content), "/etc/") == {}


def test_a_kernel_with_a_hundred_thousand_files_that_lead_nowhere() -> None:
    count = 100_000
    content = b"".join(bootfs.RECORD.pack(0, 7, 0, b"/etc/%d" % n) for n in range(count))
    with soon_and_small():
        assert bootfs.read(content, len(content), "/etc/") == {}


# --- texts ---

HINTS = ["linux", "128M", "8080/tcp", "kernel", "../../etc/shadow", "a\nb", "\x1b[2J", "x@sha256:", "\0"]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.floats() | st.text(max_size=20) | st.sampled_from(HINTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
    return repr(value) if value is not None else '""'


def mutated(data: st.DataObject, text: bytes) -> bytes:
    content = bytearray(text)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    return bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else bytes(content)


MANIFEST = (
    b"kernel = 'kernel'\ninitrd = ['initrd']\nmemory = '96M'\ncpus = 2\nports = ['80/tcp', 53]\nenv = {A = 'b'}\n"
)
KEYS = ("kernel", "initrd", "disks", "cmdline", "family", "memory", "cpus", "ports", "env", "other")


@fuzz(150)
@given(data=st.data())
def test_manifests(data: st.DataObject, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(fixtures.bzimage())
    (tmp_path / "initrd").write_bytes(b"070701")
    if data.draw(st.booleans()):
        text = mutated(data, MANIFEST)
    else:
        given = data.draw(st.dictionaries(st.sampled_from(KEYS), values, max_size=5))
        text = "\n".join(f"{key} = {as_toml(value)}" for key, value in {"kernel": "kernel", **given}.items()).encode()
    (tmp_path / "uklaunch.toml").write_bytes(text)
    with one_line():
        identify(tmp_path)


CONFIG = (
    b"image = 'none'\npod = 'p'\nmemory = '1G'\nports = ['80']\nenv = {A = 'b'}\nstop_timeout = 2.5\nafter = ['x']\n"
)
OPTIONS = (
    *("image", "pod", "name", "memory", "cpus", "ports", "publish", "env", "env_file", "cmdline", "family", "mtu"),
    *("uplink", "netns", "restart", "health", "health_interval", "after", "accel", "ready_port", "other"),
)


@fuzz(150)
@given(data=st.data())
def test_configurations(data: st.DataObject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as the image, which is none."""
    if data.draw(st.booleans()):
        text = mutated(data, CONFIG)
    else:
        given = data.draw(st.dictionaries(st.sampled_from(OPTIONS), values, max_size=4))
        given = {"pod": "p", **given, "image": f"{data.draw(st.text(max_size=9))}.none"}
        text = "\n".join(f"{key} = {as_toml(value)}" for key, value in given.items()).encode()
    file = tmp_path / "n.toml"
    file.write_bytes(text)
    with contextlib.suppress(SystemExit):
        assert cli.main(["run", "--config", str(file)]) in (2, 125, 126, 127)
    said = capsys.readouterr().err
    assert len(said.rstrip("\n").splitlines()) == 1, said


@fuzz(150)
@given(data=st.data())
def test_env_files(data: st.DataObject, tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(mutated(data, b'# a\nA=b\nB="c"\n\nHOME\n C=d=e \n'))
    with one_line():
        environment.check(environment.collect([tmp_path / "env"], []))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = Path(__file__).parent.parent.parent / "launcher/systemd/uklaunch-generator"
    loader = importlib.machinery.SourceFileLoader("uklaunch_generator", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


UNIT = b"[Unit]\nAfter=x\n[Guest]\nImage=/i\nPod=p\nEnv=A=b\n[Service]\nNice=5\n[Install]\nWantedBy=uklaunch.target\n"


@fuzz(150)
@given(data=st.data())
def test_units(
    data: st.DataObject, generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nothing is written outside of systemd's directory, whatever the file says."""
    etc, out = tmp_path / "etc", tmp_path / "out/generator"
    etc.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True, parents=True)
    (etc / "g.guest").write_bytes(mutated(data, UNIT))
    monkeypatch.setenv("UKLAUNCH_UNITS", str(etc))
    monkeypatch.setattr("sys.argv", ["uklaunch-generator", str(out)])
    generator.main()
    assert len(capsys.readouterr().err.splitlines()) <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"etc", "out"}
    assert {path.name for path in out.parent.iterdir()} == {"generator"}


# --- records ---

GUEST = state.GuestRecord(
    **{"name": "g", "pod": "p", "index": 2, "mac": "02:00:00:00:77:02", "ipv4": "169.254.77.2", "ipv6": "fd00:77::2"},
    **{"tap": "uktap2", "image": "/i", "family": "linux", "vmm": "qemu", "accel": "tcg", "memory_mib": 128, "cpus": 1},
    **{"ports": ("80/tcp",), "supervisor_pid": 1, "started_at": 1.0},
)
POD = state.PodRecord(name="p", netns="/run/netns/uk-p", ipv4="1.2.3.4/24", ipv6="fd00::1/64", saved_sysctls={})
LOOKS = (["ps", "-a"], ["ps", "-a", "--json"], ["inspect", "g"], ["pod", "ls"], ["pod", "inspect", "p"], ["events"])


@fuzz(60)
@given(data=st.data())
def test_damaged_records(data: st.DataObject, state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest, pod = state.guest_dir("p", "g") / "guest.json", state.pod_file("p")
    for path, record in ((guest, GUEST), (pod, POD)):
        path.parent.mkdir(parents=True, exist_ok=True)
        good = asdict(record)
        if data.draw(st.booleans()):
            good |= data.draw(st.dictionaries(st.sampled_from(sorted(good)), values, max_size=3))
            path.write_text(json.dumps(good))
        else:
            path.write_bytes(mutated(data, json.dumps(good).encode()))
    events.path().write_bytes(
        mutated(data, b'{"time": 1.5, "what": "ready", "pod": "p", "guest": "g", "detail": {}}\n')
    )
    for look in LOOKS:
        assert cli.main(look) in (0, 2, 125)
        assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "[" * 100_000, "9" * 5000, "\xff", ""])
@pytest.mark.parametrize("what", ["guest", "pod", "events"])
def test_records_that_are_none(what: str, text: str, state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = {"guest": state.guest_dir("p", "g") / "guest.json", "pod": state.pod_file("p"), "events": events.path()}[
        what
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    codes = [cli.main(look) for look in LOOKS]
    assert set(codes) <= {0, 2, 125}
    assert (125 in codes) == (what != "events")
    assert "Traceback" not in capsys.readouterr().err


@fuzz(60)
@given(data=st.data())
def test_damaged_run_files(data: st.DataObject, tmp_path: Path) -> None:
    image = Image(path=Path("/i"), format=ImageFormat.BZIMAGE, family=Family.LINUX, kernel=ImageFile(Path(__file__)))
    spec = GuestSpec(name="g", pod="p", image=image, env={"A": "b"}, nameservers=(ip_address("::1"),))
    runfile.write(tmp_path, spec, RunOptions())
    runfile.path(tmp_path).write_bytes(mutated(data, runfile.path(tmp_path).read_bytes()))
    with one_line():
        runfile.read(tmp_path)


# --- what the host's other programs write ---


@fuzz(150)
@given(data=st.data())
def test_resolv_conf(data: st.DataObject) -> None:
    text = mutated(data, b"nameserver 10.0.0.1\nnameserver fe80::1%eth0\nsearch a b\noptions ndots:5\n")
    found = resolver.parse(text.decode(errors="replace"))
    assert all(address.version in (4, 6) for address in found.nameservers)


@fuzz(100)
@given(data=st.data())
def test_cni_networks(data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNI_CONF_DIR", str(tmp_path))
    good = {"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "none-such", "ipam": {"type": "x"}}]}
    if data.draw(st.booleans()):
        good |= data.draw(st.dictionaries(st.sampled_from(sorted(good)), values, max_size=2))
        text = json.dumps(good).encode()
    else:
        text = mutated(data, json.dumps(good).encode())
    (tmp_path / "n.conflist").write_bytes(text)
    with one_line():
        cni.find("n")
