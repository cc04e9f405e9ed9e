"""The command line on real guests: what a person does with it in a day, and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import net, state
from launcher.arguments import DEFAULT_BUNDLE
from launcher.demo import demo

from .. import leaks
from ..cli import COMMAND, ok, shown, uklaunch

pytestmark = pytest.mark.boot

POD = "boottest"
BOOT_TIMEOUT_S = 60


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """After every test: all gone, also when the test fails half-way."""
    before = leaks.ours()
    yield
    left = leaks.ours() - before
    for record in state.guests(POD):
        uklaunch("rm", "--force", f"{record.pod}/{record.name}")
    if state.read_pod(POD) is not None:
        uklaunch("pod", "rm", "--force", POD)
    assert not left, "left behind:\n" + "\n".join(sorted(left))


@contextlib.contextmanager
def attached(*args: str) -> Iterator[subprocess.Popen[str]]:
    """`uklaunch run`, in the foreground of its own session."""
    process = subprocess.Popen(
        [*COMMAND, "run", "default", "--pod", POD, "--rm", *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came")


def test_demo() -> None:
    """The README's promise, whole: two guests, a container, TCP and UDP, both families, nothing left."""
    said: list[str] = []
    assert demo(DEFAULT_BUNDLE, said.append), "\n".join(said)


def test_a_guests_exit_code_and_environment_are_its_own() -> None:
    result = uklaunch(
        "run", "default", "--pod", POD, "--name", "n", "--rm", "-e", "A=it's $b",
        "--cmdline", 'echo "<$A> on $(hostname)"; exit 42',
    )  # fmt: skip
    assert result.returncode == 42, shown(result)
    assert "<it's $b> on n" in result.stdout


