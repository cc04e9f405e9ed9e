"""Loading: once per version, whole or not at all, and said clearly when it cannot be."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

import router
from router import program, tables

pytestmark = pytest.mark.bpf


@pytest.fixture
def fresh(bpffs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A corner of the BPF file system where nothing is loaded yet."""
    corner = bpffs / "fresh"
    corner.mkdir()
    monkeypatch.setenv("UKLAUNCH_BPFFS", str(corner))
    yield corner
    for directory in (corner / "uklaunch").glob("*"):
        program.remove(directory)
    for directory in (corner / "uklaunch", corner):
        if directory.exists():
            directory.rmdir()


def test_first_load_and_warm_open(fresh: Path) -> None:
    assert not router.is_loaded()
    with router.open_router():
        pass
    assert router.is_loaded()
    began = time.perf_counter()
    with router.open_router() as table:
        assert table.pod_ids() == []
    assert time.perf_counter() - began < 0.05
    assert sorted(path.name for path in program.root().iterdir()) == [program.version()]


def test_loaders_at_the_same_time_load_once(fresh: Path) -> None:
    ids: list[set[int]] = []

    def load() -> None:
        with router.open_router() as table:
            text = Path(f"/proc/self/fdinfo/{table.program_fd}").read_text()
            ids.append({int(line.split()[1]) for line in text.splitlines() if line.startswith("prog_id")})

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 3
    assert ids[0] == ids[1] == ids[2]


def test_interrupted_loads_are_mended(fresh: Path) -> None:
    with router.open_router():
        pass
    (program.root() / program.version() / "ports").unlink()
    (program.root() / "new-1").mkdir()
    with router.open_router() as table:
        table.remove_pod(1)
    assert sorted(path.name for path in program.root().iterdir()) == [program.version()]


def test_unload_spares_what_has_pods(fresh: Path) -> None:
    row = router.PodRow(ifindex=2, mac=bytes(6), ipv4=IPv4Address("169.254.77.1"), ipv6=IPv6Address("fd00:77::1"))
    with router.open_router() as own:
        own.add_pod(1, row)
        assert router.unload_all() == []
        own.remove_pod(1)
    assert router.unload_all() == [program.root() / program.version()]
    assert not program.root().exists()


ROW = router.PodRow(ifindex=2, mac=bytes(6), ipv4=IPv4Address("169.254.77.1"), ipv6=IPv6Address("fd00:77::1"))


def upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the sources are others, as far as the name of what is loaded goes."""
    real = program.version
    monkeypatch.setattr(program, "version", lambda defines=(): real(defines) if defines else "upgraded")


def test_an_upgrade_keeps_pods_and_the_last_of_them_takes_its_router_along(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = router.GuestRow(index=2, ifindex=3, mac=bytes(6), ipv4=ROW.ipv4, ipv6=ROW.ipv6, ports=(("tcp", 80),))
    with router.open_router() as table:
        for pod_id in (1, 2):
            table.add_pod(pod_id, ROW)
            table.add_guest(pod_id, guest)
        old = program.root() / program.version()
        upgrade(monkeypatch)
        with router.open_router() as upgraded:
            assert upgraded.pod_ids() == []
            assert router.pod_ids() == [1, 2]
            upgraded.add_pod(3, ROW)
        router.remove_pod(1)
        assert (table.pod_ids(), table.guests(1), table.ports(1)) == ([2], [], [])
        assert len(table.guests(2)) == 1
        assert old.exists()
    router.remove_pod(2)
    assert not old.exists()
    router.remove_pod(3)
    assert [path.name for path in program.root().iterdir()] == ["upgraded"]  # for the next pod


def test_a_router_that_somebody_has_just_opened_is_not_unloaded(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For who has it open may be about to add its first pod."""
    old = program.root() / program.version()
    with router.open_router():
        upgrade(monkeypatch)
        with router.open_router():
            pass
        assert router.unload_superseded() == []
        assert router.unload_all() == [program.root() / "upgraded"]
        with router.open_router():
            pass
    assert router.unload_superseded() == [old]


