"""Out of the pod and into it: {guest, container} ↔ {outside, host}, TCP and UDP, both families, on real kernels."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest

import router
from launcher import control, firewall, net, pod, state, uplink
from launcher.errors import UklaunchError, UsageError
from launcher.model import Port, Protocol
from launcher.publish import Publish
from router import program

from ..cli import shown, uklaunch
from .conftest import PlayedPod, played_pod
from .outside import HOST, OUTSIDE, ip, rules
from .test_localhost import ANY, FAMILIES, KINDS, LOOPBACK, open_in, place, talk_tcp, talk_udp

pytestmark = pytest.mark.net

THE_HOST = Path("/proc/self/ns/net")
PROMPTLY_S = 0.3  # in which nothing may arrive that must not
ports = itertools.count(23000)


def talk(server: socket.socket, client: socket.socket, target: tuple[str, int], protocol: str) -> str:
    return talk_tcp(server, client, target) if protocol == "tcp" else talk_udp(server, client, target)


@pytest.fixture(scope="module")
def two_guests(outside: Path) -> Iterator[PlayedPod]:
    with played_pod(2, name="uplink") as made:
        yield made


# --- out ---


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize("client", ["container", "2"])
def test_pods_reach_outside_behind_the_host(
    client: str, protocol: str, version: int, two_guests: PlayedPod, outside: Path
) -> None:
    port = next(ports)
    with (
        open_in(outside, version, protocol) as server,
        open_in(place(two_guests, client), version, protocol) as sock,
    ):
        server.bind((ANY[version], port))
        assert talk(server, sock, (OUTSIDE[version], port), protocol) == HOST[version]


@pytest.mark.parametrize("version", FAMILIES)
def test_errors_come_back(version: int, two_guests: PlayedPod, outside: Path) -> None:
    """ICMP through both translations: a port that nobody has outside refuses the guest."""
    with open_in(place(two_guests, "2"), version, "udp") as sock:
        sock.connect((OUTSIDE[version], next(ports)))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)


def test_a_pod_without_uplink_has_no_route_out(outside: Path) -> None:
    with played_pod(1, name="uplink-none", outside="none") as made:
        assert set(net.link_indexes(made.netns)) == {"lo", net.BRIDGE, "uktap2"}
        with open_in(made.netns, 4, "tcp") as sock, pytest.raises(OSError, match="unreachable"):
            sock.connect((OUTSIDE[4], 1))
        assert rules(made.netns) == ""


def test_a_taken_range_is_passed_over(outside: Path) -> None:
    first, second = (ranges[0] for ranges in uplink.RANGES[:2])
    ip("route", "add", str(first), "via", OUTSIDE[4])
    try:
        with played_pod(0, name="uplink-range") as made:
            assert ip_address(made.record.uplink_ipv4) in second
    finally:
        ip("route", "del", str(first))


def test_all_ranges_taken_is_an_error(outside: Path) -> None:
    ranges = [str(ipv4) for ipv4, _ in uplink.RANGES]
    for network in ranges:
        ip("route", "add", network, "via", OUTSIDE[4])
    try:
        with pytest.raises(UklaunchError, match="every range"):
            pod.create("uplink-full")
    finally:
        for network in ranges:
            ip("route", "del", network)
    assert state.read_pod("uplink-full") is None
    assert "uklaunch" not in rules() or "uplink-full" not in rules()


# --- in ---

FROM = {"outside": HOST, "the host's localhost": LOOPBACK, "the host itself": HOST}


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize("server", ["container", "2"])
@pytest.mark.parametrize("client", FROM)
def test_published_ports(
    client: str, server: str, protocol: str, version: int, two_guests: PlayedPod, outside: Path
) -> None:
    host, inside = next(ports), next(ports)
    record = two_guests.record
    item = Publish(host=host, guest=Port(inside, Protocol(protocol)))
    owner = None if server == "container" else "two"
    uplink.publish(record, [item], owner)
    with (
        open_in(place(two_guests, server), version, protocol) as listener,
        open_in(outside if client == "outside" else THE_HOST, version, protocol) as sock,
    ):
        listener.bind((ANY[version], inside))
        peer = talk(listener, sock, (FROM[client][version], host), protocol)
    if client == "outside":
        assert peer == OUTSIDE[version]  # not hidden
    uplink.forget_guests(record, [])
    assert owner is None or all(other.number != host for other in firewall.published())


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("protocol", KINDS)
def test_the_pods_own_address_reaches_a_guests_port(protocol: str, version: int, two_guests: PlayedPod) -> None:
    """As probes and services expect it: nothing declared, nothing published. The guest sees who it is."""
    number = next(ports)
    (own,) = (address for address in uplink.addresses(two_guests.record) if address.version == version)
    with (
        open_in(two_guests.guests[1].netns, version, protocol) as listener,
        open_in(THE_HOST, version, protocol) as sock,
    ):
        listener.bind((ANY[version], number))
        peer = talk(listener, sock, (str(own), number), protocol)
        assert peer == sock.getsockname()[0]
        (flow,) = (flow for flow in two_guests.table.flows(two_guests.record.id) if flow.dialled.port == number)
        assert (flow.opener.outside, flow.server.guest) == (True, 3)
    assert "UNKNOWN_GUEST" not in {reason.name for reason in two_guests.table.counters(two_guests.record.id)}


def test_a_port_of_the_pod_that_nobody_serves_is_refused_outside(two_guests: PlayedPod) -> None:
    for address in uplink.addresses(two_guests.record):
        with open_in(THE_HOST, address.version, "tcp") as sock, pytest.raises(ConnectionRefusedError):
            sock.connect((str(address), next(ports)))


def test_a_server_on_loopback_is_not_reached_from_outside(two_guests: PlayedPod) -> None:
    number = next(ports)
    for address in uplink.addresses(two_guests.record):
        with (
            open_in(two_guests.netns, address.version, "tcp") as listener,
            open_in(THE_HOST, address.version, "tcp") as sock,
        ):
            listener.bind((LOOPBACK[address.version], number))
            listener.listen()
            with pytest.raises(ConnectionRefusedError):
                sock.connect((str(address), number))


def test_a_port_is_published_at_one_address_alone(two_guests: PlayedPod, outside: Path) -> None:
    host, inside = next(ports), next(ports)
    uplink.publish(two_guests.record, [Publish(address=ip_address("127.0.0.1"), host=host, guest=Port(inside))])
    with open_in(two_guests.netns, 4, "tcp") as listener:
        listener.bind((ANY[4], inside))
        with open_in(THE_HOST, 4, "tcp") as sock:
            talk_tcp(listener, sock, (LOOPBACK[4], host))
        with open_in(outside, 4, "tcp") as sock, pytest.raises(ConnectionRefusedError):
            sock.connect((HOST[4], host))


def test_two_pods_publish_on_localhost_side_by_side(two_guests: PlayedPod) -> None:
    """Each has its own route for ::1, and a port of one leads to the other's users too."""
    with played_pod(0, name="uplink-second") as second:
        for made in (two_guests, second):
            host, inside = next(ports), next(ports)
            uplink.publish(made.record, [Publish(host=host, guest=Port(inside))])
            for version in FAMILIES:
                with open_in(made.netns, version, "tcp") as listener:
                    listener.bind((ANY[version], inside))
                    with open_in(THE_HOST, version, "tcp") as sock:
                        talk_tcp(listener, sock, (LOOPBACK[version], host))
                with open_in(made.netns, version, "tcp") as listener:  # from the other pod, by the host's address
                    listener.bind((ANY[version], inside))
                    other = second if made is two_guests else two_guests
                    with open_in(other.netns, version, "tcp") as sock:
                        talk_tcp(listener, sock, (HOST[version], host))
                with open_in(made.netns, version, "tcp") as listener:  # and from the pod itself
                    listener.bind((ANY[version], inside))
                    with open_in(made.netns, version, "tcp") as sock:
                        talk_tcp(listener, sock, (HOST[version], host))


