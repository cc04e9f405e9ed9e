"""Bad input and machines that lack something: one line that says what, why and what to do; the documented exit code;
nothing left behind."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.arguments import DEFAULT_BUNDLE

from .. import leaks
from ..cli import shown, uklaunch

pytestmark = pytest.mark.boot

# Nobody, but able to read this checkout wherever it is.
NOBODY = (
    "setpriv --reuid 65534 --regid 65534 --clear-groups"
    " --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search"
)
LISTEN = (
    "import socket, subprocess, sys; s = socket.create_server(('', 24901)); sys.exit(subprocess.call(sys.argv[1:]))"
)
NFTABLES = "/usr/lib/python3/dist-packages/nftables"
USAGE, OURS, NOT_RUNNABLE, NOT_FOUND = 2, 125, 126, 127
POD = "bad-input"
RUN = ("run", "default", "--pod", POD)


@dataclass(frozen=True)
class Case:
    args: tuple[str, ...]
    code: int
    says: str  # part of the line
    wrap: str = ""


CASES = {
    "no command": Case((), USAGE, "required"),
    "unknown command": Case(("fly",), USAGE, "invalid choice"),
    "no pod": Case(("run", "default"), USAGE, "--pod"),
    "no such image": Case(("run", "/nowhere.img", "--pod", POD), NOT_FOUND, "/nowhere.img"),
    "a text file": Case(("run", "{tmp}/text", "--pod", POD), NOT_RUNNABLE, "text"),
    "an empty file": Case(("run", "{tmp}/empty", "--pod", POD), NOT_RUNNABLE, "empty"),
    "a gzip archive": Case(("run", "{tmp}/x.gz", "--pod", POD), NOT_RUNNABLE, "gzip"),
    "truncated ELF": Case(("run", "{tmp}/short.elf", "--pod", POD), NOT_RUNNABLE, "truncated"),
    "a directory without manifest": Case(("run", "{tmp}/bare", "--pod", POD), NOT_RUNNABLE, "uklaunch.toml"),
    "bad TOML": Case(("run", "{tmp}/badtoml", "--pod", POD), USAGE, "uklaunch.toml"),
    "unknown key": Case(("run", "{tmp}/badkey", "--pod", POD), USAGE, "kernal"),
    "a device": Case(("run", "/dev/null", "--pod", POD), NOT_RUNNABLE, "/dev/null"),
    "unknown family": Case((*RUN, "--family", "beos"), USAGE, "beos"),
    "pod name with a slash": Case(("run", "default", "--pod", "a/b"), USAGE, "a/b"),
    "pod name of 200 characters": Case(("run", "default", "--pod", "x" * 200), USAGE, "pod name"),
    "guest name with a slash": Case((*RUN, "--name", "../x"), USAGE, "guest name"),
    "guest name of 200 characters": Case((*RUN, "--name", "x" * 200), USAGE, "guest name"),
    "memory 12Q": Case((*RUN, "-m", "12Q"), USAGE, "12Q"),
    "no memory at all": Case((*RUN, "-m", "0"), USAGE, "memory"),
    "port 70000": Case((*RUN, "--expose", "70000"), USAGE, "70000"),
    "ready port 70000": Case((*RUN, "--ready-port", "70000"), USAGE, "70000"),
    "no CPU": Case((*RUN, "--cpus", "0"), USAGE, "--cpus"),
    "half a CPU without cgroup v2": Case(
        (*RUN, "--cpus", "0.5"),
        OURS,
        "no limit of CPU time (--cpus 0.5) can be had",
        wrap='exec unshare --mount sh -c \'mount -t tmpfs none /sys/fs/cgroup && exec "$@"\' sh "$@"',
    ),
    "rates": Case((*RUN, "--net-rate", "50"), USAGE, "'50' is no rate"),
    "disk rate": Case((*RUN, "--disk-rate", "fast"), USAGE, "'fast' is not a rate"),
    "disk requests": Case((*RUN, "--disk-iops", "0"), USAGE, "'0' is not a number"),
    "MTU too small for IPv6": Case((*RUN, "--mtu", "1279"), USAGE, "from 1280 to 65535"),
    "MTU too large": Case((*RUN, "--mtu", "65536"), USAGE, "from 1280 to 65535"),
    "MTU that is no number": Case((*RUN, "--mtu", "9k"), USAGE, "from 1280 to 65535"),
    "bad variable": Case((*RUN, "-e", "1=2"), USAGE, "'1' is not a variable's name"),
    "variable that is not UTF-8": Case((*RUN, "-e", "A=\udcff"), USAGE, "A is not UTF-8"),
    "no such env file": Case((*RUN, "--env-file", "{tmp}/none"), USAGE, "none: No such file"),
    "variable without value": Case((*RUN, "-e", "UKT_NOT_SET"), USAGE, "UKT_NOT_SET"),
    "no such namespace": Case((*RUN, "--netns", "/run/netns/ukt-none"), OURS, "ukt-none"),
    "a namespace that is none": Case((*RUN, "--netns", "/etc/passwd"), OURS, "/etc/passwd"),
    "stop: no such guest": Case(("stop", "nobody"), USAGE, "nobody"),
    "logs: no such guest": Case(("logs", "p/nobody"), USAGE, "nobody"),
    "rm: no such guest": Case(("rm", "nobody"), USAGE, "nobody"),
    "inspect: no such guest": Case(("inspect", "nobody"), USAGE, "nobody"),
    "pod inspect: no such pod": Case(("pod", "inspect", "nopod"), USAGE, "nopod"),
    "pod rm: no such pod": Case(("pod", "rm", "nopod"), USAGE, "nopod"),
    "pod exec: no such pod": Case(("pod", "exec", "nopod", "--", "true"), USAGE, "nopod"),
    "pod create: bad address": Case(("pod", "create", POD, "--ipv4", "10.0.0.300/24"), USAGE, "10.0.0.300"),
    "flows: no such pod": Case(("flows", "nopod"), USAGE, "nopod"),
    "flows -f: no such pod": Case(("flows", "nopod", "-f"), USAGE, "nopod"),
    "flows -f: no interval": Case(("flows", "nopod", "-f", "--interval", "0"), USAGE, "'0' is not a number of seconds"),
    "stats: no such pod": Case(("stats", "nopod"), USAGE, "nopod"),
    "ports: no such pod": Case(("ports", "nopod"), USAGE, "nopod"),
    "pod graph: no such pod": Case(("pod", "graph", "nopod"), USAGE, "nopod"),
    "pcap: no file": Case(("pcap", "nopod"), USAGE, "-w"),
    "pcap: no such pod": Case(("pcap", "nopod", "-w", "{tmp}/x", "tcp", "port", "80"), USAGE, "nopod"),
    "pcap: no such guest": Case(("pcap", "nopod/nobody", "-w", "{tmp}/x"), USAGE, "nobody"),
    "pcap: no packets": Case(("pcap", "nopod", "-w", "{tmp}/x", "--count", "0"), USAGE, "'0' is not a number"),
    "metrics: neither": Case(("metrics",), USAGE, "--listen"),
    "metrics: a name to listen on": Case(("metrics", "--listen", "here:9100"), USAGE, "'here' is not an IP address"),
    "metrics: port 70000": Case(("metrics", "--listen", "70000"), USAGE, "70000"),
    "metrics: a stranger's address": Case(("metrics", "--listen", "192.0.2.1:9100"), OURS, "192.0.2.1 port 9100"),
    "-p without a guest's port": Case((*RUN, "-p", "8080"), USAGE, "8080"),
    "-p with a name": Case((*RUN, "-p", "localhost:80:80"), USAGE, "'localhost' is not an address"),
    "-p with an address of another machine": Case((*RUN, "-p", "192.0.2.77:80:80"), USAGE, "192.0.2.77 is not an"),
    "-p twice": Case((*RUN, "-p", "24900:1", "-p", "127.0.0.1:24900:2"), USAGE, "want the same port"),
    "-p without an uplink": Case((*RUN, "-p", "24900:1", "--uplink", "none"), USAGE, "needs an uplink"),
    "-p on a port that is taken": Case(
        (*RUN, "-p", "24901:1"),
        USAGE,
        "a socket listens on it",
        wrap=f'exec {sys.executable} -c "{LISTEN}" "$@"',
    ),
    "unknown uplink": Case((*RUN, "--uplink", "bridge"), USAGE, "nat, none or cni:NAME"),
    "unknown CNI network": Case((*RUN, "--network", "cni:ukt-none"), USAGE, "'ukt-none'"),
    "an uplink for an adopted namespace": Case(
        (*RUN, "--netns", "/proc/self/ns/net", "--uplink", "nat"), USAGE, "its own uplink"
    ),
    "pod create: bad -p": Case(("pod", "create", POD, "-p", "x:y"), USAGE, "x:y"),
    "no Python binding of nftables": Case(
        RUN,
        OURS,
        "apt-get install python3-nftables",
        wrap=f'exec unshare --mount sh -c \'mount -t tmpfs none {NFTABLES} && exec "$@"\' sh "$@"',
    ),
    "no root": Case(RUN, OURS, "root", wrap=f'exec {NOBODY} -- "$@"'),
    "no QEMU": Case(RUN, OURS, "qemu-system-x86", wrap='PATH={tmp}/bin exec "$@"'),
    "no /dev/net/tun": Case(
        RUN,
        OURS,
        "modprobe tun",
        wrap='exec unshare --mount sh -c \'mount -t tmpfs none /dev/net && exec "$@"\' sh "$@"',
    ),
    "no bpffs": Case(
        RUN, OURS, "mount -t bpf", wrap='exec unshare --mount sh -c \'umount -l /sys/fs/bpf && exec "$@"\' sh "$@"'
    ),
    "QEMU that dies at once": Case((*RUN, "-m", "1000G"), OURS, "QEMU did not start"),
    "KVM demanded and missing": Case(
        (*RUN, "--accel", "kvm"),
        OURS,
        "/dev/kvm",
        wrap='exec unshare --mount sh -c \'mount -t tmpfs none /dev && exec "$@"\' sh "$@"',
    ),
    "guest that never gets ready": Case(
        (*RUN, "-d", "--rm", "--ready-port", "9", "--ready-timeout", "0.5", "--stop-timeout", "0"),
        OURS,
        "did not accept port 9 within 0.5 s",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("bad")
    tmp.chmod(0o755)
    (tmp / "text").write_text("hello\n")
    (tmp / "empty").write_bytes(b"")
    (tmp / "x.gz").write_bytes(b"\x1f\x8b\x08" + bytes(100))
    kernel = (Path("/bin/true")).read_bytes()
    (tmp / "short.elf").write_bytes(kernel[: len(kernel) // 3])
    for name, manifest in (("bare", None), ("badtoml", "kernel = "), ("badkey", 'kernal = "x"')):
        (tmp / name).mkdir()
        if manifest is not None:
            (tmp / name / "uklaunch.toml").write_text(manifest)
    (tmp / "bin").mkdir()
    for tool in ("ip", "unshare", "setpriv"):
        (tmp / "bin" / tool).symlink_to(
            next(p for p in map(Path, ("/usr/bin", "/usr/sbin", "/bin", "/sbin")) if (p / tool).exists()) / tool
        )
    return tmp


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, files: Path) -> None:
    case = CASES[name]
    assert os.geteuid() == 0, "the tests need root"
    assert DEFAULT_BUNDLE.exists(), "run make setup-test"
    before = leaks.ours()
    args = [arg.replace("{tmp}", str(files)) for arg in case.args]
    result = uklaunch(*args, wrap=case.wrap.replace("{tmp}", str(files)))
    assert result.returncode == case.code, shown(result)
    lines = [line for line in result.stderr.splitlines() if "using slow emulation" not in line]
    assert len(lines) == 1, shown(result)
    assert case.says in lines[0], shown(result)
    assert result.stdout == "", shown(result)
    assert leaks.ours() == before
