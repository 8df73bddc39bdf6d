"""For the tests of the live reader: followers, and windows computed from all rows at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from collectors import rollup_files, zoom
from collectors import tail as tail_module
from collectors.bin_tables import bins_of_steps
from collectors.storage import LocalStorage
from collectors.tail import ALL_STEPS, RunTail
from collectors.window import Window
from tests.collectors.rollups import (
    NAMES,
    Written,
    assert_same_bins,
)


def followed(storage: LocalStorage) -> RunTail:
    tail = RunTail(storage, NAMES)
    tail.poll()
    return tail


def settle(run: Path) -> None:
    """Let the folders' time stamps be old, as they are between two steps of a real run."""
    for folder in (run / "rollup").iterdir():
        os.utime(folder, (1, 1))


def check_windows(tail: RunTail, written: Written, *, width: int = 1) -> None:
    """Every window against all rows of the branch added at once."""
    steps = bins_of_steps(written.branch(), tail._reader.metrics)
    for name, found in tail.windows.items():
        wanted = Window(found.capacity, tail._reader.metrics, width=width, forget=name != ALL_STEPS)
        wanted.add(steps)
        assert_same_bins(found.bins, wanted.bins)
    assert tail.n_steps == steps.size
    assert tail.n_tokens == steps.metrics.total[:, tail._reader.metrics.index("n_tokens")].sum()
    assert tail.last is not None and tail.last.step == steps.last[-1]


def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a coarser level of 32, 256 and 2048 steps, a board of 30 columns."""
    for module in (rollup_files, zoom):
        monkeypatch.setattr(module, "BINS_PER_FILE", 4)
    monkeypatch.setattr(tail_module, "_MAX_BINS", 30)
