"""QEMU's arguments, and the choice between KVM and emulation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import UklaunchError
from launcher.imagefile import ImageFile
from launcher.model import Accel, Boot, Machine
from launcher.vmm import accel
from launcher.vmm.files import DiskFds, Fds
from launcher.vmm.qemu import arguments, pick_machine

from ..fixtures import NIC

BOOT = Boot(
    kernel=ImageFile(Path(__file__)),
    cmdline="a b",
    memory_mib=64,
    cpus=2,
    nic=NIC,
    machines=(Machine.MICROVM, Machine.Q35),
)
FDS = Fds(tap=3, qmp=4, console=5, kernel=6, initrd=7)


def option(args: list[str], name: str) -> list[str]:
    return [value for key, value in itertools.pairwise(args) if key == name]


@pytest.mark.parametrize(("machine", "bus"), [(Machine.MICROVM, "device"), (Machine.PC, "pci"), (Machine.Q35, "pci")])
def test_devices_fit_the_board(machine: Machine, bus: str) -> None:
    args = arguments(BOOT, machine, Accel.TCG, FDS)
    assert all(device.startswith((f"virtio-net-{bus}", f"virtio-rng-{bus}")) for device in option(args, "-device"))
    assert option(args, "-netdev") == ["tap,id=net0,fd=3"]
    assert option(args, "-m") == ["64M"]
    assert "--preconfig" in args  # the command line comes later: arguments are for all to read
    assert not any("a b" in word for word in args)
    assert option(args, "-kernel") == ["/proc/self/fd/6"]
    assert "-S" in args
    assert option(args, "-sandbox")[0].startswith("on,")


def test_a_board_with_pci_hears_of_panics() -> None:
    boot = replace(BOOT, tells_panics=True)
    assert "pvpanic-pci" in option(arguments(boot, Machine.Q35, Accel.TCG, FDS), "-device")
    assert "pvpanic-pci" not in option(arguments(boot, Machine.MICROVM, Accel.KVM, FDS), "-device")


def test_a_watchdog_needs_pci() -> None:
    boot = replace(BOOT, watchdog=True)
    assert pick_machine(boot, Accel.KVM) is Machine.Q35
    assert "i6300esb" in option(arguments(boot, Machine.Q35, Accel.KVM, FDS), "-device")
    with pytest.raises(UklaunchError, match="board, microvm, has no PCI"):
        pick_machine(replace(boot, machines=(Machine.MICROVM,)), Accel.KVM)


def test_a_guest_writes_to_an_overlay_and_a_whole_disk_boots() -> None:
    boot = replace(BOOT, kernel=None)
    disks = (DiskFds(base=8, qcow2=True, overlay=9), DiskFds(base=10, qcow2=False, overlay=None))
    args = arguments(boot, Machine.Q35, Accel.KVM, replace(FDS, kernel=None, initrd=None, disks=disks))
    assert option(args, "-kernel") == []
    nodes = option(args, "-blockdev")
    assert sum('"read-only": false' in node for node in nodes) == 1
    assert any('"backing": "disk0-base"' in node for node in nodes)
    assert '"backing": null' in next(node for node in nodes if '"node-name": "disk0-base",' in node)
    bootable = [device for device in option(args, "-device") if "bootindex=0" in device]
    assert bootable == ["virtio-blk-pci,drive=disk0,bootindex=0"]


def test_guests_without_offload_are_spared_it() -> None:
    args = arguments(replace(BOOT, guest_csum=False), Machine.PC, Accel.TCG, FDS)
    assert any("guest_csum=off" in device for device in option(args, "-device"))


def test_microvm_is_for_kvm() -> None:
    assert pick_machine(BOOT, Accel.KVM) is Machine.MICROVM
    assert pick_machine(BOOT, Accel.TCG) is Machine.Q35
    assert pick_machine(replace(BOOT, machines=(Machine.MICROVM,)), Accel.TCG) is Machine.MICROVM


@pytest.mark.parametrize(
    ("mode", "flags", "usable", "why"),
    [
        (0o660, "vmx", True, ""),
        (0o660, "svm", True, ""),
        (0o666, "vmx", True, ""),
        (0o600, "vmx", False, "for root alone"),
        (0o660, "fpu", False, "no vmx or svm"),
        (None, "vmx", False, "No such file"),
    ],
)
def test_kvm_is_believed_only_when_the_cpu_shows_it(
    mode: int | None, flags: str, usable: bool, why: str, tmp_path: Path
) -> None:
    device, cpuinfo = tmp_path / "kvm", tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    if mode is not None:
        device.touch()
        device.chmod(mode)
    status = accel.kvm_status(device, cpuinfo)
    assert status.usable is usable
    assert why in status.why
    assert usable or status.remedy


def test_kvm_demanded_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "kvm_status", lambda: accel.KvmStatus(usable=False, why="none", remedy="buy one"))
    assert accel.choose(Accel.AUTO)[0] is Accel.TCG
    with pytest.raises(UklaunchError, match="no KVM: none"):
        accel.choose(Accel.KVM)
