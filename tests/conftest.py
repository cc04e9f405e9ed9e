"""What every layer of tests shares: skips that CI does not forgive, and a check that nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import leaks

STRICT = bool(os.environ.get("UKLAUNCH_REQUIRE_ALL"))


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """In CI a missing tool is a missing install step, not a reason to skip; KVM alone cannot be installed."""
    if STRICT and call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception):
        reason = str(call.excinfo.value)
        if "KVM" not in reason:
            call.excinfo = pytest.ExceptionInfo.from_exception(AssertionError(f"skipped in CI: {reason}"))


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left_behind() -> Iterator[None]:
    """After the whole suite: no namespace, link, program, map, process or file of ours that was not there before."""
    before = leaks.ours()
    yield
    left = leaks.ours() - before
    assert not left, "left behind:\n" + "\n".join(sorted(left))


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own."""
    monkeypatch.setenv("UKLAUNCH_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")
