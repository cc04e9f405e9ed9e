"""A real guest's network is torn under a TCP stream; the supervisor mends it, and the stream goes on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio
from pyroute2.ethtool.ioctl import IoctlEthtool

from launcher import GuestSpec, RunOptions, identify, net, open_pod, run_guest
from launcher.arguments import DEFAULT_BUNDLE

pytestmark = pytest.mark.boot

POD = "boot-healing"
PORT = 8100
# netcat serves one connection and no more: so whether it listens is not asked by dialling.
ECHO = f"""
mkfifo /tmp/f; netcat -l {PORT} </tmp/f | cat >/tmp/f &
until grep -qi :{PORT:04x} /proc/net/tcp*; do sleep 0.1; done; httpd -f -p 80
"""
CHUNK = bytes(range(256)) * 64
# What TCP needs: its retransmission timer doubles from 0.2 s for as long as nothing comes through.
RESUMED_S = 3.0

DEEDS = {
    "ip link set ukbr0 down": "bridge ukbr0 was set down",
    "ip link del ukbr0": "bridge ukbr0 was removed",
    "ip link del uktap2": "TAP uktap2 was removed",
    "ip link set uktap2 netns ukt-elsewhere": "TAP uktap2 was removed",
    "ip link set uktap2 name tap0": "TAP uktap2 was renamed to tap0",
    "ip addr flush dev lo": "lo: address 127.0.0.1/8 was removed",
}


class Notes:
    """What the supervisor says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.said = trio.Event()

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.said.set()
        self.said = trio.Event()

    async def until(self, line: str) -> None:
        with trio.fail_after(1):
            while line not in self.lines:
                await self.said.wait()


async def test_a_stream_goes_on_whatever_is_done_to_the_links() -> None:
    notes = Notes()
    options = RunOptions(ready_port=80, remove_when_done=True, stop_timeout_s=0, note=notes.say)
    spec = GuestSpec(name="x", pod=POD, image=identify(DEFAULT_BUNDLE), cmdline=ECHO)
    async with open_pod(POD) as record, run_guest(spec, options) as guest:
        await guest.wait_ready(60)
        netns = Path(record.netns)
        before = net.link_indexes(netns)
        with net.open_socket(netns, trio.socket.AF_INET, trio.socket.SOCK_STREAM) as sock:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            await stream.socket.connect(("127.0.0.1", PORT))
            await echo(stream)
            agreed = offloads(netns)
            assert "tx-checksum-ip-generic" in agreed  # or there would be nothing to lose
            await trio.to_thread.run_sync(stranger, netns, "ip netns add ukt-elsewhere")
            try:
                for deed, fault in DEEDS.items():
                    notes.lines.clear()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(echo, stream)
                        await trio.to_thread.run_sync(stranger, netns, deed)
                        await notes.until(f"mended: {fault}")
                        nursery.cancel_scope.deadline = trio.current_time() + RESUMED_S
                    assert not nursery.cancel_scope.cancelled_caught, f"{deed}: the stream has stopped"
                    assert offloads(netns) == agreed
                    assert not any("cannot" in line for line in notes.lines)
                    assert net.link_indexes(netns) == before
            finally:
                await trio.to_thread.run_sync(stranger, netns, "ip netns del ukt-elsewhere")
        assert not guest.ended.is_set()
        log = guest.record.supervisor_log.read_text()
        assert all(f"mended: {fault}" in log for fault in DEEDS.values())


def stranger(netns: Path, command: str) -> None:
    subprocess.run(["nsenter", f"--net={netns}", "sh", "-ec", command], check=True)


def offloads(netns: Path) -> set[str]:
    """What QEMU and the guest have agreed upon that the kernel may leave to them."""
    ethtool = net.in_netns(netns, lambda: IoctlEthtool("uktap2"))
    features = ethtool.get_features()
    ethtool.close()
    return {name for name in features.keys() if features.get_value(name)}  # noqa: SIM118


async def echo(stream: trio.SocketStream) -> None:
    """4 MiB there and back."""
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for _ in range(256):
                await stream.send_all(CHUNK)

        nursery.start_soon(send)
        received = bytearray()
        while len(received) < 256 * len(CHUNK):
            data = await stream.receive_some(1 << 16)
            assert data, "the connection has ended"
            received += data
    assert received == CHUNK * 256
