"""Limits, held to: of CPU, memory and threads by a kernel that has cgroup v2 with its controllers, which is a Linux
guest's (this machine's may have them bound to v1); of disks by QEMU.

    this machine ── QEMU ── Linux guest ── launcher/cgroup.py ── a cgroup ── QEMU, or what plays a VMM gone wrong
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cgroup, events
from launcher.arguments import DEFAULT_BUNDLE
from launcher.guests import cpio
from launcher.vmm.qemu import BINARY

from ..cli import shown, uklaunch
from ..fixtures import mbr
from .held_to_limits import UNIT

pytestmark = pytest.mark.boot

HERE = Path(__file__).parent
SCRIPT = HERE / "held_to_limits.py"
FIRMWARE = ("bios-256k.bin", "kvmvapic.bin")
PROGRAMS = (BINARY, "python3")


def libraries(program: Path) -> Iterator[Path]:
    said = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return (Path(path) for path in re.findall(r"(/\S+) \(0x", said))


def python_modules() -> Iterator[tuple[str, Path]]:
    """(Path below the library's directory, file) of all that the script needs, as sources."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE.parent.parent)!r}); import runpy; runpy.run_path({str(SCRIPT)!r});"
    )
    code += (
        "print(*sorted({m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)}), sep='\\n')"
    )
    out = subprocess.run(["/usr/bin/python3", "-IS", "-c", code], capture_output=True, text=True, check=True).stdout
    roots = [HERE.parent.parent, *(Path(path) for path in sys.path if path.startswith("/usr/lib"))]
    for file in map(Path, out.split()):
        root = max((root for root in roots if file.is_relative_to(root)), key=lambda root: len(root.parts))
        yield str(file.relative_to(root)), file


