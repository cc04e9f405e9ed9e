"""Units and generator, as far as they can be judged without a systemd that runs: tests/boot/test_systemd.py has one."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import capabilities

from ..systemd import UNITS

GENERATOR = UNITS / "uklaunch-generator"
ROOT = UNITS.parent.parent

# systemd-analyze security, times ten: 0 is shut in, 100 is free. A supervisor makes namespaces, mounts, devices and BPF
# programs for others to see: much that would lower its figure would break that. Its QEMU drops all of it.
EXPOSURE = {"uklaunch-router.service": 18, "uklaunch@web.service": 65, "uklaunch-pod@shop.service": 63}


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Our units, and an instance of each template."""
    for path in UNITS.iterdir():
        if path.suffix in (".service", ".target"):
            shutil.copy(path, tmp_path)
    for instance in EXPOSURE:
        template = tmp_path / (instance.partition("@")[0] + "@.service")
        if "@" in instance:
            shutil.copy(template, tmp_path / instance)
    for path in tmp_path.iterdir():  # where systemd looks for commands is compiled in, and no venv is there
        path.write_text(path.read_text().replace("=uklaunch ", "=/bin/true ").replace("=-uklaunch ", "=-/bin/true "))
    return tmp_path


def run(*command: str | Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload,no-any-return]


def test_units_are_right(units: Path) -> None:
    result = run("systemd-analyze", "verify", "--man=no", *(units / name for name in (*EXPOSURE, "uklaunch.target")))
    ours = [line for line in result.stderr.splitlines() if "uklaunch" in line]
    assert (result.returncode, ours) == (0, [])


@pytest.mark.parametrize("unit", EXPOSURE)
def test_units_are_shut_in(units: Path, unit: str) -> None:
    result = run("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE[unit]}", units / unit)
    assert result.returncode == 0, result.stdout
    said = re.search(r"Overall exposure level .*: (\d\.\d) ", result.stdout)
    assert said, result.stdout
    name = re.sub(r"@\w+", "@NAME", unit)
    assert re.search(rf"^\| `{name}` \|.*[ ;]{re.escape(said[1])}\b", (ROOT / "README.md").read_text(), re.MULTILINE)


# --- the generator ---


