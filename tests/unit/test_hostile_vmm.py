"""A VMM that its guest has taken over: whatever it says on its sockets, or does not, the supervisor stays what it is.

A program of the attacker's takes QEMU's place, with the descriptors that QEMU gets. Each attack is a piece of Python.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from launcher.errors import UklaunchError, first_error
from launcher.imagefile import ImageFile
from launcher.model import Accel, Boot, Machine
from launcher.vmm import qemu, sandbox

from ..fixtures import NIC

PATIENCE_S = 20  # for what ends at once on a quiet machine
SHORT_S = 0.4  # for what may last
MEMORY_MIB = 10  # that an attack may cost the supervisor

ATTACKER = """\
#!/usr/bin/python3 -IS
import json, os, random, signal, socket, sys, time
def end(name):
    word = next(word for word in sys.argv if f"id={name}," in word)
    fd = next(part for part in word.split(",") if part.startswith("fd="))
    found = socket.socket(fileno=int(fd[3:]))
    return found.accept()[0] if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) else found
qmp, console = end("qmp"), end("console")
unread = ""
def hear():  # QEMU's clients put nothing between two commands
    global unread
    while True:
        try:
            command, length = json.JSONDecoder().raw_decode(unread)
            unread = unread[length:].lstrip()
            return command
        except ValueError:
            data = qmp.recv(1 << 16)
            if not data:
                sys.exit(0)
            unread += data.decode()
def say(what):
    qmp.sendall(what if isinstance(what, bytes) else json.dumps(what).encode() + b"\\r\\n")
