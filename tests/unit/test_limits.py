"""Limits as they are written on a command line, and what is made of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from launcher import cgroup
from launcher.errors import UsageError
from launcher.limits import Limits, burst_bytes, parse_cpus
from launcher.model import Accel, Machine
from launcher.vmm.files import DiskFds
from launcher.vmm.qemu import arguments, overhead_mib

from .test_vmm import BOOT, FDS, option


@pytest.mark.parametrize(
    ("text", "vcpus", "share"),
    [("1", 1, None), ("2", 2, None), ("2.0", 2, None), ("0.5", 1, 0.5), ("1.5", 2, 1.5), ("0.01", 1, 0.01)],
)
def test_cpus(text: str, vcpus: int, share: float | None) -> None:
    assert parse_cpus(text) == (vcpus, share)


def test_every_limit() -> None:
    assert Limits.parse() == Limits()
    assert Limits.parse(cpus="0.5", disk_rate="10M", disk_iops=100, net_rate="50mbit:1.5gbit") == Limits(
        cpus=0.5, disk_bytes=10 << 20, disk_iops=100, net_in_bits=50_000_000, net_out_bits=1_500_000_000
    )
    assert Limits.parse(net_rate="500kbit") == Limits(net_in_bits=500_000, net_out_bits=500_000)
    assert Limits.parse(net_rate="1gbit:") == Limits(net_in_bits=10**9)
    assert Limits.parse(net_rate=":1gbit") == Limits(net_out_bits=10**9)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cpus": "0"}, "--cpus 0 is not between"),
        ({"cpus": "0.001"}, "--cpus 0.001 is not between"),
        ({"cpus": "256"}, "--cpus 256 is not between"),
        ({"cpus": "nan"}, "--cpus nan is not between"),
        ({"cpus": "-1"}, "--cpus -1 is not between"),
        ({"cpus": "٢"}, "is not between"),  # digits, but not ASCII's
        ({"disk_rate": "10"}, "--disk-rate '10' is not a rate"),
        ({"disk_rate": "1K"}, "--disk-rate '1K' is not a rate"),
        ({"net_rate": "50"}, "--net-rate: '50' is no rate"),
        ({"net_rate": ":"}, "--net-rate ':' is no rate"),
        ({"net_rate": "1kbit"}, "is not between 100kbit"),
        ({"net_rate": "99gbit"}, "is not between 100kbit"),
        ({"net_rate": "1mbit:2mbit:3mbit"}, "'2mbit:3mbit' is no rate"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError, match=r".") as raised:
        Limits.parse(**options)  # type: ignore[arg-type]
    assert complaint in raised.value.message


def test_a_burst_takes_the_largest_packets() -> None:
    assert burst_bytes(10**5) >= 2 << 16
    assert burst_bytes(10**10) == 12_500_000  # 10 ms


def test_a_vmm_gets_what_it_needs_and_no_more() -> None:
    wanted = cgroup.settings(Limits(cpus=0.5), memory_mib=256, cpus=1)
    assert wanted == {
        "memory.max": str(256 << 20),
        "memory.oom.group": "1",
        "pids.max": str(cgroup.THREADS + 1),
        "cpu.max": "50000 100000",
    }
    assert "cpu.max" not in cgroup.settings(Limits(), memory_mib=256, cpus=2)
    assert overhead_mib(Accel.KVM, 128, 1) < overhead_mib(Accel.TCG, 128, 1) < 512
    assert overhead_mib(Accel.TCG, 128, 1) > 128 + 92  # the cache of translated code, full, and what was measured


def test_all_disks_share_one_bucket() -> None:
    disks = (DiskFds(base=8, qcow2=True, overlay=9), DiskFds(base=10, qcow2=False, overlay=None))
    fds = replace(FDS, disks=disks)
    args = arguments(BOOT, Machine.Q35, Accel.KVM, fds, Limits(disk_bytes=1 << 20, disk_iops=100))
    (group,) = map(json.loads, option(args, "-object"))
    assert group["limits"] == {"bps-total": 1 << 20, "iops-total": 100}
    nodes = [json.loads(node) for node in option(args, "-blockdev")]
    throttled = {node["node-name"]: node for node in nodes if node["driver"] == "throttle"}
    assert {node["file"] for node in throttled.values()} == {"disk0", "disk1"}
    drives = {text.split("drive=")[1].split(",")[0] for text in option(args, "-device") if "drive=" in text}
    assert drives == set(throttled)
    assert "throttle" not in " ".join(arguments(BOOT, Machine.Q35, Accel.KVM, fds))
