"""A million frames from a hostile guest: `python -m tests.fuzz` for more of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import router

from .. import fuzz

pytestmark = pytest.mark.bpf

FRAMES = 1_000_000


def test_a_million_frames(variant: tuple[router.Router, str], thread: ThreadPoolExecutor) -> None:
    table, _ = variant
    verdicts = thread.submit(fuzz.fuzz, table, FRAMES, 1).result()
    assert verdicts.total() == FRAMES
    for verdict in ("passed", "redirected", "dropped", "asked"):
        assert verdicts[verdict] > FRAMES / 500, verdicts