# --- what must not get through ---


@pytest.mark.parametrize("version", FAMILIES)
def test_what_is_not_published_is_out_of_reach(version: int, two_guests: PlayedPod, outside: Path) -> None:
    """From outside by a route to the pod, and from another pod; the host itself may."""
    port = next(ports)
    record = two_guests.record
    target = record.uplink_ipv4 if version == 4 else record.uplink_ipv6
    ip("-n", outside.name, f"-{version}", "route", "add", target, "via", HOST[version])
    with played_pod(0, name="uplink-other") as other, open_in(two_guests.netns, version, "tcp") as listener:
        listener.bind((ANY[version], port))
        listener.listen()
        for netns in (outside, other.netns):
            with open_in(netns, version, "tcp") as sock:
                sock.settimeout(PROMPTLY_S)
                with pytest.raises(TimeoutError):
                    sock.connect((target, port))
        with open_in(THE_HOST, version, "tcp") as sock:
            sock.connect((target, port))


def test_guests_are_not_reached_by_their_own_addresses(two_guests: PlayedPod) -> None:
    guest, port = two_guests.guests[0], next(ports)
    target = str(guest.nic.ipv4.ip)
    ip("route", "add", target, "via", two_guests.record.uplink_ipv4)
    try:
        with open_in(guest.netns, 4, "tcp") as listener, open_in(THE_HOST, 4, "tcp") as sock:
            listener.bind((ANY[4], port))
            listener.listen()
            sock.settimeout(PROMPTLY_S)
            with pytest.raises(TimeoutError):
                sock.connect((target, port))
    finally:
        ip("route", "del", target)