def generate(tmp_path: Path, **files: str) -> tuple[dict[str, str], str]:
    """Files by name, with `_` for the dot. Returns what is made, by path (links: where they lead), and the log."""
    etc, out = tmp_path / "etc", tmp_path / "out"
    etc.mkdir()
    out.mkdir()
    for name, text in files.items():
        (etc / name.replace("_", ".")).write_text(text)
    result = run(GENERATOR, out, out, out, env={"UKLAUNCH_UNITS": str(etc)})
    assert result.returncode == 0, result.stderr
    made = {
        str(path.relative_to(out)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in out.rglob("*")
        if path.is_symlink() or path.is_file()
    }
    return made, result.stderr


GUEST = """
# a comment
[Unit]
After=other.service
[Guest]
Image=web.img
Pod=my-shop
Memory=1M
Memory=2M
Publish=80:80
Publish=
Publish=443:\\
; continued
 443
Env=A=b "c" \\d $e
EnvFile=secret
EnvFile=%d/other
Watchdog=no
Watchdog=yes
[Service]
MemoryMax=1G
[Install]
WantedBy=a.target b.target
"""


def test_a_guest_and_its_pod(tmp_path: Path) -> None:
    made, log = generate(
        tmp_path,
        web_guest=GUEST.replace("443:\\\n; continued\n 443", "443:443"),
        **{"my-shop_pod": "[Pod]\nUplink=none"},
    )
    assert log == ""
    etc = tmp_path / "etc"
    assert made.pop("a.target.wants/uklaunch@web.service").endswith("/uklaunch@.service")
    assert made.pop("b.target.wants/uklaunch@web.service").endswith("/uklaunch@.service")
    assert made == {
        "uklaunch@web.service.d/10-guest.conf": f"""\
# Made of {etc}/web.guest by uklaunch-generator
[Unit]
SourcePath={etc}/web.guest
Requires=uklaunch-pod@my-shop.service
After=uklaunch-pod@my-shop.service
After=other.service

[Service]
ExecStart=
ExecStart=uklaunch run --take-over "--name=web" "--pod=my-shop" \
"--memory=2M" "--publish=443:443" "--env=A=b \\"c\\" \\\\d $$e" \
"--env-file={etc}/secret" "--env-file=%d/other" "--watchdog" "{etc}/web.img"
Slice=uklaunch-my\\x2dshop.slice
MemoryMax=1G
""",
        "uklaunch-pod@my-shop.service.d/10-pod.conf": f"""\
# Made of {etc}/my-shop.pod by uklaunch-generator
[Unit]
SourcePath={etc}/my-shop.pod

[Service]
ExecStart=
ExecStart=uklaunch pod create "--uplink=none" my-shop
Slice=uklaunch-my\\x2dshop.slice
""",
    }


GOOD = "[Guest]\nImage=default\nPod=shop\n"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("bad_guest", "nonsense", "line 1: neither"),
        ("bad_guest", "Image=x", "line 1: neither"),
        ("bad_guest", "[Pod]\n", "section [Pod] is unknown"),
        ("bad_guest", "[Unit]\n", "it has no section [Guest]"),
        ("bad_guest", "[Guest]\nPod=a\n", "[Guest] has no Image="),
        ("bad_guest", "[Guest]\nImage=a\n", "[Guest] has no Pod="),
        ("bad_guest", GOOD + "Imag=default\n", "[Guest] Imag= is unknown"),
        ("bad_guest", GOOD + "Watchdog=maybe\n", "Watchdog=maybe is neither yes nor no"),
        ("bad_guest", GOOD + "[Install]\nAlias=ssh.service\n", "[Install] Alias= is unknown"),
        ("bad_guest", GOOD + "[Install]\nWantedBy=../../etc\n", "is not the name of a unit"),
        ("Bad_guest", GOOD, "lower-case letters"),
        ("bad_pod", "[Pod]\nName=x\n", "[Pod] Name= is unknown"),
        ("bad_pod", "[Pod]\n\0\udce9", ""),
    ],
)
def test_a_wrong_file_is_left_out_and_the_others_are_not(tmp_path: Path, name: str, text: str, why: str) -> None:
    etc, out = tmp_path / "etc", tmp_path / "out"
    etc.mkdir()
    out.mkdir()
    (etc / "good.guest").write_text(GOOD)
    file = etc / name.replace("_", ".")
    file.write_bytes(text.encode(errors="surrogateescape"))
    result = run(GENERATOR, out, out, out, env={"UKLAUNCH_UNITS": str(etc)})
    assert result.returncode == 0
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"uklaunch-generator: {file} is left out: ")
    assert why in result.stderr
    assert [path.name for path in out.iterdir()] == ["uklaunch@good.service.d"]


def test_no_directory_is_no_error(tmp_path: Path) -> None:
    result = run(GENERATOR, tmp_path, tmp_path, tmp_path, env={"UKLAUNCH_UNITS": str(tmp_path / "none")})
    assert (result.returncode, result.stderr, list(tmp_path.iterdir())) == (0, "", [])


def test_one_of_two_files_for_a_guest(tmp_path: Path) -> None:
    made, log = generate(tmp_path, web_guest=GOOD, web_toml="")
    assert made == {}
    assert "web.toml too" in log


def test_its_options_are_those_of_the_command_line() -> None:
    generator = runpy.run_path(str(GENERATOR))
    for command, known in ((("run",), generator["GUEST"]), (("pod", "create"), generator["POD"])):
        text = run(sys.executable, "-m", "launcher", *command, "--help", cwd=ROOT).stdout.replace(",", " ").split()
        assert set(known.values()) <= set(text)


def test_it_is_quick() -> None:
    """Every boot and every reload waits for it. pathlib is the most that it takes."""
    result = run("/usr/bin/python3", "-ISX", "importtime", GENERATOR, "/none", env={"UKLAUNCH_UNITS": "/none"})
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "pathlib" in loaded
    assert not {"argparse", "configparser", "subprocess", "typing", "launcher"} & loaded


def test_its_types() -> None:
    result = run(sys.executable, "-m", "mypy", "--strict", GENERATOR, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_a_guests_unit_has_the_capabilities_that_a_supervisor_keeps() -> None:
    lines = (UNITS / "uklaunch@.service").read_text().splitlines()
    (bounding,) = [line.partition("=")[2].split() for line in lines if line.startswith("CapabilityBoundingSet=")]
    assert set(bounding) == set(capabilities.NEEDED)
