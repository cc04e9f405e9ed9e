"""Datagrams larger than a guest's MTU: its kernel sends them in fragments, the other end's puts them together."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from launcher import net

from .conftest import PlayedPod

pytestmark = pytest.mark.net

LOOPBACK = {4: "127.0.0.1", 6: "::1"}
BRIDGE = {4: "169.254.77.1", 6: "fd00:77::1"}
ports = itertools.count(11000)


def datagrams_in(netns: Path, family: int) -> socket.socket:
    sock = net.in_netns(
        netns, partial(socket.socket, socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    )
    sock.settimeout(5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    return sock


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("bind", ["loopback", "any"])
@pytest.mark.parametrize("size", [1500, 8000, 65000])
def test_from_a_guest_to_a_container(make_pod: Callable[[int], PlayedPod], size: int, bind: str, family: int) -> None:
    pod, port, sent = make_pod(3), next(ports), os.urandom(size)
    with datagrams_in(pod.netns, family) as server, datagrams_in(pod.guests[0].netns, family) as client:
        server.bind((LOOPBACK[family] if bind == "loopback" else "", port))
        client.connect((BRIDGE[family], port))
        client.send(sent)
        received, peer = server.recvfrom(1 << 16)
        assert received == sent
        assert peer[0] == LOOPBACK[family]
        server.sendto(b"thanks", peer)
        assert client.recv(10) == b"thanks"


@pytest.mark.parametrize("family", [4, 6])
def test_from_guest_to_guest(make_pod: Callable[[int], PlayedPod], family: int) -> None:
    """The port is known by then: a question to several guests goes out before its further fragments come in."""
    pod, port, sent = make_pod(3), next(ports), os.urandom(8000)
    with datagrams_in(pod.guests[1].netns, family) as server, datagrams_in(pod.guests[0].netns, family) as client:
        server.bind(("", port))
        client.connect((BRIDGE[family], port))
        client.send(b"who serves this?")
        _, peer = server.recvfrom(100)
        server.sendto(b"I", peer)
        assert client.recv(10) == b"I"
        client.send(sent)
        received, peer = server.recvfrom(1 << 16)
        assert received == sent
        server.sendto(received, peer)
        assert client.recv(1 << 16) == sent


@pytest.mark.parametrize("family", [4, 6])
def test_pieces_of_several_senders_do_not_mix(make_pod: Callable[[int], PlayedPod], family: int) -> None:
    """All come to 127.0.0.1 from 127.0.0.1: only the identification keeps them apart."""
    pod, port = make_pod(3), next(ports)
    with datagrams_in(pod.netns, family) as server:
        server.bind((LOOPBACK[family], port))

        def send(guest: int) -> None:
            with datagrams_in(pod.guests[guest].netns, family) as client:
                client.connect((BRIDGE[family], port))
                for _ in range(50):
                    client.send(bytes([guest]) * 20_000)

        threads = [threading.Thread(target=send, args=(guest,)) for guest in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.settimeout(0)
        received = []
        while True:
            try:
                received.append(server.recv(1 << 16))
            except BlockingIOError:
                break
    assert len(received) > 100  # reassembly has a bounded memory (net.ipv4.ipfrag_high_thresh)
    assert all(len(set(data)) == 1 and len(data) == 20_000 for data in received)
