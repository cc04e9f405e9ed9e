"""Looking inside a played pod, with the commands as a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher import net, state
from launcher.model import Port, Protocol

from ..cli import COMMAND, shown, uklaunch
from .conftest import PLAN, PlayedGuest, PlayedPod, played_guest, played_pod
from .test_localhost import open_in

pytestmark = pytest.mark.net

POD = "observe"
PATIENCE_S = 20


@pytest.fixture(scope="module")
def pod() -> Iterator[PlayedPod]:
    """Two guests, `web` and `db`, with the records that their supervisors would keep; web has declared 8080."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(played_pod(2, ports={2: (Port(8080),)}, name=POD))
        for guest, name in zip(made.guests, ("web", "db"), strict=True):
            stack.enter_context(recorded(guest, name))
        yield made


@contextlib.contextmanager
def recorded(guest: PlayedGuest, name: str) -> Iterator[None]:
    record = state.GuestRecord(
        name=name,
        pod=POD,
        index=guest.index,
        mac="",
        ipv4=str(guest.nic.ipv4.ip),
        ipv6=str(guest.nic.ipv6.ip),
        tap=f"uktap{guest.index}",
        image="played",
        family="linux",
        vmm="qemu",
        accel="kvm",
        memory_mib=128,
        cpus=1,
        supervisor_pid=os.getpid(),
        started_at=time.time(),
    )
    state.write_guest(record)
    try:
        with state.lock(record.directory / "supervisor.lock"):
            yield
    finally:
        state.forget_guest(POD, name)


@contextlib.contextmanager
def listening(netns: Path, address: str, port: int) -> Iterator[socket.socket]:
    with open_in(netns, 6 if ":" in address else 4, "tcp") as sock:
        sock.bind((address, port))
        sock.listen()
        yield sock


