"""The architecture and the linters as tests: imports go downwards only, one importer each for the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Each module may import those in the rows below its own, and `timeline`, which imports `fault` alone.
LAYERS = (
    {"cli", "__main__"},
    {"commands"},
    {"foreground", "demo", "doctor", "control", "bundle", "arguments", "observe"},
    {"notify", "config", "environment"},
    {"takeover", "container"},
    {"run"},
    {"runfile"},
    {"guest"},
    {"healing", "probes"},
    {"pod", "image", "guests", "vmm", "console", "watch", "journal"},
    {"uplink"},
    {"cni"},
    {"resolver"},
    {"firewall", "reset"},
    {"net", "publish", "events", "cgroup", "rootless"},
    {"state"},
    {"health", "limits"},
    {"model", "rlimits", "timeline", "restart", "fault", "threads", "capabilities"},
    {"imagefile"},
    {"errors"},
)
ONLY_IMPORTER = {
    "pyroute2": {"launcher/net.py"},
    "nftables": {"launcher/firewall.py"},
    "bcc": {"router/compile.py"},
    "systemd": {"launcher/journal.py"},
    "argparse": {
        "launcher/arguments.py",
        "launcher/foreground.py",
        *(f"launcher/commands/{name}.py" for name in ("guests", "host", "observe", "pods", "run")),
    },
}


def sources(package: str) -> Iterator[Path]:
    yield from (ROOT / package).rglob("*.py")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports; relative ones resolved; those under TYPE_CHECKING left out."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                child.names = []  # type: ignore[attr-defined]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module in names)


def test_imports_go_downwards() -> None:
    for path in sources("launcher"):
        parts = path.relative_to(ROOT / "launcher").with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in imports(path):
            if not name.startswith("launcher.") or name == "launcher.timeline.mark":
                continue
            other = name.split(".")[1]
            if other == parts[0] or other == "guest_config" or (parts[0] == "bundle" and other == "guests"):
                continue
            assert layer(other) >= layer(parts[0]), f"{path.relative_to(ROOT)} imports {name}"


def test_the_router_knows_nothing_of_the_launcher() -> None:
    for path in sources("router"):
        assert not any(name.startswith("launcher") for name in imports(path)), path


def test_families_and_vmms_do_not_know_each_other() -> None:
    for path in (ROOT / "launcher" / "guests").glob("*.py"):
        assert not any(name.startswith("launcher.vmm") for name in imports(path)), path
    for path in (ROOT / "launcher" / "vmm").glob("*.py"):
        assert not any(name.startswith("launcher.guests") for name in imports(path)), path


@pytest.mark.parametrize("library", ONLY_IMPORTER)
def test_one_importer_each(library: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in ("launcher", "router")
        for path in sources(package)
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert found <= ONLY_IMPORTER[library]


@pytest.mark.parametrize("command", [["ps"], ["pod", "ls"], ["logs", "nobody"], ["stop", "nobody"], ["events"]])
def test_what_must_be_quick_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from launcher.cli import main; main(sys.argv[1:]);"
        "print([m for m in ('trio', 'pyroute2', 'qemu', 'asyncio', 'bcc', 'ctypes', 'subprocess') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n"), result.stdout


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=lambda command: " ".join(command),
)
def test_linters(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
