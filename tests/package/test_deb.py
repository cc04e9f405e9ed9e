"""The Debian package: built, linted, run from where it was unpacked. `make deb-check` installs it in fresh trees."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from launcher.arguments import parser

ROOT = Path(__file__).parent.parent.parent


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the package is made of, so that nobody's build/ is touched."""
    copy = tmp_path_factory.mktemp("package")
    for name in ("launcher", "router", "guest-config", "bpf", "debian"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    built = run("make", "--silent", "--old-file=.venv/.installed-deb", "deb", cwd=copy)
    assert built.returncode == 0, built.stderr
    return next((copy / "build").glob("uklaunch_*.deb"))


@pytest.fixture(scope="module")
def unpacked(package: Path) -> Path:
    root = package.parent / "root"
    assert run("dpkg-deb", "-x", package, root).returncode == 0
    return root


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def test_one_version_for_all_debians(package: Path) -> None:
    assert package.name == f"uklaunch_{version()}_all.deb"  # debian/changelog's is pyproject.toml's


def test_lintian_finds_no_error(package: Path) -> None:
    linted = run("lintian", "--allow-root", "--fail-on", "error", package)
    assert linted.returncode == 0, linted.stdout


def test_runs_from_where_it_is_unpacked(unpacked: Path) -> None:
    said = run(unpacked / "usr/bin/uklaunch", "--version", env={}, cwd="/")
    assert (said.stdout, said.stderr) == (f"uklaunch {version()}\n", "")


def test_brings_all_that_a_supervisor_imports(unpacked: Path) -> None:
    """None of it from this venv: Debian's python, and of Debian's packages only those that the package depends on."""
    code = unpacked / "usr/lib/uklaunch/dist"
    control = (ROOT / "debian/control").read_text()
    debian = ("greenlet", "idna", "outcome", "sortedcontainers")
    assert all(f"python3-{name}" in control for name in debian)
    wanted = "launcher.foreground, launcher.run, launcher.demo, launcher.observe.metrics, launcher.guests.nocloud"
    check = f"""
import sys
sys.path[:0] = [{str(code)!r}, {str(code / "vendor")!r}]
import {wanted}, trio_asyncio, qemu.qmp, pyroute2, pycdlib, prometheus_client
homes = {{name: m.__file__ for name, m in sys.modules.items() if "." not in name and getattr(m, "__file__", None)}}
print(*(name for name, file in homes.items() if "dist-packages" in file))
print(*(name for name, file in homes.items() if "venv" in file))
"""
    said = run("/usr/bin/python3", "-I", "-c", check, env={}, cwd="/")
    if "No module named" in said.stderr and any(f"'{name}'" in said.stderr for name in debian):
        pytest.skip(f"this machine has not got Debian's {said.stderr.splitlines()[-1].split()[-1]}")
    assert said.returncode == 0, said.stderr
    from_debian, from_venv = said.stdout.splitlines()
    optional = {"certifi", "_distutils_hack"}  # of this machine: used if they are there
    assert set(from_debian.split()) - optional <= {*debian, "bcc", "nftables"}
    assert not from_venv


@pytest.mark.bpf
def test_doctor_runs_from_where_it_is_unpacked(unpacked: Path) -> None:
    said = run(unpacked / "usr/bin/uklaunch", "doctor", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, cwd="/")
    assert "BPF router" in said.stdout, said.stderr


def test_the_man_page_and_completions_know_every_command(unpacked: Path) -> None:
    share = unpacked / "usr/share"
    man = gzip.decompress((share / "man/man1/uklaunch.1.gz").read_bytes()).decode().replace("\\-", "-")
    completions = [
        (share / path).read_text()
        for path in (
            "bash-completion/completions/uklaunch",
            "zsh/vendor-completions/_uklaunch",
            "fish/vendor_completions.d/uklaunch.fish",
        )
    ]
    commands = next(action for action in parser()._actions if action.dest == "command").choices
    assert commands
    for command in commands:
        assert f"uklaunch {command}" in man
        assert all(command in text for text in completions)
    for section in ("EXIT STATUS", "FILES", "ENVIRONMENT"):
        assert f'.SH "{section}"' in man or f".SH {section}" in man


def test_completion_in_bash(unpacked: Path) -> None:
    script = f"""
source {unpacked}/usr/share/bash-completion/completions/uklaunch
COMP_WORDS=(uklaunch pod gr) COMP_CWORD=2 COMP_LINE='uklaunch pod gr'
$(complete -p uklaunch | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${{COMPREPLY[@]}}"
"""
    said = run("bash", "--norc", "-c", script)
    assert said.stdout.strip() == "graph", said.stderr