def greet():
    say({"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}})
def answer(count=1, result={}):
    heard = None
    for _ in range(count):
        heard = hear()
        say({"return": result, **({"id": heard["id"]} if "id" in heard else {})})
    return heard["execute"] if heard else None
def ready():
    greet()
    while answer() != "query-status":
        pass
def event(name="SHUTDOWN", **more):
    return {"event": name, "data": {"guest": True, "reason": "guest-shutdown"},
            "timestamp": {"seconds": 1, "microseconds": 1}, **more}
def serve():
    while answer() != "quit":
        pass
"""

# Before it is ready: what the supervisor says of it is one line.
AT_THE_START = {
    "ends at once": "sys.exit(3)",
    "hangs up and stays": "qmp.close(); time.sleep(1000)",
    "says nothing": "time.sleep(1000)",
    "greets and says nothing": "greet(); time.sleep(1000)",
    "says half a greeting": 'say(b\'{"QMP": {"vers\'); time.sleep(1000)',
    "hangs up within its greeting": 'say(b\'{"QMP": {"vers\')',
    "is no QMP": "say(b'SSH-2.0-OpenSSH_9.2\\r\\n'); time.sleep(1000)",
    "is binary": "say(os.urandom(1 << 16) + b'\\n'); time.sleep(1000)",
    "greets with a number": "say({'QMP': 5}); time.sleep(1000)",
    "greets with a list": "say([1, 2]); time.sleep(1000)",
    "greets with null": "say(b'null\\n'); time.sleep(1000)",
    "greets with depth": "say(b'[' * 60_000 + b'\\n'); time.sleep(1000)",
    "greets with a long number": "say(b'{\"QMP\": ' + b'9' * 9000 + b'}\\n'); time.sleep(1000)",
    "greets without end": "chunk = b'x' * (1 << 20)\nwhile True: say(chunk)",
    "greets in many small lists": "say(b'[' + b'[],' * 5_000_000 + b'[]]\\n'); time.sleep(1000)",
    "answers with an error": "greet(); heard = hear()\n"
    "say({'error': {'class': 'GenericError', 'desc': 'a\\x1b[31m\\nb'}, 'id': heard.get('id')}); time.sleep(1000)",
    "answers with half an error": "greet(); hear(); say({'error': 7}); time.sleep(1000)",
    "answers to somebody else": "greet()\nwhile hear(): say({'return': {}, 'id': 'x\\x1b[2J'})",
    "answers to a list": "greet(); hear(); say({'return': {}, 'id': [1]}); time.sleep(1000)",
    "answers neither": "greet(); h = hear(); say({'id': h.get('id')}); time.sleep(1000)",
    "is silent after its greeting": "greet(); answer(); time.sleep(1000)",
    "floods after its greeting": "greet(); answer()\nwhile True: say(json.dumps(event()).encode() + b'\\n')",
    "complains in colours": "sys.stderr.write('\\x1b[31mred\\x07' + 'x' * 100_000 + '\\n'); sys.exit(1)",
    "complains without end": "chunk = b'x' * (1 << 16)\nfor _ in range(1600): os.write(2, chunk)\nsys.exit(1)",
}

# Once it runs.
LATER = {
    "behaves": "serve()",
    "hangs up": "qmp.close(); time.sleep(1000)",
    "never answers": "time.sleep(1000)",
    "never answers, nor reads": "signal.pause()",
    "answers twice": "while True:\n heard = hear()\n for _ in range(3): say({'return': {}, 'id': heard['id']})",
    "floods with news": "one = json.dumps(event()).encode() + b'\\n'\nfor _ in range(150): say(one * 1000)\nserve()",
    "floods with other news": "one = json.dumps(event('X' * 99)).encode() + b'\\n'\n"
    "for _ in range(150): say(one * 1000)\nserve()",
    "floods without end": "one = json.dumps(event()).encode() + b'\\n'\nwhile True: say(one * 1000)",
    "floods with answers": "one = json.dumps({'return': {}, 'id': 'x\\x1b[2J'}).encode() + b'\\n'\n"
    "for _ in range(20): say(one * 1000)\nserve()",
    "has large news": "for _ in range(20): say({**event(), 'data': 'x' * (8 << 20)})\nserve()",
    "has news of a list": "say({'event': ['SHUTDOWN']}); serve()",
    "has news without data": "say({'event': 'SHUTDOWN'}); serve()",
    "has news with a list for data": "say({**event(), 'data': [1]}); serve()",
    "has news with a number for a reason": "say({**event(), 'data': {'reason': 5}}); serve()",
    "has news with a long reason": "say({**event(), 'data': {'reason': '\\x1b' * 60_000}}); serve()",
    "has news in half": "say(json.dumps(event()).encode()[:40])",
    "has deep news": "say(b'{\"event\": \"SHUTDOWN\", \"data\": ' + b'[' * 60_000 + b'\\n'); time.sleep(1000)",
    "complains of us": "say({'error': {'class': 'x', 'desc': 'y'}}); time.sleep(1000)",
    "talks on its console": "import threading\n"
    "threading.Thread(target=lambda: [console.sendall(os.urandom(1 << 16)) for _ in range(500)], daemon=True).start()\n"
    "serve()",
    "closes its console": "console.close(); serve()",
}
SEEDS = range(4 * int(os.environ.get("UKLAUNCH_FUZZ", "1")))
BABBLES = """
random.seed({seed})
def value(depth):
    kind = random.randrange(9 if depth else 6)
    if kind < 6:
        return [None, True, -1, 1e308, "return", "\\ud800\\x1b"][kind]
    if kind < 7:
        return [value(depth - 1) for _ in range(random.randrange(4))]
    return {{key: value(depth - 1) for key in random.sample(KEYS, random.randrange(5))}}
KEYS = ["event", "data", "reason", "return", "error", "id", "timestamp", "QMP", "class", "desc"]
for _ in range(300):
    what = dict(random.choice([event(), event("GUEST_PANICKED"), {{"return": {{}}}}, {{}}]))
    for key in random.sample(KEYS, random.randrange(3)):
        what[key] = value(3)
    line = bytearray(json.dumps(what).encode())
    if random.random() < 0.02:
        line[random.randrange(len(line))] = random.randrange(256)
    say(bytes(line) + b"\\n")
serve()
"""


@pytest.fixture
def attacker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program, to be written; it is found where QEMU would be. Parameter: will it be given up soon?"""
    program = tmp_path / qemu.BINARY
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    start = sandbox.start

    async def start_attacker(command: Sequence[str], **kwargs: Any) -> sandbox.Process:
        python = ("/usr/bin/python3", "-IS", "-c", program.read_text())  # the program itself is not in its /usr
        return await start([*python, *command[1:]], **kwargs)

    monkeypatch.setattr(sandbox, "start", start_attacker)
    monkeypatch.setattr(qemu, "QMP_TIMEOUT_S", SHORT_S if request.param else PATIENCE_S)
    monkeypatch.setattr(qemu, "LAST_WORDS_S", 0.1)
    return program


@pytest.fixture(autouse=True)
def quiet_and_small(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is printed, also not by asyncio about a task that failed unseen, and little memory is taken."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is counted from here
    before = memory_peak_mib()
    yield
    taken = memory_peak_mib() - before
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == []
    assert capfd.readouterr() == ("", "")
    assert taken < MEMORY_MIB


def memory_peak_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


async def supervise(program: Path) -> str:
    """As a guest's supervisor does, from the start to the end; returns what it makes of the end."""
    boot = Boot(kernel=ImageFile(program), cmdline="x", memory_mib=64, cpus=1, nic=NIC, machines=(Machine.Q35,))
    lock = os.open(program, os.O_RDONLY)
    tap = os.open("/dev/null", os.O_RDWR)
    try:
        with trio.fail_after(2 * PATIENCE_S):
            async with (
                qemu.run_qemu(
                    boot, tap_fd=tap, accel=Accel.TCG, kvm_group=None, lock_fd=lock, directory=program.parent
                ) as vmm,
                trio.open_nursery() as nursery,
            ):

                async def read_console() -> None:
                    async for _ in vmm.console:
                        pass

                nursery.start_soon(read_console)
                qemu.QMP_TIMEOUT_S = SHORT_S  # undone with the fixture's
                for step in (vmm.resume, vmm.power_down, vmm.quit):
                    try:
                        await step()
                    except UklaunchError as exc:
                        check(exc)
                vmm.kill()
                await vmm.wait()
                reason = await vmm.shutdown_reason()
                nursery.cancel_scope.cancel()
    finally:
        os.close(lock)
        os.close(tap)
    return reason


def check(error: UklaunchError) -> None:
    assert error.message.isprintable()
    assert len(error.message) < 400


@pytest.mark.parametrize("attacker", [True], indirect=True, ids=[""])
@pytest.mark.parametrize("attack", AT_THE_START)
def test_at_the_start(attack: str, attacker: Path) -> None:
    attacker.write_text(ATTACKER + AT_THE_START[attack])
    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(supervise, attacker)
    error = first_error(caught.value)
    assert error is not None, caught.getrepr()
    assert error.message.startswith("QEMU did not start")
    check(error)


@pytest.mark.parametrize("attacker", [False], indirect=True, ids=[""])
@pytest.mark.parametrize("attack", LATER)
def test_later(attack: str, attacker: Path) -> None:
    attacker.write_text(ATTACKER + "ready()\n" + LATER[attack])
    assert trio.run(supervise, attacker) in ("", "guest-shutdown", "guest-panic")


@pytest.mark.parametrize("attacker", [False], indirect=True, ids=[""])
@pytest.mark.parametrize("seed", SEEDS)
def test_babble(seed: int, attacker: Path) -> None:
    attacker.write_text(ATTACKER + "ready()\n" + BABBLES.format(seed=seed))
    assert trio.run(supervise, attacker) in ("", "guest-shutdown", "guest-panic")
