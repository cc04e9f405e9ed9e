"""CNI networks, run with Debian's plugins: ADD, its result, DEL; and each way in which a plugin lets one down."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cni, control, net, pod, state, uplink
from launcher.errors import UklaunchError, UsageError
from launcher.model import Port
from launcher.publish import Publish

from ..cli import shown, uklaunch
from .conftest import PLAN, played_pod
from .outside import ip, rules
from .test_localhost import ANY, FAMILIES, KINDS, open_in, talk_tcp, talk_udp

pytestmark = pytest.mark.net

THE_HOST = Path("/proc/self/ns/net")
BRIDGE = "ukt-cni0"
GATEWAY = {4: "203.0.113.1", 6: "2001:db8:79::1"}


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration directory with the network `lan`: Debian's bridge and tuning plugins."""
    directory = tmp_path / "net.d"
    directory.mkdir()
    monkeypatch.setenv("CNI_CONF_DIR", str(directory))
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isDefaultGateway": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(tmp_path / "leases"),
            "ranges": [[{"subnet": "203.0.113.0/24"}], [{"subnet": "2001:db8:79::/64"}]],
        },
        "dns": {"nameservers": ["203.0.113.53"], "search": ["lan.test"], "options": ["ndots:2"]},
    }
    write(directory / "10-lan.conflist", "lan", bridge, {"type": "tuning", "mtu": 1450})
    yield directory
    if BRIDGE in net.link_indexes(THE_HOST):
        ip("link", "del", BRIDGE)  # the plugin leaves it


def write(path: Path, name: str, *plugins: dict[str, Any], version: str = "1.0.0") -> None:
    path.write_text(json.dumps({"cniVersion": version, "name": name, "plugins": plugins}))


def leases(conf: Path) -> list[str]:
    directory = conf.parent / "leases" / "lan"
    return sorted(path.name for path in directory.glob("*.*.*.*")) if directory.exists() else []


def test_add_its_result_and_del(conf: Path) -> None:
    with played_pod(1, name="cni", outside="cni:lan") as made:
        record = made.record
        assert leases(conf) == [record.uplink_ipv4]
        assert record.uplink_link == "eth0"
        assert record.uplink_ipv6.startswith("2001:db8:79::")
        found = uplink.resolve(record, PLAN)
        assert [str(address) for address in found.nameservers] == ["203.0.113.53"]
        assert (found.search, found.options) == (("lan.test",), ("ndots:2",))
        mtu = subprocess.run(
            ["ip", "-n", made.netns.name, "link", "show", "eth0"], capture_output=True, text=True, check=True
        )
        assert "mtu 1450" in mtu.stdout  # the second plugin was given the first one's result
        for version, protocol, client in itertools.product(FAMILIES, KINDS, (made.netns, made.guests[0].netns)):
            with open_in(THE_HOST, version, protocol) as server, open_in(client, version, protocol) as sock:
                server.bind((ANY[version], 0))
                target = (GATEWAY[version], server.getsockname()[1])
                peer = (talk_tcp if protocol == "tcp" else talk_udp)(server, sock, target)
                assert peer in (record.uplink_ipv4, record.uplink_ipv6)
        item = Publish(host=24001, guest=Port(80))
        uplink.publish(record, [item])
        for version in FAMILIES:
            with open_in(made.netns, version, "tcp") as listener, open_in(THE_HOST, version, "tcp") as sock:
                listener.bind((ANY[version], 80))
                talk_tcp(listener, sock, (GATEWAY[version], 24001))
    assert leases(conf) == []
    assert cni.pods() == []
    assert '"cni"' not in rules()


def test_by_the_command_line(conf: Path) -> None:
    env = {"CNI_CONF_DIR": str(conf)}
    result = uklaunch("pod", "create", "cni-cli", "--network", "cni:lan", env=env)
    assert result.returncode == 0, shown(result)
    assert len(leases(conf)) == 1
    result = uklaunch("pod", "rm", "cni-cli", env=env)
    assert result.returncode == 0, shown(result)
    assert leases(conf) == []


