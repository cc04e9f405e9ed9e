"""`uklaunch run --config`: what the file says becomes options, and what is wrong with it one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.arguments import parser
from launcher.errors import UsageError

FULL = """
image = "images/web.img"
pod = "shop"
memory = "256M"
cpus = 0.5
disk_iops = 100
net_rate = "50mbit:10mbit"
mtu = 9000
ports = ["80", "53/udp"]
publish = ["8080:80"]
env = { MODE = "edge", LEVEL = 3 }
cmdline = "--verbose serve"
uplink = "none"
stop_timeout = 2.5
ready_port = 80
restart = "always"
watchdog = true
"""


def test_every_key(tmp_path: Path) -> None:
    file = tmp_path / "web.toml"
    file.write_text(FULL)
    args = parser().parse_args(["run", "--config", str(file)])
    assert args.image == str(tmp_path / "images/web.img")
    assert (args.pod, args.name, args.memory, args.cpus, args.mtu) == ("shop", "web", "256M", "0.5", "9000")
    assert (args.disk_iops, args.net_rate) == (100, "50mbit:10mbit")
    assert (args.expose, args.publish, args.env) == (["80", "53/udp"], ["8080:80"], ["MODE=edge", "LEVEL=3"])
    assert (args.cmdline, args.uplink, args.stop_timeout, args.ready_port) == ("--verbose serve", "none", 2.5, 80)
    assert (args.restart, args.watchdog) == ("always", True)


def test_what_is_given_comes_after(tmp_path: Path) -> None:
    file = tmp_path / "web.toml"
    file.write_text('image = "default"\npod = "shop"\nmemory = "256M"\nports = ["80"]\n')
    args = parser().parse_args(["run", "-m", "1G", "--config", str(file), "--expose", "81", "--rm"])
    assert (args.image, args.memory, args.expose, args.rm) == ("default", "1G", ["80", "81"], True)


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        ("memroy = '1G'", "memroy is unknown", "did you mean memory?"),
        ("expose = ['80']", "expose is unknown", "known are"),
        ("detach = true", "detach is unknown", "known are"),
        ("config = 'other.toml'", "config is unknown", "known are"),
        ("pod = ['a', 'b']", "pod is a list", "there is one"),
        ("pod = true", "pod is neither a text nor a number", ""),
        ("watchdog = 'yes'", "watchdog is neither true nor false", ""),
        ("env = ['A=B']", "env is not a table", "KEY"),
        ("image = 3", "image is not a text", "image"),
        ("pod = ", "Invalid value", ""),
    ],
)
def test_complaints_name_the_file_and_the_key(tmp_path: Path, text: str, complaint: str, hint: str) -> None:
    file = tmp_path / "web.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        parser().parse_args(["run", "--config", str(file)])
    assert caught.value.message.startswith(f"{file}: ")
    assert complaint in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        parser().parse_args(["run", "--config", str(tmp_path / "web.toml")])
