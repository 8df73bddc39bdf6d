"""Recorder: its share of a training step, and bytes per token on disk

Two measures of the same cost. In the training thread: the time spent in Recorder.record. Whole: the wall time of
training with the recorder over training without one, in turns, so that what the writer thread uses counts too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collectors import Recorder, open_run
from mhpo_core.training import load_preset, train

ROUNDS, ITERATIONS = 5, 12
_SETTINGS = [f"iterations={ITERATIONS}", "warm_start.steps=0"]


class _Nothing:
    """A sink that keeps nothing."""

    def record(self, *_: Any, **__: Any) -> None:
        pass

    def event(self, *_: Any) -> None:
        pass


def run() -> Iterator[str]:
    """One table for the time, one for the bytes."""
    config = load_preset("demo", _SETTINGS)
    ratios, shares, steps = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _seconds(config, _Nothing())  # the first run of a process is slower
            for number in range(ROUNDS):
                path = Path(folder) / f"{threads}-{number}"
                without = _seconds(config, _Nothing())
                with Recorder(path, objective=config.objective.create()) as recorder:
                    recorded = _seconds(config, recorder)
                ratios.append((threads, recorded / without))
                with open_run(path) as stored:
                    spent, count = stored.sql("SELECT sum(recorder_ms) / 1e3, count(*) FROM steps").fetchall()[0]
                shares.append((threads, spent / recorded))
                steps.append((threads, recorded / count))
        yield "| torch threads | training step | in the training thread | whole: with ÷ without (median of 5 pairs) |"
        yield "|---|---|---|---|"
        for threads in (1, 2):
            step, share, ratio = (np.median([v for t, v in rows if t == threads]) for rows in (steps, shares, ratios))
            yield f"| {threads} | {step * 1e3:.0f} ms | {share:.2%} | {ratio:.3f} |"
        yield ""
        yield from _bytes(Path(folder) / "1-0")


def _seconds(config: Any, sink: Any) -> float:
    started = time.perf_counter()
    train(config, sink, "cpu")
    return time.perf_counter() - started


def _bytes(path: Path) -> Iterator[str]:
    with open_run(path) as stored:
        tokens = stored.sql("SELECT sum(n_tokens) FROM steps").fetchall()[0][0]
        steps = stored.sql("SELECT count(*) FROM steps").fetchall()[0][0]
    yield f"| table, {steps} steps of {tokens / steps:,.0f} tokens | bytes per token, sealed | while hot |"
    yield "|---|---|---|"
    for table in ("tokens", "sequences", "rollup"):
        sealed, hot = (sum(f.stat().st_size for f in (path / table / level).iterdir()) for level in ("sealed", "hot"))
        yield f"| {table} | {sealed / tokens:.1f} | {hot / tokens:.1f} |"