def userland() -> Iterator[cpio.Entry]:
    files = {f"t/python/{name}": path for name, path in python_modules()}
    files[f"t/{SCRIPT.name}"] = SCRIPT
    for name in PROGRAMS:
        program = Path(shutil.which(name, path="/usr/bin:/bin") or name)
        files[f"usr/bin/{name}"] = program
        files |= {str(library).lstrip("/"): library for library in libraries(program)}
    for _, module in python_modules():
        if module.suffix == ".so":
            files |= {str(library).lstrip("/"): library for library in libraries(module)}
    for module in Path("/usr/lib/x86_64-linux-gnu/qemu").glob("accel-tcg-x86_64.so"):
        files[str(module).lstrip("/")] = module
    for directory in (Path("/usr/share/qemu"), Path("/usr/share/seabios")):
        files |= {f"t/firmware/{name}": directory / name for name in FIRMWARE if (directory / name).exists()}
    folders = {str(parent) for name in files for parent in Path(name).parents} - {".", "lib", "lib64"}
    for folder in sorted(folders):
        yield cpio.directory(folder)
    for name, path in files.items():
        yield cpio.file(name, path.read_bytes(), 0o755)
    yield cpio.file("t/loop", bytes(mbr(b"\xeb\xfe")))  # a boot sector: jmp $


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script has found inside a guest."""
    bundle = tmp_path_factory.mktemp("bundle")
    for name in ("vmlinuz", "initrd"):
        (bundle / name).symlink_to(DEFAULT_BUNDLE / name)
    (bundle / "userland").write_bytes(cpio.archive(userland()))
    (bundle / "uklaunch.toml").write_text('kernel = "vmlinuz"\ninitrd = ["initrd", "userland"]\nfamily = "linux"\n')
    script = "PATH=/usr/bin:/bin PYTHONHOME=/t PYTHONPATH=/t/python python3 -SB /t/held_to_limits.py"
    run = ("run", str(bundle), "--name", "g", "--pod", "limits", "--rm", "-m", "768M", "--uplink", "none")
    result = uklaunch(*run, "--cmdline", script, timeout_s=150)
    assert result.returncode == 0, shown(result)
    return dict(json.loads(line) for line in re.findall(r"^FOUND (.*)$", result.stdout, re.MULTILINE))


def test_half_a_cpu_is_half_a_cpu(found: dict[str, Any]) -> None:
    print(f"QEMU at work took {found['half']:.2f} of a CPU with --cpus 0.5, {found['unlimited']:.2f} without")
    assert 0.4 < found["half"] < 0.55
    assert found["unlimited"] > 0.75


def test_a_vmm_that_takes_too_much_memory_ends_and_nobody_else(found: dict[str, Any]) -> None:
    memory = found["memory"]
    assert memory["code"] == -signal.SIGKILL
    assert memory["oom_group_kill"] == 1
    assert memory["limits"] == {"cpu.max": "max 100000", "memory.max": str(64 << 20), "pids.max": "161"}


def test_a_vmm_that_forks_without_end_comes_to_one(found: dict[str, Any]) -> None:
    assert "fork" in found["threads"]["said"]
    assert found["threads"]["max"] >= 1


def test_cgroups_go_with_their_vmms(found: dict[str, Any]) -> None:
    assert found["left"] == []


def test_a_unit_of_systemds_keeps_its_vmm(found: dict[str, Any]) -> None:
    assert found["delegated"].pop("share") == pytest.approx(0.5, abs=0.1)
    assert found["delegated"] == {
        "homes": [str(UNIT), str(UNIT)],
        "to be moved out of": [True, False],
        "supervisor": f"0::/{UNIT.name}/supervisor",
    }


def test_a_unit_takes_the_next_supervisor_of_a_vmm_that_lives_on(found: dict[str, Any]) -> None:
    limited = {"cpu.max": "50000 100000", "memory.max": str(256 << 20), "pids.max": str(cgroup.THREADS + 1)}
    assert found["replaced"] == {
        "before": limited,
        "refused": os.strerror(errno.EBUSY),
        "room": str(UNIT),
        "next": ["", {}, limited, f"0::/{UNIT.name}/supervisor"],
    }


# --- on this machine ---

# Eight MiB, then a hundred requests; seconds of the guest's clock for each, in hundredths.
READ = """
now() { cut -d" " -f1 /proc/uptime | tr -d .; }
a=$(now); dd if=/dev/vda of=/dev/null bs=1M count=8 2>/dev/null
b=$(now); dd if=/dev/vda of=/dev/null bs=4k count=100 skip=4096 iflag=direct 2>/dev/null
c=$(now); echo TOOK $((b - a)) $((c - b))
"""


def test_disks_are_held_to_their_rates(tmp_path: Path) -> None:
    for name in ("vmlinuz", "initrd"):
        (tmp_path / name).symlink_to(DEFAULT_BUNDLE / name)
    (tmp_path / "disk").write_bytes(bytes(32 << 20))
    (tmp_path / "uklaunch.toml").write_text(
        'kernel = "vmlinuz"\ninitrd = "initrd"\ndisks = ["disk"]\nfamily = "linux"\n'
    )
    run = ("run", str(tmp_path), "--name", "g", "--pod", "limits", "--rm", "--uplink", "none", "--cmdline", READ)
    result = uklaunch(*run, "--disk-rate", "4M", "--disk-iops", "50")
    assert result.returncode == 0, shown(result)
    eight_mib, hundred = (int(text) / 100 for text in re.findall(r"^TOOK (\d+) (\d+)", result.stdout, re.MULTILINE)[0])
    print(f"8 MiB at 4 MiB/s: {eight_mib} s; 100 requests at 50/s: {hundred} s")
    assert 1.6 < eight_mib < 2.6
    assert 1.6 < hundred < 2.6


def inspect() -> dict[str, Any]:
    said = uklaunch("inspect", "limits/g")
    assert said.returncode == 0, shown(said)
    return dict(json.loads(said.stdout))


def rates() -> dict[str, str]:
    """By link, as tc says them."""
    qdiscs = ("ip", "netns", "exec", "uk-limits", "tc", "qdisc", "show")
    said = subprocess.run(qdiscs, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"tbf 756b: dev (\w+) root .* rate (\w+)", said))


def test_limits_are_a_guests_for_life() -> None:
    """Seen from outside, and under a new supervisor too. Its VMM has a cgroup, where there is cgroup v2 at all."""
    both = {"uktap2": "50Mbit", "ukrate2": "10Mbit"}
    run = ("run", "default", "--name", "g", "--pod", "limits", "-d", "--rm", "--uplink", "none", "--restart", "always")
    result = uklaunch(*run, "--net-rate", "50mbit:10mbit")
    try:
        assert result.returncode == 0, shown(result)
        guest = inspect()
        assert (guest["limits"]["net_in_bits"], guest["limits"]["net_out_bits"]) == (50_000_000, 10_000_000)
        assert rates() == both
        own = Path(f"/proc/{guest['vmm_pid']}/cgroup").read_text().partition("0::")[2].strip()
        home = cgroup.find_home()
        confined_here = home is not None and os.access(home.path.parent, os.W_OK)
        if home is not None and confined_here:
            assert guest["cgroup"].endswith(own)
            files = {"cpu": "cpu.max", "memory": "memory.max", "pids": "pids.max"}
            assert set(guest["cgroup_limits"]) == {files[name] for name in home.controllers & set(files)}
        pidfd = os.pidfd_open(guest["supervisor_pid"])
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], 30)
        os.close(pidfd)
        taken = uklaunch("supervise", "-d", "limits/g")
        assert taken.returncode == 0, shown(taken)
        removed = ("ip", "-n", "uk-limits", "link", "del", "ukrate2")
        with events.watching() as news:  # its next run is ready: by then all is as it was
            subprocess.run(removed, check=True)
            os.kill(guest["vmm_pid"], signal.SIGKILL)
            while inspect()["status"] != "ready" or inspect()["vmm_pid"] == guest["vmm_pid"]:
                assert select.select([news], [], [], 60)[0]
                os.read(news, 1 << 16)
        assert rates() == both
        if confined_here:
            assert Path(f"/proc/{inspect()['vmm_pid']}/cgroup").read_text().partition("0::")[2].strip() == own
    finally:
        uklaunch("rm", "--force", "limits/g")
    assert cgroup.existing(guest["cgroup"]) is None
