"""Our units under a real systemd as PID 1, with real guests."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..systemd import SYSTEMD, Host

pytestmark = [pytest.mark.boot, pytest.mark.skipif(not SYSTEMD.exists(), reason="no systemd here")]

WEB, DB, SHOP = "uklaunch@web.service", "uklaunch@db.service", "uklaunch-pod@shop.service"

DB_TOML = 'image = "default"\npod = "shop"\nports = ["5432"]\nenv = { MODE = "edge" }\nmemory = "96M"\n'
SHOP_POD = "[Pod]\nUplink=none\n"
WEB_GUEST = f"""
[Unit]
After={DB}
[Guest]
Image=default
Pod=shop
Port=8080
Memory=96M
[Install]
WantedBy=uklaunch.target
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host.install(tmp_path) as host:
        furnish(host)
        yield host


def furnish(host: Host) -> None:
    """A pod with two guests of both kinds of files, and a file that is wrong."""
    etc = host.directory / "etc"
    (etc / "shop.pod").write_text(SHOP_POD)
    (etc / "db.toml").write_text(DB_TOML)
    (etc / "web.guest").write_text(WEB_GUEST)
    (etc / "broken.guest").write_text("[Guest]\nImag=default\n")
    host.want("uklaunch.target", DB)
    host.drop_in(DB, f"[Unit]\nRequires={SHOP}\nAfter={SHOP}\n")


def guests(host: Host) -> dict[str, str]:
    return {guest["name"]: guest["status"] for guest in json.loads(host.uklaunch("ps", "--json"))}


def test_guests_come_up_in_order_stop_in_order_and_come_back_after_a_reboot(host: Host) -> None:
    for _ in range(2):
        with host.booted():
            said = host.wait_event(f"active {WEB}")
            assert said == ["active uklaunch-router.service", f"active {SHOP}", f"active {DB}", f"active {WEB}"]
            assert guests(host) == {"web": "ready", "db": "ready"}
            assert "shop/web is ready at 169.254.77." in host.show(WEB, "StatusText")
            assert host.show(WEB, "Slice") == "uklaunch-shop.slice"
            assert host.show(WEB, "WatchdogUSec") == "30s"
            assert "1 pods" in host.uklaunch("router", "status")
        said = host.wait_event("stopped uklaunch-router.service success")
        assert said == [
            f"stopped {WEB} success",
            f"stopped {DB} success",
            f"stopped {SHOP} success",
            "stopped uklaunch-router.service success",
        ]


def test_a_unit_is_active_only_when_its_guest_is_ready(host: Host) -> None:
    with host.booted():
        host.systemctl("stop", WEB)
        host.wait_event(f"stopped {WEB} success")
        assert guests(host) == {"db": "ready"}
        host.systemctl("start", "--no-block", WEB)
        host.systemctl("stop", WEB)  # in the middle of its launch
        host.wait_event(f"stopped {WEB} success")
        assert guests(host) == {"db": "ready"}
        host.systemctl("start", "--no-block", WEB)
        assert host.systemctl("is-active", WEB, check=False).strip() == "activating"
        host.wait_event(f"active {WEB}")
        assert guests(host) == {"web": "ready", "db": "ready"}


def test_the_watchdog_ends_a_stopped_supervisor_and_starts_another(host: Host) -> None:
    host.drop_in(WEB, "[Service]\nWatchdogSec=2s\n")
    with host.booted():
        host.wait_event(f"active {WEB}")
        first = int(host.show(WEB, "MainPID"))
        host.kill(first, signal.SIGSTOP)
        assert host.wait_event(f"active {WEB}") == [f"stopped {WEB} watchdog", f"active {WEB}"]
        assert guests(host) == {"web": "ready", "db": "ready"}
        assert host.show(WEB, "MainPID") != str(first)
        assert host.show(WEB, "NRestarts") == "1"
        assert host.show(DB, "NRestarts") == "0"


def test_nothing_is_left_of_a_supervisor_that_was_killed(host: Host) -> None:
    """Not its QEMU, which systemd ends, and neither record nor rows that are not true any more."""
    host.drop_in(WEB, "[Service]\nRestart=no\n")
    with host.booted():
        host.wait_event(f"active {WEB}")
        host.kill(int(host.show(WEB, "MainPID")), signal.SIGKILL)
        host.wait_event(f"stopped {WEB} signal")
        assert guests(host) == {"db": "ready"}
        assert [guest["name"] for guest in json.loads(host.uklaunch("pod", "inspect", "shop"))["guests"]] == ["db"]
        assert json.loads(host.uklaunch("gc", "--json")) == []
        assert len(host.run("pgrep", "qemu-system").split()) == 1


def test_a_router_of_sources_that_nobody_has_compiled_yet(host: Host) -> None:
    """The compiler too runs shut in. PrivateTmp= makes its cache an empty one."""
    host.drop_in("uklaunch-router.service", "[Service]\nEnvironment=UKLAUNCH_CACHE=/tmp/none\n")
    with host.booted():
        assert host.wait_event(f"active {WEB}")[0] == "active uklaunch-router.service"
        assert host.systemctl("is-active", "uklaunch-router.service").strip() == "active"
