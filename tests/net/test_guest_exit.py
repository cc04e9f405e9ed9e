"""A guest that goes: who has a connection with it hears so at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from launcher import net, pod

from .conftest import PlayedPod, played_pod

pytestmark = pytest.mark.net

ports = itertools.count(7000)
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
BRIDGE = {4: "169.254.77.1", 6: "fd00:77::1"}


def open_in(netns: Path, family: int) -> socket.socket:
    sock = net.in_netns(
        netns, partial(socket.socket, socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    )
    sock.settimeout(5)
    return sock


@contextlib.contextmanager
def connection(
    server_in: Path, client_in: Path, family: int, dial: str
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(server's end, client's end), on which both have spoken."""
    with open_in(server_in, family) as server, open_in(client_in, family) as client:
        server.bind(("", next(ports)))
        server.listen()
        client.connect((dial, server.getsockname()[1]))
        accepted, _ = server.accept()
        accepted.settimeout(5)
        with accepted:
            client.sendall(b"ping")
            assert accepted.recv(4) == b"ping"
            accepted.sendall(b"pong")
            assert client.recv(4) == b"pong"
            yield accepted, client


def pull_out(played: PlayedPod, index: int) -> None:
    """What the end of a VMM leaves: no TAP, and rows that somebody has to remove."""
    subprocess.run(["ip", "-n", played.netns.name, "link", "del", f"uktap{index}"], check=True)
    pod.forget_dead_guests(played.record.name)


@pytest.mark.parametrize("family", [4, 6])
def test_open_connections_are_reset_at_once(family: int) -> None:
    with played_pod(3, name="nettest-exit") as played, contextlib.ExitStack() as stack:
        container, (two, three, four) = played.netns, (guest.netns for guest in played.guests)
        opened = [
            stack.enter_context(connection(two, container, family, LOOPBACK[family]))[1],  # the container dialled it
            stack.enter_context(connection(container, two, family, BRIDGE[family]))[0],  # it dialled the container
            stack.enter_context(connection(two, three, family, BRIDGE[family]))[1],  # a guest dialled it
            stack.enter_context(connection(four, two, family, BRIDGE[family]))[0],  # it dialled a guest
        ]
        kept = stack.enter_context(connection(three, container, family, LOOPBACK[family]))
        began = time.monotonic()
        pull_out(played, 2)
        for survivor in opened:
            with pytest.raises(ConnectionResetError):
                survivor.recv(1)
        assert time.monotonic() - began < 1
        kept[0].sendall(b"still here")
        assert kept[1].recv(100) == b"still here"


def test_a_closed_connection_is_nobodys_any_more(tmp_path: Path) -> None:
    """Nothing is sent about what is over, and a port that somebody else has by now is left alone."""
    with played_pod(1, name="nettest-exit") as played:
        with connection(played.guests[0].netns, played.netns, 4, LOOPBACK[4]) as (_, client):
            address = client.getsockname()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with open_in(played.netns, 4) as server, open_in(played.netns, 4) as other:
            server.bind((LOOPBACK[4], next(ports)))
            server.listen()
            other.bind(address)
            other.connect(server.getsockname())
            pull_out(played, 2)
            accepted, _ = server.accept()
            with accepted:
                other.sendall(os.urandom(10))
                assert len(accepted.recv(100)) == 10