def test_gc_gives_back_what_a_lost_pod_had(conf: Path) -> None:
    record = pod.create("cni-lost", outside="cni:lan")
    state.forget_pod("cni-lost")
    assert "of pod cni-lost" in [item.name for item in control.collect()]
    assert leases(conf) == []
    net.delete_netns(Path(record.netns))


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ("cni:wan", "no CNI network 'wan'"),
        ("cni:", "no CNI network ''"),
        ("cni:absent", "no plugin 'ukt-absent'"),
        ("cni:slash", "no plugin '../bridge'"),
        ("cni:old", "version 0.1.0"),
        ("bridge", "--uplink 'bridge'"),
        ("", "--uplink ''"),
    ],
)
def test_bad_networks(network: str, says: str, conf: Path) -> None:
    write(conf / "20-absent.conflist", "absent", {"type": "ukt-absent"})
    write(conf / "20-slash.conflist", "slash", {"type": "../bridge"})
    write(conf / "20-old.conflist", "old", {"type": "bridge"}, version="0.1.0")
    with pytest.raises(UsageError, match=says):
        pod.create("cni-bad", outside=network)
    assert state.read_pod("cni-bad") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"name": 1, "plugins": []}', '{"name": "x", "plugins": [{}]}', "7"])
def test_bad_files(text: str, conf: Path) -> None:
    (conf / "00-bad.conflist").write_text(text)
    with pytest.raises(UsageError, match="00-bad"):
        pod.create("cni-bad", outside="cni:lan")


def plugin(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "printf %s '" + json.dumps({"code": 7, "msg": "no\naddress", "details": "a\nb"}) + "'; exit 1",
            "ADD: no address",
        ),
        ("echo trouble >&2; exit 3", "trouble"),
        ("exit 4", "exit code 4"),
        ("kill -9 $$", "exit code -9"),
        ('echo \'{"ips": [{"address": "nonsense"}]}\'', "cannot be understood"),
    ],
)
def test_a_plugin_that_fails_leaves_nothing(
    script: str, says: str, conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin before it has its DEL, and so has the failed one."""
    plugin(
        tmp_path / "bin",
        "ukt-fails",
        f'echo "$CNI_COMMAND" >>{tmp_path}/called; [ $CNI_COMMAND = DEL ] && exit 0\n{script}',
    )
    monkeypatch.setenv("CNI_PATH", f"{cni.PLUGIN_DIRS}:{tmp_path}/bin")
    lan = json.loads((conf / "10-lan.conflist").read_text())["plugins"][0]
    write(conf / "30-fails.conflist", "lan2", lan, {"type": "ukt-fails"})
    with pytest.raises(UklaunchError, match=says) as caught:
        pod.create("cni-fails", outside="cni:lan2")
    assert "\n" not in caught.value.message + caught.value.hint
    assert (tmp_path / "called").read_text().split() == ["ADD", "DEL"]
    assert leases(conf) == []
    assert state.read_pod("cni-fails") is None
    assert not Path("/run/netns/uk-cni-fails").exists()
    assert cni.pods() == []


def test_a_del_that_fails_is_told_and_the_pod_goes_all_the_same(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(tmp_path / "bin", "ukt-stays", "[ $CNI_COMMAND = DEL ] && { echo stuck >&2; exit 1; }; exec cat /dev/null")
    monkeypatch.setenv("CNI_PATH", f"{cni.PLUGIN_DIRS}:{tmp_path}/bin")
    lan = json.loads((conf / "10-lan.conflist").read_text())["plugins"][0]
    write(conf / "30-stays.conflist", "lan", lan, {"type": "ukt-stays"})
    (conf / "10-lan.conflist").unlink()
    record = pod.create("cni-stays", outside="cni:lan")
    with pytest.raises(UklaunchError, match="ukt-stays failed to DEL: stuck"):
        pod.delete("cni-stays")
    assert leases(conf) == []
    assert state.read_pod("cni-stays") is None
    assert not Path(record.netns).exists()
    assert f"{os.sep}cni-stays" not in str(cni.pods())