def udp_frame(source_mac: bytes, target_mac: bytes, source: str, target: str, port: int) -> bytes:
    """A datagram, with IPv4's checksum and without UDP's."""
    header = bytearray(b"\x45\0\0\x20\0\0\0\0\x40\x11\0\0" + socket.inet_aton(source) + socket.inet_aton(target))
    total = sum(int.from_bytes(header[at : at + 2], "big") for at in range(0, 20, 2))
    header[10:12] = ((~(total + (total >> 16))) & 0xFFFF).to_bytes(2, "big")
    udp = (4000).to_bytes(2, "big") + port.to_bytes(2, "big") + b"\0\x0c\0\0" + b"evil"
    return target_mac + source_mac + b"\x08\x00" + bytes(header) + udp


def test_the_hosts_own_localhost_stays_shut(two_guests: PlayedPod) -> None:
    """Although a port is published on 127.0.0.1, for which the link must take packets from there to leave by it."""
    record, port = two_guests.record, next(ports)
    uplink.publish(record, [Publish(address=ip_address("127.0.0.1"), host=next(ports), guest=Port(1))])
    link = f"uk{record.id}"
    assert Path(f"/proc/sys/net/ipv4/conf/{link}/route_localnet").read_text() == "1\n"
    shown_link = subprocess.run(["ip", "-j", "link", "show", link], check=True, capture_output=True, text=True).stdout
    host_mac = bytes.fromhex(json.loads(shown_link)[0]["address"].replace(":", ""))
    host_end = str(ip_address(record.uplink_ipv4) - 1)
    with (
        net.in_netns(two_guests.nat, partial(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)) as raw,
        open_in(THE_HOST, 4, "udp") as victim,
    ):
        victim.bind((ANY[4], port))
        victim.settimeout(PROMPTLY_S)
        raw.bind((uplink.OUTSIDE_LINK, 0))
        own_mac = raw.getsockname()[4]
        for source, target in (
            (record.uplink_ipv4, "127.0.0.1"),
            ("127.0.0.1", "127.0.0.1"),
            ("127.0.0.1", host_end),
            (record.uplink_ipv4, host_end),  # this one arrives: the frames are good
        ):
            raw.send(udp_frame(own_mac, host_mac, source, target, port))
        assert victim.recvfrom(64) == (b"evil", (record.uplink_ipv4, 4000))
        with pytest.raises(TimeoutError):
            victim.recv(64)


# --- conflicts ---


