"""Long runs: opening one, following it, and zooming into it

Of runs of 1,000, 10,000 and 100,000 steps with 8 histograms and 26 gradient norms a step: opened for the live board in
new processes, after the imports; one step after the other followed; and 10 random ranges of the longest one looked at.
CPU times are those of the reading process, one thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from app.figures.board import LIVE_METRICS
from collectors.storage import LocalStorage
from collectors.tail import ALL_STEPS, RunTail
from tests.collectors.rollups import add_step, make_long_run, random_rows

LENGTHS = (1_000, 10_000, 100_000)
OPENINGS, STEPS, RANGES = 5, 50, 10
_PAUSE = 0.06  # between two steps, longer than the time stamps of a folder are coarse

_OPEN = """
import sys, time
from pathlib import Path
import pandas  # which pyarrow imports with its first array
from app.figures.board import LIVE_METRICS, board
from collectors.tail import RunTail
wall, cpu = time.perf_counter(), time.process_time()
tail = RunTail(Path(sys.argv[1]), LIVE_METRICS)
tail.poll()
print(time.perf_counter() - wall, time.process_time() - cpu, tail.windows["all"].size, tail.n_steps)
"""


def run() -> Iterator[str]:
    """One table for opening and following, one for zooming."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"| steps | open (median of {OPENINGS}) | CPU | columns | refresh after a step, CPU (median of {STEPS}) |"
        yield "|---|---|---|---|---|"
        refreshes = []
        for length in LENGTHS:
            path = Path(folder) / str(length)
            make_long_run(path, length)
            opened = np.array([_open(path) for _ in range(OPENINGS)])
            wall, cpu, columns, _ = np.median(opened, axis=0)
            refreshes.append(_refresh(path))
            row = [f"{length:,}", f"{wall * 1e3:.0f} ms", f"{cpu * 1e3:.0f} ms", f"{columns:.0f}"]
            yield f"| {' | '.join(row)} | {refreshes[-1] * 1e3:.1f} ms |"
        yield ""
        yield f"Refresh at {LENGTHS[-1]:,} steps ÷ at {LENGTHS[0]:,}: {refreshes[-1] / refreshes[0]:.2f}"
        yield ""
        yield from _zooms(path)


def _open(path: Path) -> list[float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _OPEN, str(path)]
    return [float(v) for v in subprocess.check_output(command, env=environment, text=True).split()]


def _refresh(path: Path) -> float:
    """Median CPU seconds of a poll after one new step."""
    tail, like, spent = RunTail(path, LIVE_METRICS), random_rows(256), []
    tail.poll()
    assert tail.last is not None
    first = tail.last.step + 1
    for step in range(first, first + STEPS):
        add_step(LocalStorage(path), step, like)
        time.sleep(_PAUSE)
        began = time.process_time()
        assert tail.poll() and tail.last.step == step
        spent.append(time.process_time() - began)
    assert tail.windows[ALL_STEPS].last[-1] == step
    return float(np.median(spent))


def _zooms(path: Path) -> Iterator[str]:
    tail, random = RunTail(path, LIVE_METRICS), np.random.default_rng(0)
    tail.poll()
    yield "| first step | last step | steps of a column | columns | time | CPU |"
    yield "|---|---|---|---|---|---|"
    for _ in range(RANGES):
        length = int(10 ** random.uniform(2, np.log10(LENGTHS[-1])))
        first = int(random.integers(0, LENGTHS[-1] - length + 1))
        wall, cpu = time.perf_counter(), time.process_time()
        window = tail.zoom(first, first + length - 1)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        yield (
            f"| {first:,} | {first + length - 1:,} | {window.width} | {window.size:,} | {wall * 1e3:.0f} ms "
            f"| {cpu * 1e3:.0f} ms |"
        )
