"""The localhost matrix on real guests, where it can be covered at QEMU's price: every way, TCP and UDP, both families.

tests/net has the whole of it, with namespaces as guests; the demo has the way from a real container into guests.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio

from launcher import GuestSpec, RunOptions, identify, open_pod, run_guest
from launcher.arguments import DEFAULT_BUNDLE
from launcher.container import container
from launcher.demo import CONTAINER_SERVER, Shell

pytestmark = pytest.mark.boot

POD = "boot-localhost"
# HTTP on $PORT for both families; a UDP server for each of the ways that ends here: netcat serves one peer each.
SERVERS = """
mkdir /w; hostname >/w/index.html; httpd -p $PORT -h /w
for n in 1 2 3 4; do
    case $n in 1 | 2) v=4 ;; *) v=6 ;; esac
    mkfifo /tmp/f$n
    netcat -$v -u -l $((PORT + n)) </tmp/f$n | while read -r line; do echo "$(hostname) heard $line"; done >/tmp/f$n &
done
stty -echo; sh 2>&1 | cat
"""
HTTP = {"one": 8100, "two": 8200}


def get(version: int, port: int) -> str:
    return f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | netcat -{version} -w 2 localhost {port} | tail -n 1"


def send(version: int, port: int) -> str:
    return f"echo hello | netcat -{version} -u -w 1 localhost {port}"


def cases(me: str, other: str) -> list[tuple[str, str]]:
    """(command, what it must print) in guest `me`; UDP server n of a guest: 1, 3 for itself, 2, 4 for the other."""
    return [
        *((get(version, HTTP[other]), other) for version in (4, 6)),
        *((get(version, HTTP[me]), me) for version in (4, 6)),
        *(
            (get(version, 9090), f"hello from the container to {peer}")
            for version, peer in ((4, "127.0.0.1"), (6, "::1"))
        ),
        *((send(version, HTTP[other] + server), f"{other} heard hello") for version, server in ((4, 2), (6, 4))),
        *((send(version, HTTP[me] + server), f"{me} heard hello") for version, server in ((4, 1), (6, 3))),
        *((send(version, 9091), f"heard from {peer}: hello") for version, peer in ((4, "127.0.0.1"), (6, "::1"))),
        *((f"netcat -{version} -v -w 2 localhost 7 2>&1 </dev/null", "refused") for version in (4, 6)),
    ]


async def test_every_way_on_real_guests() -> None:
    shells = {name: Shell() for name in HTTP}
    image = identify(DEFAULT_BUNDLE)
    wrong = []
    async with contextlib.AsyncExitStack() as stack:
        record = await stack.enter_async_context(open_pod(POD))
        for name, shell in shells.items():
            spec = GuestSpec(name=name, pod=POD, image=image, cmdline=SERVERS, env={"PORT": str(HTTP[name])})
            options = RunOptions(ready_port=HTTP[name], remove_when_done=True, on_console=shell.hear)
            shell.guest = await stack.enter_async_context(run_guest(spec, options))
        for shell in shells.values():
            assert shell.guest is not None
            await shell.guest.wait_ready(60)
        with container(Path(record.netns), ["/usr/bin/python3", "-c", CONTAINER_SERVER], says="listening"):
            for me, other in (("one", "two"), ("two", "one")):
                for command, wanted in cases(me, other):
                    answer = await shells[me].ask(command)
                    if wanted not in answer:
                        wrong.append(f"{me}: {command}: {answer!r}, wanted {wanted!r}")
    assert not wrong, "\n".join(wrong)


async def test_cancelling_a_script_takes_everything_back() -> None:
    image = identify(DEFAULT_BUNDLE)
    with trio.move_on_after(1) as scope:
        async with (
            open_pod(POD),
            run_guest(GuestSpec(name="x", pod=POD, image=image), RunOptions(remove_when_done=True, stop_timeout_s=0)),
        ):
            await trio.sleep_forever()
    assert scope.cancelled_caught
