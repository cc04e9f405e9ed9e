"""The outside world, played by a namespace behind the one that the tests are called in, which `make test` makes too:
the suite never sees the machine's own links.

outside                     the tests' own namespace ("the host")          pod
wan0 192.0.2.2  ══════════  ukt-wan 192.0.2.1   uk7 ═══ eth0 ── ukbr0 ── guests
     2001:db8:77::2                 2001:db8:77::1
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from launcher import state

HOST = {4: "192.0.2.1", 6: "2001:db8:77::1"}
OUTSIDE = {4: "192.0.2.2", 6: "2001:db8:77::2"}
LINK = "ukt-wan"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def played_outside() -> Iterator[Path]:
    """Its namespace. It knows no way to any pod."""
    ways_out = subprocess.run(["ip", "-o", "route", "show", "default"], check=True, capture_output=True, text=True)
    assert not ways_out.stdout, "this machine has a way out, and these tests send packets: run them by `make test`"
    name = f"ukt-outside-{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("link", "add", LINK, "type", "veth", "peer", "name", "wan0", "netns", name)
        for words, link, here in (([], LINK, HOST), (["-n", name], "wan0", OUTSIDE)):
            ip(*words, "addr", "add", f"{here[4]}/24", "dev", link)
            ip(*words, "addr", "add", f"{here[6]}/64", "dev", link, "nodad")
            ip(*words, "link", "set", link, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield state.NETNS_DIR / name
    finally:
        subprocess.run(["ip", "link", "del", LINK], check=False, capture_output=True)
        ip("netns", "del", name)


def rules(netns: Path | None = None) -> str:
    """All nftables rules of a namespace."""
    enter = ["nsenter", f"--net={netns}"] if netns else []
    return subprocess.run([*enter, "nft", "list", "ruleset"], check=True, capture_output=True, text=True).stdout
