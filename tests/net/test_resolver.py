"""Guests' names: each place where a pod's resolver can be, asked by dig from a guest, over UDP and TCP."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from launcher import net, resolver, uplink
from launcher.firewall import RESOLVER

from .conftest import PLAN, PlayedPod, played_pod
from .outside import OUTSIDE
from .test_localhost import open_in

pytestmark = pytest.mark.net

NAME, ANSWER = "db.example.test", "192.0.2.99"


@contextlib.contextmanager
def dnsmasq(netns: Path, address: str, port: int = 53, extra: Sequence[str] = ()) -> Iterator[None]:
    """A real resolver that knows one name; entered when it listens."""
    reader, writer = os.pipe()
    command = [
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=",
        f"--listen-address={address}", "--bind-interfaces", f"--port={port}", f"--address=/{NAME}/{ANSWER}",
        "--log-facility=-", "--user=root", "--local=/test/", *extra,
    ]  # fmt: skip
    process = subprocess.Popen(["nsenter", f"--net={netns}", *command], stderr=writer, stdin=subprocess.DEVNULL)
    os.close(writer)
    with os.fdopen(reader) as said:
        try:
            line = next((line for line in said if "started" in line), "")
            assert line, "dnsmasq did not start"
            yield
        finally:
            process.terminate()
            process.wait()


def dig(netns: Path, server: str, protocol: str) -> str:
    done = subprocess.run(
        ["nsenter", f"--net={netns}", "dig", f"@{server}", "+short", "+tries=1", "+timeout=3", NAME]
        + ["+tcp"] * (protocol == "tcp"),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or done.stderr.strip()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """resolv.conf, upstream.conf and netns/NAME/resolv.conf of a machine of the test's own."""
    monkeypatch.setattr(resolver, "RESOLV_CONF", tmp_path / "resolv.conf")
    monkeypatch.setattr(resolver, "UPSTREAM", tmp_path / "upstream.conf")
    monkeypatch.setattr(resolver, "NETNS_ETC", tmp_path / "netns")
    return tmp_path


def write_pods_own(places: Path, netns: Path, text: str) -> None:
    (places / "netns" / netns.name).mkdir(parents=True)
    (places / "netns" / netns.name / "resolv.conf").write_text(text)


@pytest.fixture(scope="module")
def one_guest(outside: Path) -> Iterator[PlayedPod]:
    with played_pod(1, name="resolver") as made:
        yield made


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
@pytest.mark.parametrize(
    ("address", "told"),
    [("127.0.0.53", RESOLVER), ("127.0.0.1", PLAN.ipv4.ip), ("::1", PLAN.ipv6.ip), ("127.0.0.11", RESOLVER)],
)
def test_a_resolver_on_a_loopback_address_of_the_pod(
    address: str, told: object, protocol: str, one_guest: PlayedPod, places: Path
) -> None:
    write_pods_own(places, one_guest.netns, f"nameserver {address}\nsearch a.test b.test\noptions ndots:5\n")
    with dnsmasq(one_guest.netns, address):
        found = uplink.resolve(one_guest.record, PLAN)
        assert (found.nameservers, found.search, found.options) == ((told,), ("a.test", "b.test"), ("ndots:5",))
        uplink.lead_to_resolver(one_guest.record, found)
        assert dig(one_guest.guests[0].netns, str(told), protocol) == ANSWER
        assert dig(one_guest.netns, address, protocol) == ANSWER  # containers ask it as before


def test_the_resolver_takes_guests_for_local_clients(one_guest: PlayedPod, places: Path) -> None:
    """systemd-resolved's stub answers nobody else."""
    write_pods_own(places, one_guest.netns, "nameserver 127.0.0.53\n")
    with open_in(one_guest.netns, 4, "udp") as server, open_in(one_guest.guests[0].netns, 4, "udp") as client:
        server.bind(("127.0.0.53", 53))
        uplink.lead_to_resolver(one_guest.record, uplink.resolve(one_guest.record, PLAN))
        client.connect((str(RESOLVER), 53))
        client.send(b"question")
        data, peer = server.recvfrom(64)
        assert (data, peer[0]) == (b"question", "127.0.0.1")
        server.sendto(b"answer", peer)
        assert client.recv(64) == b"answer"


