"""A guest's network rates, as TCP finds them, through the router: real stacks at both ends.

container ── lo ── router ── tbf ─► guest         what comes to it waits in a queue
container ◄─────── router ◄ meter ─ guest         what it sends beyond its rate is lost
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import trio

from launcher import net, pod
from launcher.limits import Limits
from launcher.model import Port

from .conftest import PlayedPod, played_pod
from .test_healing import membership, run, settled, supervised

pytestmark = pytest.mark.net

PORTS = (5001, 5002)  # of the guest with rates, of the other one
SECONDS = 1.0
WARM_UP_S = 0.4  # until TCP has found the rate, and the burst is spent


INTO, OUT = 50_000_000, 200_000_000
LIMITS = Limits.parse(net_rate="50mbit:200mbit")


@pytest.fixture(scope="module")
def limited() -> Iterator[PlayedPod]:
    """A pod of two guests, of which the first has rates."""
    ports = {2: (Port(PORTS[0]),), 3: (Port(PORTS[1]),)}
    with played_pod(2, name="rates", ports=ports, limits=LIMITS) as played:
        yield played


def throughput(played: PlayedPod, number: int, address: str, *, into: bool) -> float:
    """Bits a second of payload over one TCP connection to a guest, or `into` False: from it, after its start."""
    client, server = played.netns, played.guests[number].netns
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    open_socket = partial(socket.socket, family, socket.SOCK_STREAM)
    with (
        net.in_netns(server, open_socket) as listener,
        net.in_netns(client, open_socket) as connection,
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", PORTS[number]))
        listener.listen()
        connection.connect((address, PORTS[number]))
        accepted, _ = listener.accept()
        with accepted:
            sender, receiver = (connection, accepted) if into else (accepted, connection)
            thread = threading.Thread(target=send_until_closed, args=(sender,))
            thread.start()
            received, start = receive_for(receiver, WARM_UP_S), time.monotonic()
            received = receive_for(receiver, SECONDS)
            took = time.monotonic() - start
            for end in (receiver, sender):
                with contextlib.suppress(OSError):  # the other end's reset may be there already
                    end.shutdown(socket.SHUT_RDWR)
            thread.join()
    return received * 8 / took


def send_until_closed(sock: socket.socket) -> None:
    try:
        while True:
            sock.send(bytes(1 << 18))
    except OSError:
        pass


def receive_for(sock: socket.socket, seconds: float) -> int:
    end, received = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        received += len(sock.recv(1 << 20))
    return received


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("into", [True, False], ids=["to the guest", "from the guest"])
def test_a_rate_is_what_tcp_gets(limited: PlayedPod, address: str, into: bool) -> None:
    assert_rate(limited, address, into)


def assert_rate(played: PlayedPod, address: str, into: bool) -> None:
    wanted = INTO if into else OUT
    found = throughput(played, 0, address, into=into)
    print(f"{address} {'to' if into else 'from'} the guest: {found / 1e6:.1f} Mbit/s of {wanted / 1e6:g}")
    assert 0.8 * wanted < found < 1.2 * wanted


@pytest.mark.parametrize("into", [True, False], ids=["to the guest", "from the guest"])
def test_a_guest_without_a_rate_is_as_fast_as_ever(limited: PlayedPod, into: bool) -> None:
    found = throughput(limited, 1, "127.0.0.1", into=into)
    print(f"{found / 1e6:.0f} Mbit/s")
    assert found > 2 * OUT


DEEDS = {
    "tc qdisc del dev uktap2 root": "TAP uktap2: its rate was taken off",
    "tc qdisc replace dev uktap2 root handle 756b: tbf rate 1gbit burst 1m limit 1m": "TAP uktap2: its rate was",
    "tc qdisc del dev ukrate2 root": "rate limit ukrate2: its rate was taken off",
    "tc filter del dev ukrate2b ingress": "rate limit ukrate2b: the router was removed",
    "ip link set ukrate2 down": "rate limit ukrate2 was set down",
    "ip link del ukrate2": "rate limit ukrate2 was removed",
    "ip link set ukrate2b name theirs": "rate limit ukrate2b was renamed to theirs",
}


async def test_what_strangers_do_to_a_rate_is_mended(limited: PlayedPod) -> None:
    member = membership(limited)
    indexes = net.link_indexes(limited.netns)
    member.limits, member.rate_indexes = LIMITS, (indexes["ukrate2"], indexes["ukrate2b"])
    with pod.open_router() as table:
        await trio.to_thread.run_sync(member.make_rate_link, table)  # idempotent; it has the test's alias
    async with supervised(member) as heard:
        for command, message in DEEDS.items():
            await trio.to_thread.run_sync(run, limited, command)
            await heard.until(f"mended: {message}")
            await settled(heard)
            heard.lines.clear()
        assert net.link_indexes(limited.netns)["ukrate2"] == indexes["ukrate2"]
        for into in (True, False):
            await trio.to_thread.run_sync(assert_rate, limited, "::1", into)