@contextlib.contextmanager
def connected(netns: Path, address: str, server: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a conversation with the server, which the client dials at the address."""
    with open_in(netns, 6 if ":" in address else 4, "tcp") as client:
        client.connect((address, server.getsockname()[1]))
        served, _ = server.accept()
        with served:
            yield client, served


@contextlib.contextmanager
def running(*args: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on. Should it say nothing where it is listened to, it is killed, and reading ends."""
    with subprocess.Popen(
        [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        timer = threading.Timer(PATIENCE_S, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def as_json(*args: str) -> Any:
    result = uklaunch(*args, "--json")
    assert result.returncode == 0, shown(result)
    return json.loads(result.stdout)


# --- flows -f ---


def events(process: subprocess.Popen[str], port: int) -> Iterator[dict[str, Any]]:
    """Those of flows to the port."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["flow"]["dialled"]["port"] == port:
            yield event


def test_flows_are_followed(pod: PlayedPod) -> None:
    web = pod.guests[0]
    with (
        listening(web.netns, "0.0.0.0", 8080) as server,
        connected(pod.netns, "127.0.0.1", server),
        running("flows", POD, "-f", "--json", "--interval", "0.1") as process,
    ):
        seen = events(process, 8080)
        assert next(seen)["what"] == "present"
        with connected(pod.netns, "127.0.0.1", server) as (client, served):
            source = client.getsockname()[1]
            client.sendall(bytes(1000))
            event = next(seen)
            assert (event["what"], event["flow"]["opener"]["port"]) == ("opened", source)
            assert event["flow"]["server"]["guest"] == web.index
            received = 0
            while received < 1000:
                received += len(served.recv(1000))
        ended = next(event for event in seen if event["what"] == "ended")
        assert ended["flow"]["opener"]["port"] == source
        assert ended["flow"]["bytes_sent"] > 1000
        assert ended["flow"]["packets_received"] >= 3
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130


def test_following_ends_with_the_pod() -> None:
    with played_pod(0, name="observe-brief"):
        process = subprocess.Popen([*COMMAND, "flows", "observe-brief", "-f"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().split()[:2] == ["TIME", "EVENT"]
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (0, "")


# --- ports ---


def test_ports(pod: PlayedPod) -> None:
    web, db = pod.guests
    with (
        listening(db.netns, "0.0.0.0", 5432) as server,
        connected(pod.netns, "127.0.0.1", server),
        listening(pod.netns, "127.0.0.1", 8080),
        listening(pod.netns, "::1", 6379),
    ):
        found = {(one["number"], one["family"], one["owner"]): one for one in as_json("ports", POD)}
    assert found[5432, 4, "db"]["known"] == "learned"
    assert found[8080, 6, "web"] == {
        "number": 8080,
        "protocol": "tcp",
        "family": 6,
        "owner": "web",
        "guest": web.index,
        "pid": None,
        "address": None,
        "known": "declared",
        "conflict": "",
    }
    ours = Path("/proc/self/comm").read_text().strip()
    assert found[8080, 4, "web"]["conflict"] == f"shadowed by {ours}"
    assert found[8080, 4, ours]["conflict"] == "shadows guest web"
    assert (found[6379, 6, ours]["address"], found[6379, 6, ours]["pid"]) == ("::1", os.getpid())


# --- stats ---


def test_totals(pod: PlayedPod) -> None:
    before = {one["name"]: one for one in as_json("stats", POD, "--once")}
    with (
        listening(pod.guests[0].netns, "0.0.0.0", 8080) as server,
        connected(pod.netns, "127.0.0.1", server) as (client, served),
    ):
        served.sendall(bytes(200_000))
        left = 200_000
        while left:
            left -= len(client.recv(left))
        after = {one["name"]: one for one in as_json("stats", POD, "--once")}
    sent = {name: one["traffic"]["bytes_out"] - before[name]["traffic"]["bytes_out"] for name, one in after.items()}
    assert sent["web"] > 200_000  # with headers
    assert sent["db"] < 10_000
    assert sent[""] == sent["web"] + sent["db"]
    assert sent["lo"] < 10_000  # what the router redirects does not pass lo's sending side
    assert after["web"]["flows"] == 1
    assert [one["kind"] for one in after.values()] == ["pod", "guest", "guest", "link", "link"]


def test_rates_are_blocks_when_stdout_is_no_terminal(pod: PlayedPod) -> None:
    with running("stats", POD, "--interval", "0.1") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().rstrip() for _ in range(12)]
    assert lines[0].split()[:3] == ["POD", "/", "GUEST"]
    assert [line.split()[0] for line in lines[1:6]] == [POD, "web", "db", "(lo)", "(eth0)"]
    assert lines[6] == ""
    assert lines[7] == lines[0]


def test_rates_are_redrawn_on_a_terminal(pod: PlayedPod) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([*COMMAND, "stats", POD, "--interval", "0.1"], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while said.count(b"\x1b[H") < 3:
            assert select.select([ours], [], [], PATIENCE_S)[0], said
            said += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
    os.close(ours)
    assert said.count(b"\x1b[2J") == 1
    assert b"web" in said


# --- pcap ---


def captured(file: Path) -> set[tuple[str, str, str]]:
    """Interface, source, destination."""
    command = ["tshark", "-r", str(file), "-T", "fields", "-e", "frame.interface_name", "-e", "ip.src", "-e", "ip.dst"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {(*line.split("\t"),) for line in out.splitlines()}  # type: ignore[misc]


@contextlib.contextmanager
def capturing(target: str, file: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    with running("pcap", target, "-w", str(file), *words) as process:
        assert process.stderr is not None
        assert "capturing" in process.stderr.readline()
        yield process


def interrupted(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> str:
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    return err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pods_packets(pod: PlayedPod, tmp_path: Path, number: signal.Signals) -> None:
    """What the help says one sees where."""
    file = tmp_path / "pod.pcapng"
    with capturing(POD, file, "tcp", "port", "8080") as process:
        with (
            listening(pod.guests[0].netns, "0.0.0.0", 8080) as server,
            connected(pod.netns, "127.0.0.1", server) as (client, served),
        ):
            served.sendall(b"hello")
            assert client.recv(10) == b"hello"
        said = interrupted(process, number)
    assert "packets captured: lo " in said
    assert file.read_bytes()[:4] == b"\x0a\x0d\x0d\x0a"  # a section header block: pcapng, not pcap
    bridge, guest = str(PLAN.ipv4.ip), str(PLAN.guest_ipv4(2).ip)
    assert captured(file) == {
        ("uktap2", bridge, guest),
        ("uktap2", guest, bridge),
        ("lo", "127.0.0.1", "127.0.0.1"),  # the guest's half of it: see the next assertion
    }
    out = subprocess.run(
        ["tshark", "-r", str(file), "-Y", 'frame.interface_name == "lo" && tcp.dstport == 8080'],
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout == ""


def test_a_guests_packets_to_stdout(pod: PlayedPod, tmp_path: Path) -> None:
    """`-w -` writes what a file would have; and a number of packets ends it."""
    file = tmp_path / "guest.pcapng"
    with (
        file.open("wb") as out,
        subprocess.Popen(
            [*COMMAND, "pcap", f"{POD}/web", "-w", "-", "--count", "3", "tcp"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stderr is not None
        assert "capturing uktap2;" in process.stderr.readline()
        with listening(pod.guests[0].netns, "0.0.0.0", 8080) as server, connected(pod.netns, "127.0.0.1", server):
            pass
        assert process.wait(PATIENCE_S) == 0
    assert {interface for interface, *_ in captured(file)} == {"uktap2"}


def test_guests_that_come_and_go_while_capturing(pod: PlayedPod, tmp_path: Path) -> None:
    file = tmp_path / "pod.pcapng"
    with capturing(POD, file) as process, played_guest(pod.record, pod.table, 9):
        assert "came later, not captured: uktap9" in interrupted(process)
    with contextlib.ExitStack() as later:
        with played_guest(pod.record, pod.table, 10):
            process = later.enter_context(capturing(POD, file))
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        assert "uktap10 is gone" in err
    captured(file)  # it can be read


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ((f"{POD}/nobody", "-w", "x"), 2, "nobody"),
        ((POD, "-w", "x", "tcp", "prt", "80"), 2, "'tcp prt 80' is not valid"),
        ((POD, "-w", "/nowhere/x"), 125, "cannot write /nowhere/x: No such file"),
    ],
)
def test_what_cannot_be_captured(pod: PlayedPod, args: tuple[str, ...], code: int, says: str) -> None:
    result = uklaunch("pcap", *args)
    assert result.returncode == code, shown(result)
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_dumpcap_is_named_with_its_package(pod: PlayedPod) -> None:
    result = uklaunch("pcap", POD, "-w", "x", wrap='PATH=/nowhere exec "$@"')
    assert result.returncode == 125, shown(result)
    assert "apt-get install wireshark-common" in result.stderr


# --- graph, metrics ---


def test_the_picture(pod: PlayedPod, tmp_path: Path) -> None:
    file = tmp_path / "pod.svg"
    with listening(pod.guests[0].netns, "0.0.0.0", 8080) as server, connected(pod.netns, "127.0.0.1", server):
        result = uklaunch("pod", "graph", POD, "-o", str(file), "--interval", "0.1")
    assert result.returncode == 0, shown(result)
    texts = [element.text for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]
    assert {"pod observe", "web", "db", "8080 tcp", "idle"} <= set(texts)


def test_metrics(pod: PlayedPod) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running("metrics", "--listen", str(port)) as process:
        assert process.stderr is not None
        address = next(word for word in process.stderr.readline().split() if word.startswith("http://")).rstrip(";")
        with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
            scraped = answer.read().decode()
        taken = uklaunch("metrics", "--listen", str(port))
        assert taken.returncode == 125, shown(taken)
        assert "in use" in taken.stderr
        assert len(taken.stderr.splitlines()) == 1
    values = {
        (one.name, one.labels.get("guest") or one.labels.get("reason")): one.value
        for family in text_string_to_metric_families(scraped)
        for one in family.samples
        if one.labels.get("pod") in (POD, None)
    }
    assert values["uklaunch_scrape_error", None] == 0
    assert values["uklaunch_guest_up", "web"] == 1
    assert values["uklaunch_guest_receive_bytes_total", "web"] > 0
    assert values["uklaunch_drops_total", "spoofed-mac"] == 0
    assert values["uklaunch_redirected_packets_total", None] > 0
    assert values["uklaunch_guest_start_time_seconds", "web"] <= time.time()


def test_drops_are_counted(pod: PlayedPod) -> None:
    def refused_by_some() -> float:
        families = text_string_to_metric_families(uklaunch("metrics", "--once").stdout)
        (value,) = (
            one.value
            for family in families
            for one in family.samples
            if one.name == "uklaunch_drops_total" and one.labels == {"pod": POD, "reason": "refused-by-some"}
        )
        return value

    before = refused_by_some()
    with open_in(pod.netns, 4, "tcp") as client:
        assert client.connect_ex(("127.0.0.1", 7)) != 0
    assert refused_by_some() == before + 1  # of two guests, the first one's


def test_udp_sockets_are_listed_too(pod: PlayedPod) -> None:
    with open_in(pod.netns, 6, "udp") as sock:
        sock.bind(("::", 5353))
        found = [one for one in as_json("ports", POD) if one["number"] == 5353]
    assert [(one["protocol"], one["family"]) for one in found] == [(Protocol.UDP, 4), (Protocol.UDP, 6)]


# --- drops ---


def test_drops_are_counted_and_followed(pod: PlayedPod) -> None:
    """Guest `web` speaks with the address of `db`."""
    command = [*COMMAND, "drops", POD, "-f", "--limit", "3", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lie = socket.AF_PACKET, socket.SOCK_RAW
        with net.in_netns(pod.guests[0].netns, lambda: socket.socket(*lie)) as sock:
            sock.bind(("eth0", 0))
            mac, ipv4 = pod.guests[0].nic.mac, pod.guests[1].nic.ipv4.ip.packed
            arp = bytes.fromhex("0001080006040001") + mac + ipv4 + bytes(6) + ipv4
            first = None
            while first is None:  # it takes the command a moment to begin
                sock.send(b"\xff" * 6 + mac + b"\x08\x06" + arp)
                if select.select([process.stdout], [], [], 0.05)[0]:
                    first = json.loads(process.stdout.readline())
            for _ in range(20):
                sock.send(b"\xff" * 6 + mac + b"\x08\x06" + arp)
        lines = [first]
        while "more" not in lines[-1]:
            lines.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGINT)
    assert (first["reason"], first["guest"], first["ethertype"]) == ("spoofed-arp", 2, 0x0806)
    assert lines[-1]["more"] >= 10
    result = uklaunch("drops", POD)
    assert "spoofed-arp" in result.stdout, shown(result)
