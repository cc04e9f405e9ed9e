"""Our units under a real systemd as PID 1, with real guests."""

from __future__ import annotations

import json
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.journal import LINE_BYTES

from ..systemd import SYSTEMD, UNITS, Host

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


KEYS = ", ".join(sorted(runpy.run_path(str(UNITS / "uklaunch-generator"))["GUEST"]))

# On that host: what JournalConsole does while journald has stopped, and when it goes on.
WRITE_TO_A_JOURNAL_THAT_HANGS = """
import json, os, signal, subprocess, time, trio
from launcher import journal

fields = ("SYSLOG_IDENTIFIER=uklaunch", "UKLAUNCH_POD=shop", "UKLAUNCH_GUEST=web")
show = ["systemctl", "show", "--value", "--property=MainPID", "systemd-journald"]
journald = int(subprocess.run(show, capture_output=True, check=True).stdout)
slowest_s = 0

async def beat():  # as the supervisor's watchdog does
    global slowest_s
    while True:
        before = time.monotonic()
        await trio.sleep(0.1)
        slowest_s = max(slowest_s, time.monotonic() - before)

async def main():
    console = journal.JournalConsole(sendv=journal._binding(), fields=fields)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        os.kill(journald, signal.SIGSTOP)
        try:
            for n in range(3000):
                await console.write(b"%d\\n" % n)
        finally:
            os.kill(journald, signal.SIGCONT)
        lost = console._lost
        subprocess.run(["journalctl", "--sync"], check=True)
        await console.write(b"it is back")
        await console.end_line()
        nursery.cancel_scope.cancel()
    print(json.dumps([3000 - lost, lost, slowest_s]))

trio.run(main)
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
            said = [entry["MESSAGE"] for entry in host.journal("--dmesg", "SYSLOG_IDENTIFIER=uklaunch-generator")]
            assert said[-1] == "/etc/uklaunch/broken.guest is left out: [Guest] Imag= is unknown; known are " + KEYS
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
        assert host.systemctl("is-active", WEB, code=None).strip() == "activating"
        host.wait_event(f"active {WEB}")
        assert guests(host) == {"web": "ready", "db": "ready"}


TAKEN_OVER = "until [ $(uklaunch events | grep -c 'taken over') = {count} ]; do sleep 0.1; done"


def vmm_pid(host: Host, guest: str) -> int:
    return int(json.loads(host.uklaunch("inspect", guest))["vmm_pid"])


def test_a_supervisor_that_hangs_is_replaced_and_its_guest_runs_on(host: Host) -> None:
    """By the watchdog; as one that was killed is."""
    host.drop_in(WEB, "[Service]\nWatchdogSec=2s\n")
    with host.booted():
        host.wait_event(f"active {WEB}")
        vmm = vmm_pid(host, "web")
        for restarts, (number, why) in enumerate(((signal.SIGSTOP, "watchdog"), (signal.SIGKILL, "signal")), 1):
            supervisor = int(host.show(WEB, "MainPID"))
            host.kill(supervisor, number)
            assert host.wait_event(f"active {WEB}") == [f"stopped {WEB} {why}", f"active {WEB}"]
            assert guests(host) == {"web": "ready", "db": "ready"}
            assert host.show(WEB, "MainPID") != str(supervisor)
            assert host.show(WEB, "NRestarts") == str(restarts)
            assert vmm_pid(host, "web") == vmm
        assert host.show(DB, "NRestarts") == "0"


def test_a_reload_is_a_new_supervisor_in_the_same_process(host: Host) -> None:
    with host.booted():
        host.wait_event(f"active {WEB}")
        before = host.show(WEB, "MainPID"), vmm_pid(host, "web")
        for count in (1, 2):
            host.systemctl("reload", WEB)
            host.run("timeout", "50", "sh", "-c", TAKEN_OVER.format(count=count))
            assert host.systemctl("is-active", WEB).strip() in ("active", "reloading")
        assert (host.show(WEB, "MainPID"), vmm_pid(host, "web")) == before
        assert "shop/web is ready at 169.254.77." in host.show(WEB, "StatusText")
        assert host.show(WEB, "WatchdogTimestampMonotonic") != "0"


def test_a_supervisor_that_does_not_stop_its_guest(host: Host) -> None:
    """It hears nothing of what systemd says, and is killed; what it has left is stopped in order."""
    host.drop_in(DB, "[Service]\nTimeoutStopSec=1s\nKillSignal=SIGWINCH\n")
    with host.booted():
        host.wait_event(f"active {WEB}")
        host.systemctl("stop", DB)
        host.wait_event(f"stopped {DB} timeout")
        assert guests(host) == {"web": "ready"}
        assert json.loads(host.uklaunch("gc", "--json")) == []
        assert len(host.run("pgrep", "qemu-system").split()) == 1


def test_a_guest_whose_supervisor_is_not_replaced(host: Host) -> None:
    """It is left, and said so; who starts its unit again goes on with it."""
    host.drop_in(WEB, "[Service]\nRestart=no\n")
    with host.booted():
        host.wait_event(f"active {WEB}")
        vmm = vmm_pid(host, "web")
        host.kill(int(host.show(WEB, "MainPID")), signal.SIGKILL)
        host.wait_event(f"stopped {WEB} signal")
        assert guests(host) == {"web": "unsupervised", "db": "ready"}
        host.systemctl("start", WEB)
        assert guests(host) == {"web": "ready", "db": "ready"}
        assert vmm_pid(host, "web") == vmm
        host.systemctl("stop", WEB)
        assert guests(host) == {"db": "ready"}


def test_a_router_of_sources_that_nobody_has_compiled_yet(host: Host) -> None:
    """The compiler too runs shut in. PrivateTmp= makes its cache an empty one."""
    host.drop_in("uklaunch-router.service", "[Service]\nEnvironment=UKLAUNCH_CACHE=/tmp/none\n")
    with host.booted():
        assert host.wait_event(f"active {WEB}")[0] == "active uklaunch-router.service"
        assert host.systemctl("is-active", "uklaunch-router.service").strip() == "active"


def test_a_console_in_the_journal(host: Host) -> None:
    """Of a guest that exits at once: every byte of every line."""
    command = "echo é; printf 'a\\000\\377b\\n\\nx'; head -c 40000 /dev/zero | tr '\\000' y; echo; "
    command += "printf 'last words'; exit 3"
    run = ("run", "default", "--pod", "brief", "--uplink", "none", "--log-driver", "journald", "--cmdline", command)
    host.without_guests()
    with host.booted():
        for name in ("one", "two"):  # neither has the other's lines
            host.uklaunch(*run, "--name", name, code=3)
        record = json.loads(host.uklaunch("inspect", "two"))
        assert (record["log"], record["log_driver"], record["exit_code"]) == (None, "journald", 3)
        entries = host.journal("UKLAUNCH_POD=brief", "UKLAUNCH_GUEST=two")
        assert {entry["SYSLOG_IDENTIFIER"] for entry in entries} == {"uklaunch"}
        assert {(entry["_TRANSPORT"], entry["PRIORITY"]) for entry in entries} == {("journal", "6")}
        long = "x" + 40000 * "y"
        pieces = [long[at : at + LINE_BYTES] for at in range(0, len(long), LINE_BYTES)]
        said = [entry["MESSAGE"] for entry in entries]
        assert said[said.index("é") : -2] == ["é", [*b"a\0\xffb"], "", *pieces]
        assert said[-2].startswith("last words")
        assert host.uklaunch("logs", "two", "-n", "2") == f"{said[-2]}\n{said[-1]}\n"
        assert "é\na\0\\xffb\n\nxy" in host.uklaunch("logs", "two")
        assert host.uklaunch("logs", "two", "--since", "1d").count("last words") == 1


def test_a_console_that_goes_to_the_journal_anyway_goes_there_once(host: Host) -> None:
    of_web = "LogDriver=journald\nCmdline=echo once; httpd -p 8080; while sleep 1; do echo tick; done\nReadyPort=8080\n"
    (host.directory / "etc" / "web.guest").write_text(WEB_GUEST + "[Guest]\n" + of_web)
    host.drop_in(WEB, "[Service]\nStandardOutput=journal\n")
    with host.booted():
        host.wait_event(f"active {WEB}")
        (entry,) = host.journal(f"_SYSTEMD_UNIT={WEB}", "MESSAGE=once")
        assert entry["UKLAUNCH_GUEST"] == "web"
        # And it goes on there under another supervisor.
        host.kill(int(entry["_PID"]), signal.SIGHUP)
        for command, text in (("uklaunch events", "taken over"), ("journalctl --lines=0 MESSAGE=tick", "tick")):
            host.run("bash", "-c", f"grep --max-count=1 '{text}' < <({command} --follow 2>/dev/null)")
        assert len(host.journal("MESSAGE=once")) == 1


def test_a_journal_that_hangs_costs_lines_and_nothing_else(host: Host) -> None:
    host.without_guests()
    with host.booted():
        kept, lost, slowest_s = json.loads(host.run(sys.executable, "-c", WRITE_TO_A_JOURNAL_THAT_HANGS))
        assert kept + lost == 3000
        assert slowest_s < 1
        entries = [entry["MESSAGE"] for entry in host.journal("UKLAUNCH_GUEST=web")]
        assert entries == [*(str(n) for n in range(kept)), f"journald did not take {lost} lines", "it is back"]
