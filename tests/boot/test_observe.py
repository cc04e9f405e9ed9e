"""Looking inside a pod with a real guest: its QEMU's CPU time and memory, and what ends when it ends."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .. import leaks
from ..cli import COMMAND, ok, uklaunch

pytestmark = pytest.mark.boot

POD = "bootobserve"
GUEST = f"{POD}/web"
PATIENCE_S = 30


def guest_metrics() -> dict[str, float]:
    return {
        one.name: one.value
        for family in text_string_to_metric_families(ok("metrics", "--once"))
        for one in family.samples
        if one.labels.get("guest") == "web"
    }


def test_a_real_guest_is_looked_at(tmp_path: Path) -> None:
    before = leaks.ours()
    file = tmp_path / "web.pcapng"
    ok(
        "run", "default", "--pod", POD, "--name", "web", "-d", "-m", "96M", "--ready-port", "8080",
        "--cmdline", "mkdir /w; echo hi >/w/index.html; httpd -f -p 8080 -h /w",
    )  # fmt: skip
    try:
        command = [*COMMAND, "pcap", GUEST, "-w", str(file)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as capture:
            assert capture.stderr is not None
            assert "capturing uktap2" in capture.stderr.readline()
            page = ok("pod", "exec", POD, "--", "curl", "-s", "http://localhost:8080")
            assert page == "hi\n"
            (web,) = (one for one in json.loads(ok("stats", POD, "--once", "--json")) if one["name"] == "web")
            metrics = guest_metrics()
            drawn = ok("pod", "graph", POD, "--interval", "0.2")
            ports = json.loads(ok("ports", POD, "--json"))
            ok("stop", GUEST)
            _, said = capture.communicate(timeout=PATIENCE_S)
        assert capture.returncode == 0
        assert "uktap2 is gone" in said
        after = guest_metrics()
    finally:
        uklaunch("rm", "--force", GUEST)
    assert web["cpu_s"] > 0.05
    assert 20 << 20 < web["memory_bytes"] < 1 << 30
    assert web["memory_limit_bytes"] == 96 << 20
    assert metrics["uklaunch_guest_up"] == 1
    assert 0 < metrics["uklaunch_guest_boot_duration_seconds"] < PATIENCE_S
    assert metrics["uklaunch_guest_cpu_seconds_total"] >= web["cpu_s"]
    assert metrics["uklaunch_guest_transmit_packets_total"] > 0
    assert after["uklaunch_guest_up"] == 0
    assert "uklaunch_guest_cpu_seconds_total" not in after
    assert "% CPU" in drawn
    assert {(one["number"], one["owner"], one["known"]) for one in ports} >= {(8080, "web", "learned")}
    command = ["tshark", "-r", str(file), "-Y", "http.request", "-T", "fields", "-e", "http.request.uri"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "/\n"
    assert leaks.ours() == before