def test_stdin_waits_until_the_guest_has_opened_its_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the host: QEMU stands still for longer than any patience, in the middle of the boot."""
    steps = tmp_path / "steps"
    monkeypatch.setenv("UKLAUNCH_TIMELINE", str(steps))
    with attached("--name", "n", "--cmdline", "read -r word; echo it said $word") as process:
        assert process.stdin is not None
        process.stdin.write("hello\n")
        process.stdin.close()
        process.stdin = None
        while not steps.exists() or "resumed " not in steps.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        (record,) = state.guests(POD)
        os.kill(record.vmm_pid, signal.SIGSTOP)
        time.sleep(5.5)
        os.kill(record.vmm_pid, signal.SIGCONT)
        out, err = process.communicate(timeout=BOOT_TIMEOUT_S)
    assert "it said hello" in out, out + err


def test_stdin_reaches_the_guest_and_its_end_is_no_error() -> None:
    result = uklaunch("run", "default", "--pod", POD, "--rm", stdin="echo 6 times 7 is $((6*7)); exit 5\n")
    assert result.returncode == 5, shown(result)
    assert "6 times 7 is 42" in result.stdout


def test_a_guest_that_panics_is_told_from_one_that_powers_off() -> None:
    result = uklaunch("run", "default", "--pod", POD, "--rm", "--cmdline", "echo c >/proc/sysrq-trigger")
    assert result.returncode == 134, shown(result)


def test_a_day_in_the_life() -> None:
    """run -d, ps, inspect, logs, exec, flows, pod ls, stop, rm: one guest, seen from all sides."""
    out = ok(
        "run", "default", "--pod", POD, "--name", "web", "-d", "-m", "96M", "--expose", "8080",
        "--ready-port", "8080", "--cmdline", "mkdir /w; echo hi >/w/index.html; echo serving; httpd -f -p 8080 -h /w",
    )  # fmt: skip
    assert out == f"{POD}/web\n"
    (guest,) = json.loads(ok("ps", "--json"))
    assert (guest["status"], guest["memory_mib"], guest["ports"]) == ("ready", 96, ["8080/tcp"])
    assert "web" in ok("ps")
    assert "8080/tcp" in ok("ps")
    assert json.loads(ok("inspect", "web"))["pod"] == POD
    assert "serving" in ok("logs", f"{POD}/web")
    for host in ("127.0.0.1", "[::1]", "localhost"):
        assert ok("pod", "exec", POD, "--", "curl", "-sS", "--max-time", "5", f"http://{host}:8080") == "hi\n"
    joined = subprocess.run(  # stock tools join by the namespace's name
        ["ip", "netns", "exec", f"uk-{POD}", "curl", "-sS", "http://127.0.0.1:8080"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert joined.stdout == "hi\n"
    flows = json.loads(ok("flows", POD, "--json"))["flows"]
    assert any(flow["server"]["port"] == 8080 for flow in flows)
    assert "8080" in ok("flows", POD)
    inspected = json.loads(ok("pod", "inspect", POD))
    assert [port["number"] for port in inspected["ports"]] == [8080, 8080]  # IPv4 and IPv6
    assert POD in {row["name"] for row in json.loads(ok("pod", "ls", "--json"))}

    refused = uklaunch("pod", "rm", POD)
    assert (refused.returncode, "running guests: web" in refused.stderr) == (2, True)
    twice = uklaunch("run", "default", "--pod", POD, "--name", "web", "-d")
    assert (twice.returncode, "is running" in twice.stderr) == (2, True), shown(twice)

    ok("stop", "web")
    assert json.loads(ok("ps", "--json")) == []
    (ended,) = json.loads(ok("ps", "-a", "--json"))
    assert (ended["status"], ended["reason"], ended["exit_code"]) == ("exited", "stopped", 0)
    assert state.read_pod(POD) is None  # `run` made it, so it went with its last guest
    assert "serving" in ok("logs", "web")
    ok("stop", "web")
    ok("rm", "web")
    assert json.loads(ok("ps", "-a", "--json")) == []


def test_logs_of_a_guest_that_exits_at_once_are_kept_and_followed() -> None:
    result = uklaunch(
        "run", "default", "--pod", POD, "--name", "brief", "-d", "--no-wait", "--cmdline", "echo last words"
    )
    assert result.returncode == 0, shown(result)
    assert "last words" in ok("logs", "-f", "brief", timeout_s=BOOT_TIMEOUT_S)  # returns when the guest has ended
    ok("rm", "--force", "brief")


def test_detached_guest_that_ends_before_it_is_ready_says_so_and_keeps_its_logs() -> None:
    result = uklaunch(
        "run", "default", "--pod", POD, "--name", "n", "-d", "--ready-port", "80", "--cmdline", "echo why"
    )
    assert result.returncode == 125, shown(result)
    assert "ended before it was ready" in result.stderr
    assert "why" in ok("logs", "n")
    ok("rm", "n")


def test_two_guests_of_a_lasting_pod_come_and_go() -> None:
    ok("pod", "create", POD)
    serve = "mkdir /w; hostname >/w/index.html; httpd -f -p $PORT -h /w"
    for name, port in (("a", "8001"), ("b", "8002")):
        ok(
            "run",
            "default",
            "--pod",
            POD,
            "--name",
            name,
            "-d",
            "-e",
            f"PORT={port}",
            "--ready-port",
            port,
            "--cmdline",
            serve,
        )
    get = ("pod", "exec", POD, "--", "curl", "-sS", "--max-time", "5")
    assert ok(*get, "http://127.0.0.1:8001") == "a\n"
    assert ok(*get, "http://[::1]:8002") == "b\n"
    ok("stop", "a")
    assert uklaunch(*get, "http://127.0.0.1:8001").returncode == 7  # refused, not hanging
    assert ok(*get, "http://127.0.0.1:8002") == "b\n"
    ok(
        "run",
        "default",
        "--pod",
        POD,
        "--name",
        "a",
        "-d",
        "-e",
        "PORT=8003",
        "--ready-port",
        "8003",
        "--cmdline",
        serve,
    )
    assert ok(*get, "http://127.0.0.1:8003") == "a\n"
    ok("pod", "rm", "--force", POD)
    ok("rm", "a", "b")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_guest_in_order(number: signal.Signals) -> None:
    with attached("--cmdline", "trap 'echo saved; exit 0' TERM; echo up; sleep 1000 & wait") as process:
        wait_for(process, "up")
        process.send_signal(number)
        out, _ = process.communicate(timeout=15)
        assert "saved" in out
        assert process.returncode == (130 if number is signal.SIGINT else 0)


def test_a_guest_that_will_not_power_down_is_ended_within_its_time() -> None:
    with attached(
        "--stop-timeout", "1", "--cmdline", "trap '' TERM HUP; echo up; while :; do sleep 1; done"
    ) as process:
        wait_for(process, "up")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=15)
        assert time.monotonic() - began < 5
        assert process.returncode == 0


@pytest.mark.parametrize("delay_s", [0.05, 0.15, 0.25, 0.35, 0.5, 0.8])
def test_ctrl_c_at_any_moment_of_a_launch_leaves_nothing(delay_s: float) -> None:
    with attached() as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode in (130, -signal.SIGINT), err  # the latter: Python itself was still starting
        assert "Traceback" not in err or process.returncode < 0


def test_a_supervisor_that_is_killed_leaves_a_guest_that_gc_reports_and_reaps() -> None:
    ok("run", "default", "--pod", POD, "--name", "n", "-d")
    (record,) = state.guests(POD)
    os.kill(record.supervisor_pid, signal.SIGKILL)
    with state.lock(record.directory / "supervisor.lock"):
        pass  # it is gone
    (guest,) = json.loads(ok("ps", "--json"))
    assert guest["status"] == "unsupervised"
    assert "runs without a supervisor; left" in ok("gc")
    assert "ended" in ok("gc", "--kill")
    assert ok("gc") == ""
    assert state.read_pod(POD) is None
    ok("rm", "n")


def test_qemu_that_is_killed_is_our_failure_and_the_next_run_works() -> None:
    ok("run", "default", "--pod", POD, "--name", "n", "-d")
    (record,) = state.guests(POD)
    os.kill(record.vmm_pid, signal.SIGKILL)
    with state.lock(record.directory / "supervisor.lock"):
        pass
    (ended,) = state.guests(POD)
    assert (ended.reason, ended.exit_code) == ("VMM failed", 125)
    ok("run", "default", "--pod", POD, "--name", "n", "-d", "--rm")
    ok("stop", "n")


def test_an_adopted_namespace_is_left_as_it_was() -> None:
    name = f"ukt-{os.getpid()}-cni"
    path = state.NETNS_DIR / name
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "lo", "clsact"], check=True)  # a stranger's
        before = snapshot(path, name)
        ok("run", "default", "--pod", POD, "--name", "n", "-d", "--rm", "--netns", str(path),
           "--ready-port", "80", "--cmdline", "httpd -f -p 80")  # fmt: skip
        assert (
            ok("pod", "exec", POD, "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://localhost")
            == "404"
        )
        assert snapshot(path, name) != before
        ok("stop", "n")
        assert snapshot(path, name) == before
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def snapshot(path: Path, name: str) -> object:
    def out(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    sysctls = net.write_sysctls(path, {})
    values = net.in_netns(path, lambda: [Path("/proc/sys", key).read_text() for key in net.LOOPBACK_SYSCTLS])
    filters = out("tc", "-n", name, "filter", "show", "dev", "lo", "egress")
    return sysctls, values, filters, out("tc", "-n", name, "qdisc"), out("ip", "-n", name, "-o", "addr")


def test_the_image_is_never_written() -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in DEFAULT_BUNDLE.iterdir()}
    ok("run", "default", "--pod", POD, "--rm", "--cmdline", "true")
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in DEFAULT_BUNDLE.iterdir()}


PARALLEL = 4


def test_parallel_launches_share_one_new_pod() -> None:
    command = [*COMMAND, "run", "default", "--pod", POD, "-d", "--rm", "--cmdline", "sleep 1000"]
    processes = [
        subprocess.Popen([*command, "--name", f"n{n}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(PARALLEL)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    records = [guest for guest in state.guests(POD) if guest.status == "ready"]
    assert len({guest.index for guest in records}) == PARALLEL
    ok("stop", *(f"{POD}/{guest.name}" for guest in records))
    assert state.read_pod(POD) is None


def test_a_script_in_python() -> None:
    """The README's example, as it stands there."""
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    script = readme.split("```python\n", 1)[1].split("```", 1)[0]
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "hello from the guest" in result.stdout


def test_doctor_finds_this_machine_fit() -> None:
    findings = {finding["need"]: finding for finding in json.loads(ok("doctor", "--json"))}
    assert all(finding["ok"] for finding in findings.values() if finding["required"])
    assert "KVM" in findings
    assert all(finding["remedy"] for finding in findings.values() if not finding["ok"])
