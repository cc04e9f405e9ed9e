"""Real guests and the outside: names, both families, published ports; and a pod that is Docker's own container."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import net, state

from .. import leaks
from ..cli import shown, uklaunch
from ..net.outside import HOST, OUTSIDE, played_outside
from ..net.test_resolver import DOCKER, dnsmasq

pytestmark = pytest.mark.boot

POD = "boot-outside"
PAGE = "hello from outside"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """With a web server and a resolver that knows it."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www/index.html").write_text(PAGE)
    names = tmp_path / "names"
    names.write_text(f"{OUTSIDE[4]} web.example.test\n{OUTSIDE[6]} web6.example.test\n")
    with played_outside() as netns:
        server = subprocess.Popen(
            ["nsenter", f"--net={netns}", sys.executable, "-u", "-m", "http.server", "--bind", "::", "8000"],
            cwd=tmp_path / "www",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert server.stdout is not None
            assert b"Serving" in server.stdout.readline()
            with dnsmasq(netns, OUTSIDE[4], extra=[f"--addn-hosts={names}"]):
                yield netns
        finally:
            server.kill()
            server.communicate()


def with_resolv_conf(path: Path, text: str) -> str:
    """A wrapper for `uklaunch`: a machine with that /etc/resolv.conf."""
    path.write_text(text)
    return f'exec unshare --mount sh -c \'mount --bind {path} /etc/resolv.conf && exec "$@"\' sh "$@"'


def test_a_guest_goes_out_by_name_and_is_reached_from_outside(outside: Path, tmp_path: Path) -> None:
    before = leaks.ours()
    script = """
        for url in http://web.example.test:8000 http://web6.example.test:8000; do
            echo "$url: $(wget -qO- $url)"
        done
        mkdir /w; echo hello from the guest >/w/index.html; httpd -f -p 80 -h /w
    """
    result = uklaunch(
        "run", "default", "--pod", POD, "--name", "web", "-d", "-p", "24080:80", "--ready-port", "80",
        "--cmdline", script, wrap=with_resolv_conf(tmp_path / "resolv.conf", f"nameserver {OUTSIDE[4]}\n"),
    )  # fmt: skip
    assert result.returncode == 0, shown(result)
    try:
        console = uklaunch("logs", "web").stdout
        assert f"web.example.test:8000: {PAGE}" in console, console
        assert f"web6.example.test:8000: {PAGE}" in console, console
        for netns, host in (
            *((Path("/proc/self/ns/net"), host) for host in ("127.0.0.1", "[::1]", "localhost", HOST[4])),
            (outside, HOST[4]),
            (outside, f"[{HOST[6]}]"),
        ):
            got = subprocess.run(
                ["nsenter", f"--net={netns}", "curl", "-sS", "--max-time", "10", f"http://{host}:24080"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert got.stdout == "hello from the guest\n", f"{host}: {got}"
        inspected = uklaunch("inspect", "web").stdout
        assert "24080:80/tcp" in inspected
    finally:
        stopped = uklaunch("stop", "-t", "0", "web")
        uklaunch("rm", "web")
    assert stopped.returncode == 0, shown(stopped)
    assert leaks.ours() == before


def test_a_guest_in_dockers_own_container_asks_dockers_resolver(tmp_path: Path) -> None:
    """uklaunch runs in the very namespace that is the pod; its resolver, on 127.0.0.11, has a port given by chance."""
    port = 38654
    netns = state.NETNS_DIR / f"ukt-docker-{os.getpid()}"
    net.create_netns(netns)
    try:
        enter = ["nsenter", f"--net={netns}"]
        subprocess.run([*enter, "ip", "link", "set", "lo", "up"], check=True)
        subprocess.run([*enter, "nft", "-f", "-"], input=DOCKER.format(port=port), text=True, check=True)
        rules = subprocess.run([*enter, "nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
        with dnsmasq(netns, "127.0.0.11", port):
            inside = tmp_path / "inside"
            inside.write_text(with_resolv_conf(tmp_path / "resolv.conf", "nameserver 127.0.0.11\noptions ndots:0\n"))
            result = uklaunch(
                "run", "default", "--pod", POD, "--rm", "--netns", str(netns),
                "--cmdline", "cat /etc/resolv.conf; nslookup -type=a db.example.test",
                wrap=f'exec nsenter --net={netns} sh {inside} "$@"',
            )  # fmt: skip
        assert result.returncode == 0, shown(result)
        assert "options ndots:0" in result.stdout
        assert "192.0.2.99" in result.stdout
        after = subprocess.run([*enter, "nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
        assert after == rules
    finally:
        net.delete_netns(netns)