DOCKER = """
table ip nat {{
    chain output {{ type nat hook output priority -100
        ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:{port}
        ip daddr 127.0.0.11 tcp dport 53 dnat to 127.0.0.11:{port}
    }}
    chain postrouting {{ type nat hook postrouting priority 100
        ip saddr 127.0.0.11 udp sport {port} snat to :53
        ip saddr 127.0.0.11 tcp sport {port} snat to :53
    }}
}}
"""


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_dockers_resolver_has_a_port_given_by_chance(protocol: str, outside: Path, places: Path) -> None:
    """In an adopted namespace, for ours tracks nothing on `lo`; the rules are Docker's."""
    name, port = f"ukt-docker-{os.getpid()}", 38653
    netns = Path("/run/netns") / name
    net.create_netns(netns)
    try:
        subprocess.run(
            ["nsenter", f"--net={netns}", "nft", "-f", "-"], input=DOCKER.format(port=port), text=True, check=True
        )
        write_pods_own(places, netns, "nameserver 127.0.0.11\noptions ndots:0\n")
        with played_pod(1, name="resolver-docker", netns=netns) as made, dnsmasq(netns, "127.0.0.11", port):
            found = uplink.resolve(made.record, PLAN)
            assert found.ports == {"udp": port, "tcp": port}
            uplink.lead_to_resolver(made.record, found)
            assert dig(made.guests[0].netns, str(found.nameservers[0]), protocol) == ANSWER
            assert dig(netns, "127.0.0.11", protocol) == ANSWER
    finally:
        net.delete_netns(netns)


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_a_resolver_outside(protocol: str, one_guest: PlayedPod, outside: Path, places: Path) -> None:
    (places / "resolv.conf").write_text(f"nameserver {OUTSIDE[4]}\nnameserver {OUTSIDE[6]}\n")
    found = uplink.resolve(one_guest.record, PLAN)
    assert found.nameservers == (ip_address(OUTSIDE[4]), ip_address(OUTSIDE[6]))
    with dnsmasq(outside, "0.0.0.0"):
        assert dig(one_guest.guests[0].netns, OUTSIDE[4], protocol) == ANSWER


@pytest.mark.parametrize(
    ("resolv_conf", "upstream", "told"),
    [
        ("nameserver 127.0.0.53\n", "nameserver 192.0.2.7\nnameserver 127.0.0.1\n", ["192.0.2.7"]),
        ("nameserver 127.0.0.53\n", None, []),
        ("nameserver 127.0.0.1\nnameserver 192.0.2.8\n", "nameserver 192.0.2.7\n", ["192.0.2.8"]),
        ("nameserver fe80::1%wan0\nnameserver 2001:db8::1\n", None, ["2001:db8::1"]),
        ("# none\nnameserver\nnameserver nonsense\nfoo\n", None, []),
        (None, None, []),
    ],
)
def test_the_hosts_own_localhost_is_no_resolver_for_pods(
    resolv_conf: str | None, upstream: str | None, told: list[str], one_guest: PlayedPod, places: Path
) -> None:
    for name, text in (("resolv.conf", resolv_conf), ("upstream.conf", upstream)):
        if text is not None:
            (places / name).write_text(text)
    assert [str(address) for address in uplink.resolve(one_guest.record, PLAN).nameservers] == told


def test_without_an_uplink_only_the_pods_own_resolver_counts(places: Path) -> None:
    (places / "resolv.conf").write_text("nameserver 192.0.2.7\nnameserver 127.0.0.53\n")
    with played_pod(1, name="resolver-none", outside="none") as made:
        assert uplink.resolve(made.record, PLAN).nameservers == ()
        with dnsmasq(made.netns, "127.0.0.53"):
            found = uplink.resolve(made.record, PLAN)
            assert found.nameservers == (RESOLVER,)
            uplink.lead_to_resolver(made.record, found)
            assert dig(made.guests[0].netns, str(RESOLVER), "udp") == ANSWER


def test_guests_get_at_nothing_else_on_the_pods_loopback(places: Path) -> None:
    """`route_localnet` on the bridge lets the resolver's answers leave; the router lets nothing in."""
    forbidden = ("127.0.0.5", 7777)
    with played_pod(1, name="resolver-shut") as made:
        write_pods_own(places, made.netns, "nameserver 127.0.0.53\n")
        uplink.lead_to_resolver(made.record, uplink.resolve(made.record, PLAN))
        guest = made.guests[0]
        for command in (  # a guest that sends 127.0.0.5 to its gateway
            "sysctl -qw net.ipv4.conf.eth0.route_localnet=1",
            "ip route add 127.0.0.5 via 169.254.77.1 table 99",
            "ip rule add to 127.0.0.5 pref 0 lookup 99",
            "ip rule add pref 100 lookup local",
            "ip rule del pref 0 lookup local",
        ):
            subprocess.run(["nsenter", f"--net={guest.netns}", *command.split()], check=True)
        with open_in(made.netns, 4, "udp") as server, open_in(guest.netns, 4, "udp") as client:
            server.bind(forbidden)
            server.settimeout(0.3)
            client.bind((str(guest.nic.ipv4.ip), 0))
            client.sendto(b"evil", forbidden)
            with pytest.raises(TimeoutError):
                server.recv(64)
        dropped = {str(reason): count for reason, count in made.table.counters(made.record.id).items()}
        assert dropped["martian"] == 1
