"""RunTail: follows a run step by step; a refresh costs the same after a million steps as after ten."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from collectors import layout
from collectors.layout import StepFile
from collectors.state import RunState, StateReader
from collectors.views import read_parquet
from collectors.window import StepSummary, Window
from mhpo_core.histograms import N_BINS
from mhpo_core.metrics import SIDES

ALL_STEPS = "all"
RECENT = {"1000": 1000, "250": 250}
_MAX_BINS = 1200  # more columns than that cannot be told apart on a screen
_READ_AT_ONCE = 256
_ALWAYS_READ = ("n_tokens", "recorder_ms", "dropped_tokens")

# A directory's time stamp has the resolution of a clock tick: a change within this many nanoseconds of the last
# listing may carry the same stamp.
_STAMP_RESOLUTION = 50_000_000


class RunTail:
    """Everything the live page shows of one run, updated by `poll`. Safe to share between threads.

    Args:
        run: the run folder.
        metrics: columns of `steps` to follow.
    """

    def __init__(self, run: Path, metrics: list[str]) -> None:
        self.run = run.absolute()
        self.manifest: dict[str, Any] = layout.read_manifest(self.run)
        self.version = 0
        self.state = RunState("running", "", "")
        self._metrics = metrics
        self._lock = threading.RLock()
        self._connection = duckdb.connect(":memory:")
        self._states = StateReader(self.run, self._connection)
        self._stamp: tuple[int, ...] = ()
        self._trusted = False
        self._reset()

    def _reset(self) -> None:
        width = max(1, int(self.manifest.get("updates_per_iteration") or 1))
        self.windows = {ALL_STEPS: Window(_MAX_BINS, self._metrics, width=width)}
        for name, steps in RECENT.items():
            kept = min(_MAX_BINS, max(8, steps // width))
            self.windows[name] = Window(kept, self._metrics, width=width, forget=True)
        self._consumed: dict[int, int] = {}
        self.n_steps, self.n_tokens, self.dropped_tokens = 0, 0, 0
        self.last: StepSummary | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=64)

    def poll(self) -> bool:
        """Read what was committed since the last call; True if anything changed, the run's state included."""
        with self._lock:
            changed = self._poll_steps()
            state = self._states.read()
            changed |= state != self.state
            self.state = state
            self.version += changed
            return changed

    def _poll_steps(self) -> bool:
        stamp = self._directory_stamp()
        if stamp == self._stamp and self._trusted:
            return False
        trusted = time.time_ns() - max(stamp, default=0) > _STAMP_RESOLUTION
        files = layout.list_table(self.run, layout.ROLLUP)
        attempts = {f.attempt for f in files}
        if self._consumed and max(attempts, default=0) > max(self._consumed):
            self._reset()
        new = [f for f in files if f.last > self._consumed.get(f.attempt, -1)]
        for start in range(0, len(new), _READ_AT_ONCE):
            self._read(new[start : start + _READ_AT_ONCE], _first_steps(files))
        self._stamp, self._trusted = stamp, trusted
        return bool(new)

    def _directory_stamp(self) -> tuple[int, ...]:
        folder = self.run / layout.ROLLUP
        try:
            return tuple(os.stat(folder / level).st_mtime_ns for level in (layout.HOT, layout.SEALED))
        except FileNotFoundError:
            return ()

    def _read(self, files: list[StepFile], first_of_attempt: dict[int, int]) -> None:
        for group in _by_size(files):
            for summary, attempt in self._summaries([f.path for f in group]):
                if summary.step <= self._consumed.get(attempt, -1):
                    continue
                self._consumed[attempt] = summary.step
                # a later attempt began at or before this step: the run was rewound and this branch given up
                if any(a > attempt and first <= summary.step for a, first in first_of_attempt.items()):
                    continue
                self._add(summary)

    def _add(self, summary: StepSummary) -> None:
        for window in self.windows.values():
            window.add(summary)
        self.n_steps += 1
        self.n_tokens += int(summary.metrics.get("n_tokens") or 0)
        self.dropped_tokens += int(summary.metrics.get("dropped_tokens") or 0)
        self._recent.append((summary.wall_time, float(summary.metrics.get("recorder_ms") or 0.0)))
        self.last = summary

    def _summaries(self, paths: list[str]) -> list[tuple[StepSummary, int]]:
        columns = ", ".join(dict.fromkeys([*self._metrics, *_ALWAYS_READ]))
        source = read_parquet(paths)
        rows = self._fetch(f"SELECT step, attempt, wall_time, {columns} FROM {source}")
        log_ratio = self._fetch(
            "SELECT step, attempt, h.side, h.bin, h.count FROM "
            f"(SELECT step, attempt, unnest(histograms) AS h FROM {source}) WHERE h.quantity = 'log_ratio'"
        )
        gradients = self._fetch(
            "SELECT step, attempt, g.parameter, g.grad_norm FROM "
            f"(SELECT step, attempt, unnest(gradients) AS g FROM {source}) WHERE g.grad_norm IS NOT NULL"
        )
        keys = sorted(set(zip(rows["attempt"].tolist(), rows["step"].tolist(), strict=True)))
        place = {key: i for i, key in enumerate(keys)}
        counts = np.zeros((len(keys), len(SIDES), N_BINS), np.int64)
        sides = {name: i for i, name in enumerate(SIDES)}
        index = [place[k] for k in zip(log_ratio["attempt"].tolist(), log_ratio["step"].tolist(), strict=True)]
        side = [sides[s] for s in log_ratio["side"].tolist()]
        counts[index, side, log_ratio["bin"].astype(np.intp)] = log_ratio["count"]
        norms: list[dict[str, float]] = [{} for _ in keys]
        for step, attempt, name, value in zip(*(gradients[c].tolist() for c in gradients), strict=True):
            norms[place[attempt, step]][name] = value
        found: list[tuple[StepSummary, int]] = [None] * len(keys)  # type: ignore[list-item]
        for row in range(len(rows["step"])):
            key = (int(rows["attempt"][row]), int(rows["step"][row]))
            metrics = {name: _value(rows[name], row) for name in rows if name not in ("step", "attempt", "wall_time")}
            i = place[key]
            summary = StepSummary(key[1], float(rows["wall_time"][row]), metrics, norms[i], counts[i])
            found[i] = (summary, key[0])
        return found

    def _fetch(self, query: str) -> dict[str, Any]:
        # a hot file can be sealed and unlinked between listing and reading, after a grace of a minute
        return self._connection.execute(query).fetchnumpy()

    def recorder_share(self) -> float | None:
        """Recorder time of the training thread ÷ wall time, over the last steps; None before the second."""
        with self._lock:
            if len(self._recent) < 2:
                return None
            elapsed = self._recent[-1][0] - self._recent[0][0]
            spent = sum(ms for _, ms in list(self._recent)[1:]) / 1e3
            return spent / elapsed if elapsed > 0 else None

    def usual_pause(self) -> float | None:
        """Median time between the last steps, seconds; None before the second."""
        with self._lock:
            times = [t for t, _ in self._recent]
        return float(np.median(np.diff(times))) if len(times) > 1 else None

    def locked(self) -> threading.RLock:
        """The lock under which windows may be read while another thread polls."""
        return self._lock

    def close(self) -> None:
        """Close the DuckDB connection."""
        self._connection.close()


def _first_steps(files: list[StepFile]) -> dict[int, int]:
    first: dict[int, int] = {}
    for file in files:
        first[file.attempt] = min(file.first, first.get(file.attempt, file.first))
    return first


def _by_size(files: list[StepFile]) -> list[list[StepFile]]:
    """Hot files of one attempt together, sealed ones alone, so that a read never holds many thousand steps."""
    ordered = sorted(files, key=lambda f: (f.attempt, f.first))
    groups: list[list[StepFile]] = []
    for file in ordered:
        if groups and file.first == file.last and groups[-1][-1].first == groups[-1][-1].last:
            groups[-1].append(file)
        else:
            groups.append([file])
    return groups


def _value(column: Any, row: int) -> float | None:
    if np.ma.is_masked(column) and np.ma.getmaskarray(column)[row]:
        return None
    return float(column[row])