@pytest.mark.parametrize(
    ("protocol", "bound", "asked"),
    [
        ("tcp", "0.0.0.0", None),
        ("tcp", "127.0.0.1", None),
        ("tcp", "::1", None),
        ("tcp", "192.0.2.1", "192.0.2.1"),
        ("udp", "0.0.0.0", "127.0.0.1"),
        ("udp", "::", None),
    ],
)
def test_a_port_that_a_socket_has_is_an_error(protocol: str, bound: str, asked: str | None, outside: Path) -> None:
    port = next(ports)
    with open_in(THE_HOST, 6 if ":" in bound else 4, protocol) as sock:
        sock.bind((bound, port))
        if protocol == "tcp":
            sock.listen()
        item = Publish(address=ip_address(asked) if asked else None, host=port, guest=Port(1, Protocol(protocol)))
        with pytest.raises(UsageError, match=f"port {port}/{protocol} of this host is taken"):
            pod.create("uplink-conflict", publish=[item])
    assert state.read_pod("uplink-conflict") is None


@pytest.mark.parametrize(
    ("first", "second"),
    [("{p}:1", "{p}:2"), ("127.0.0.1:{p}:1", "{p}:1"), ("{p}:1", "[::1]:{p}:1"), ("{p}:1/udp", "127.0.0.1:{p}:1/udp")],
)
def test_a_port_that_is_published_is_an_error(first: str, second: str, two_guests: PlayedPod) -> None:
    port = next(ports)
    uplink.publish(two_guests.record, [Publish.parse(first.format(p=port))], "web")
    with pytest.raises(UsageError, match=rf"port {port}/.* of this host is published already, by uplink/web"):
        pod.create("uplink-conflict", publish=[Publish.parse(second.format(p=port))])
    assert state.read_pod("uplink-conflict") is None
    uplink.forget_guests(two_guests.record, [])


def test_the_same_port_twice_is_an_error() -> None:
    items = [Publish.parse("127.0.0.1:8080:1"), Publish.parse("8080:2")]
    with pytest.raises(UsageError, match="want the same port"):
        pod.create("uplink-conflict", publish=items)


def test_publishing_needs_an_uplink() -> None:
    with pytest.raises(UsageError, match="needs an uplink"):
        pod.create("uplink-conflict", outside="none", publish=[Publish.parse("8080:80")])


# --- nothing is left ---


def traces(name: str, pod_id: int) -> list[str]:
    return [
        *(f"link {name}" for name in net.link_indexes(firewall.HOST) if name == f"uk{pod_id}"),
        *(line.strip() for line in rules().splitlines() if f'"{name}' in line),
        *(path.name for path in state.NETNS_DIR.glob(f"uk-{name}.*")),
    ]


def test_a_pod_takes_its_uplink_along(outside: Path) -> None:
    """Also when a process stays in its namespace; twice is no error."""
    record = pod.create("uplink-gone", publish=[Publish.parse(f"{next(ports)}:80")])
    assert len(traces("uplink-gone", record.id)) >= 3
    with subprocess.Popen(["nsenter", f"--net={record.netns}", "sleep", "60"]) as stays:
        pod.delete("uplink-gone")
        assert traces("uplink-gone", record.id) == []
        uplink.close(record)
        stays.kill()


def test_the_last_pod_takes_the_table_along(state_dir: Path, outside: Path) -> None:
    """Beside other pods' it would stay: so in a namespace of our own."""
    command = f"{sys.executable} -m launcher pod"
    script = f"""
        set -e
        mount -t sysfs sysfs /sys
        mount -t bpf bpf /sys/fs/bpf
        ip link set lo up
        {command} create a
        {command} create b
        {command} rm a
        nft list tables | grep uklaunch
        {command} rm b
        ! nft list tables | grep uklaunch
    """
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_gc_after_a_crash_half_way(outside: Path) -> None:
    record = pod.create("uplink-half", publish=[Publish.parse(f"{next(ports)}:80")])
    state.write_pod(replace(record, bridge=0))  # as it is until the last step
    assert [item.name for item in control.collect() if item.what == "pod"] == ["uplink-half"]
    assert traces("uplink-half", record.id) == []


def test_gc_does_what_it_can(outside: Path) -> None:
    record = pod.create("uplink-half")
    state.write_pod(replace(record, bridge=0))
    damaged = state.guest_dir("elsewhere", "damaged")
    damaged.mkdir(parents=True)
    try:
        (damaged / "guest.json").write_text("{")
        result = uklaunch("gc")
        assert (result.returncode, "guest.json is damaged" in result.stderr) == (125, True), shown(result)
        assert result.stdout == "pod uplink-half: nobody's any more; removed\n"
        assert traces("uplink-half", record.id) == []
    finally:
        state.forget_guest("elsewhere", "damaged")
        state.forget_unknown_pods()