def test_not_a_bpffs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        monkeypatch.setenv("UKLAUNCH_BPFFS", str(path))
        with pytest.raises(router.RouterError, match="no BPF file system is mounted") as caught:
            router.open_router()
        assert caught.value.hint == f"mount it: mount -t bpf bpf {path}"


def test_without_bcc(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc.py").write_text("raise ImportError('no')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("UKLAUNCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(router.RouterError, match="bcc is missing") as caught:
        router.open_router()
    assert "python3-bpfcc" in caught.value.hint
    assert not list(program.root().iterdir())


def test_compiled_once(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next boot needs no compiler; a spoilt cache is as good as none; what others have left goes."""
    monkeypatch.setenv("UKLAUNCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "of-an-earlier-version").touch()
    with router.open_router():
        pass
    (kept,) = (tmp_path / "cache").iterdir()
    text = kept.read_text()
    router.unload_all()
    kept.write_text(text[:1000])
    with router.open_router():
        pass
    assert kept.read_text() == text
    router.unload_all()
    (tmp_path / "bcc.py").write_text("raise ImportError('no')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with router.open_router() as table:
        table.remove_pod(1)


def test_refused_by_the_kernel() -> None:
    returns_nothing = b"\x95" + bytes(7)  # BPF_EXIT, with no value in r0
    with pytest.raises(router.RouterError, match="the kernel refuses the router's program") as caught:
        program.load_program("bad", returns_nothing)
    assert "R0 !read_ok" in caught.value.detail


def test_without_root(bpffs: Path) -> None:
    code = (
        "import router\n"
        "try: router.open_router()\n"
        "except router.RouterError as exc: print(exc.message, '|', exc.hint)\n"
    )
    # Nobody, but able to read this checkout wherever it is.
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    nobody += [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
    done = subprocess.run([*nobody, "--", sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("| run uklaunch as root\n")


def test_import_is_cheap() -> None:
    code = "import sys, router; assert not {'bcc', 'ctypes', 'trio', 'launcher'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, router; router.open_router; assert not {'bcc', 'trio', 'launcher'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


LAYOUT = """
import ctypes, json, os, sys, tempfile
from pathlib import Path
import bcc
from router import compile, program
def fields(kind):
    return [[name, getattr(kind, name).offset, getattr(kind, name).size] for name, *_ in kind._fields_]
with tempfile.TemporaryDirectory() as tree:
    compile.make_kernel_tree(Path(tree))
    os.environ["BCC_KERNEL_SOURCE"] = tree
    module = bcc.BPF(text=compile.flatten("localhost.c"), cflags=compile.CFLAGS)
    kinds = {}
    for name in ("pods", "guests", "ports", "flow_template", "pod_counters"):
        for kind in (module[name].Key, module[name].Leaf):
            kind = getattr(kind, "_type_", kind)  # per CPU
            if hasattr(kind, "_fields_"):
                kinds[kind.__name__] = fields(kind)
    leaf = module["scratch"].Leaf
    kinds["packet"] = fields(dict(getattr(leaf, "_type_", leaf)._fields_)["packet"])
    print(json.dumps(kinds))
"""


def test_layout() -> None:
    """The bytes as tables.py has them are those that the C compiler made of bpf/maps.h."""
    import json

    done = subprocess.run([sys.executable, "-c", LAYOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mirrors: dict[str, type[ctypes.Structure]] = {
        "pod": tables.Pod,
        "guest_key": tables.GuestKey,
        "guest": tables.Guest,
        "port_key": tables.PortKey,
        "port_owner": tables.PortOwner,
        "flow_key": tables.FlowKey,
        "flow": tables.FlowRow,
        "counters": tables.Counters,
        "packet": tables.Packet,
    }
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert compiled.keys() == mirrors.keys()
    for name, mirror in mirrors.items():
        ours = [
            [field[0], getattr(mirror, field[0]).offset, getattr(mirror, field[0]).size] for field in mirror._fields_
        ]
        assert ours == compiled[name], name


def test_constants() -> None:
    text = (program.source_directory() / "maps.h").read_text()
    for name in ("GUESTS_PER_POD", "FLOWS_PER_POD", "DROP_SLOTS"):
        assert f"#define {name} {getattr(tables, name)}" in text