def test_gc_after_the_record_is_lost(outside: Path) -> None:
    record = pod.create("uplink-lost", publish=[Publish.parse(f"{next(ports)}:80")])
    state.forget_pod("uplink-lost")
    result = uklaunch("gc")
    assert result.returncode == 0, shown(result)
    assert "uplink of pod uplink-lost" in result.stdout
    assert traces("uplink-lost", record.id) == []
    net.delete_netns(Path(record.netns))


def test_gc_of_another_state_directory_touches_nothing_of_ours(outside: Path, tmp_path: Path) -> None:
    elsewhere = {"UKLAUNCH_STATE": str(tmp_path / "state")}
    with played_pod(name="uplink-ours", publish=[Publish.parse(f"{next(ports)}:80")]) as made:
        before, id_ = traces("uplink-ours", made.record.id), made.record.id
        assert before
        result = uklaunch("gc", env=elsewhere)
        assert (result.returncode, result.stdout) == (0, ""), shown(result)
        assert traces("uplink-ours", id_) == before
        assert id_ in made.table.pod_ids()


def test_gc_of_a_state_directory_removes_what_was_its_own(outside: Path, state_dir: Path) -> None:
    record = pod.create("uplink-theirs", publish=[Publish.parse(f"{next(ports)}:80")])
    state.forget_pod("uplink-theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("UKLAUNCH_STATE")
        assert list(control.collect()) == []
    assert [(item.what, item.name) for item in control.collect()] == [
        ("uplink", "of pod uplink-theirs"),
        ("router", f"pod id {record.id}"),
    ]
    assert traces("uplink-theirs", record.id) == []
    net.delete_netns(Path(record.netns))


def test_a_pod_of_before_an_upgrade_goes_and_takes_its_router_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UKLAUNCH_BPFFS", str(program.bpffs() / f"ukt-{os.getpid()}"))
    program.bpffs().mkdir()
    try:
        old = pod.create("upgrade-old")
        before = program.root() / program.version()
        real = program.version
        monkeypatch.setattr(program, "version", lambda defines=(): real(defines) if defines else "upgraded")
        new = pod.create("upgrade-new")
        assert new.id != old.id
        assert [(version.directory.name, version.pods) for version in router.loaded()] == [
            (before.name, 1),
            ("upgraded", 1),
        ]
        pod.delete("upgrade-old")
        assert not before.exists()
        program.load(before)  # as by one who dies before it has a pod
        os.utime(before, (0, 0))
        assert [item.name for item in control.collect()] == [before.name]
        assert not before.exists()
        pod.delete("upgrade-new")
    finally:
        router.unload_all()
        program.bpffs().rmdir()


def test_a_dead_guests_ports_are_forgotten(two_guests: PlayedPod) -> None:
    record, number = two_guests.record, next(ports)
    uplink.publish(record, [Publish(host=number, guest=Port(number))], "dead")
    assert f". {number} " in rules()
    pod.forget_dead_guests(record.name)
    assert f". {number} " not in rules()


def test_who_is_refused_a_name_takes_nothing_from_its_holder(two_guests: PlayedPod) -> None:
    record, number = two_guests.record, next(ports)
    uplink.publish(record, [Publish(host=number, guest=Port(number))], "holder")
    refused = pod.Membership(record, "holder", 9, "uktap9", -1, 1500, contextlib.ExitStack())
    refused.leave()  # as `run` does when it finds that the guest runs
    assert f". {number} " in rules()
    uplink.forget_guests(record, [])


def test_rules_that_somebody_flushed_come_back_with_the_next_pod(two_guests: PlayedPod, outside: Path) -> None:
    subprocess.run(["nft", "flush", "table", "inet", "uklaunch"], check=True)
    with played_pod(0, name="uplink-mend"), open_in(outside, 4, "tcp") as server:
        server.bind((ANY[4], 0))
        with open_in(two_guests.netns, 4, "tcp") as sock:
            assert talk_tcp(server, sock, (OUTSIDE[4], server.getsockname()[1])) == HOST[4]


# --- adopted namespaces ---


def snapshot(netns: Path) -> dict[str, str]:
    """All that an uplink could have changed. (`stable_secret` cannot be read before it is set.)"""
    found = {"rules": rules(netns), "links": ",".join(net.link_indexes(netns))}
    for pattern in ("net/ipv4/conf/*/*", "net/ipv6/conf/*/[!s]*", "net/ipv4/ip_forward"):
        found |= net.match_sysctls(netns, pattern)
    return found


@pytest.fixture
def theirs(outside: Path) -> Iterator[Path]:
    """A namespace as a CNI makes it, with an uplink, rules and settings of its own."""
    name = f"ukt-theirs-{os.getpid()}"
    ip("netns", "add", name)
    ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", "ukt-cni")
    ip("addr", "add", "203.0.113.1/24", "dev", "ukt-cni")
    ip("addr", "add", "2001:db8:78::1/64", "dev", "ukt-cni", "nodad")
    ip("link", "set", "ukt-cni", "up")
    ip("-n", name, "addr", "add", "203.0.113.2/24", "dev", "eth0")
    ip("-n", name, "addr", "add", "2001:db8:78::2/64", "dev", "eth0", "nodad")
    ip("-n", name, "link", "set", "eth0", "up")
    ip("-n", name, "link", "set", "lo", "up")
    ip("-n", name, "route", "add", "default", "via", "203.0.113.1")
    ip("-n", name, "-6", "route", "add", "default", "via", "2001:db8:78::1")
    ip("-n", name, "link", "add", "other", "type", "bridge")
    netns = state.NETNS_DIR / name
    net.write_sysctls(netns, {"net/ipv6/conf/other/forwarding": "1", "net/ipv6/conf/eth0/accept_ra": "1"})
    subprocess.run(["nsenter", f"--net={netns}", "nft", "add table inet theirs { chain c { }; }"], check=True)
    yield netns
    ip("link", "del", "ukt-cni")
    ip("netns", "del", name)


def test_an_adopted_namespace_keeps_its_uplink_and_is_left_as_it_was(theirs: Path, outside: Path) -> None:
    before = snapshot(theirs)
    with played_pod(1, name="uplink-own", netns=theirs) as made:
        record = made.record
        assert (record.uplink, record.uplink_link) == ("own", "eth0")
        assert (record.uplink_ipv4, record.uplink_ipv6) == ("203.0.113.2", "2001:db8:78::2")
        assert net.match_sysctls(theirs, "net/ipv6/conf/eth0/accept_ra") == {"net/ipv6/conf/eth0/accept_ra": "2"}
        for version, protocol in itertools.product(FAMILIES, KINDS):
            with (
                open_in(THE_HOST, version, protocol) as server,
                open_in(made.guests[0].netns, version, protocol) as sock,
            ):
                server.bind((ANY[version], 0))
                target = ("203.0.113.1" if version == 4 else "2001:db8:78::1", server.getsockname()[1])
                assert talk(server, sock, target, protocol) in (record.uplink_ipv4, record.uplink_ipv6)
        host, inside = next(ports), next(ports)
        guest = made.guests[0]
        item = Publish(host=host, guest=Port(inside))
        uplink.publish(record, [item], "web")
        for version in FAMILIES:
            with open_in(guest.netns, version, "tcp") as listener, open_in(THE_HOST, version, "tcp") as sock:
                listener.bind((ANY[version], inside))
                talk_tcp(listener, sock, (HOST[version], host))
    assert snapshot(theirs) == before
    assert '"uplink-own' not in rules()


def test_an_adopted_namespace_takes_no_other_uplink(theirs: Path) -> None:
    with pytest.raises(UsageError, match="own uplink"):
        pod.create("uplink-own", netns=theirs, outside="nat")
    before = snapshot(theirs)
    with played_pod(1, name="uplink-own", netns=theirs, outside="none") as made:
        assert rules(theirs) == before["rules"]
        assert made.record.uplink == "none"


def test_localhost_of_the_host_leads_to_our_own_links_only(theirs: Path) -> None:
    with played_pod(0, name="uplink-own", netns=theirs) as made, pytest.raises(UsageError, match="localhost"):
        uplink.publish(made.record, [Publish.parse("127.0.0.1:8099:80")])
