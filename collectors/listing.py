"""The runs of a folder, with their state and newest numbers."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from collectors import layout
from collectors.alarm_files import newest_critical
from collectors.encoding import read_rows
from collectors.layout import EventFile, StepFile
from collectors.state import RunState, run_state
from collectors.storage import Storage, open_storage
from mhpo_core.errors import StoreError


@dataclass(frozen=True)
class RunSummary:
    """One run of a folder.

    Args:
        run_id: folder name, untrusted text.
        path: the run folder.
        state: what it is doing.
        health: "non-finite" if its newest step has non-finite tokens or loss, "critical at …" with the step of its
            newest critical alarm, "ok" otherwise, "no data" before the first step.
        objective: name of the objective that trains.
        last_step: newest step, None before the first.
        last_time: when it was recorded, seconds since 1970.
        reward: mean reward of the newest step, None if not recorded.
        size: bytes on disk.
        problem: why it cannot be read, empty if it can.
    """

    run_id: str
    path: Path
    state: RunState
    health: str = "no data"
    objective: str = ""
    last_step: int | None = None
    last_time: float | None = None
    reward: float | None = None
    size: int = 0
    problem: str = ""


def run_folders(folder: Path) -> list[Path]:
    """Run folders directly below, newest first.

    Raises:
        StoreError: the folder does not exist or cannot be read.
    """
    try:
        found = [(_written(p), p) for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError as error:
        raise StoreError(
            f"runs: {folder} cannot be listed ({error.strerror}). Give the folder that holds the run folders."
        ) from error
    return [p for written, p in sorted(found, reverse=True) if written > 0]


def _written(run: Path) -> float:
    """When run.json was written, 0 if the folder is no run or has just gone."""
    try:
        return (run / layout.MANIFEST).stat().st_mtime
    except OSError:
        return 0


def list_runs(folder: Path) -> list[RunSummary]:
    """Every run of the folder, newest first; a damaged one is listed with its problem."""
    return [_summary(path) for path in run_folders(folder)]


def _summary(path: Path) -> RunSummary:
    state = RunState("unreadable", "", "")
    try:
        storage = open_storage(path)
        manifest = layout.read_manifest(storage)
        state = run_state(storage)
        damaged: list[StepFile] = []
        files = layout.list_table(storage, layout.ROLLUP, damaged)
        objective = str((manifest.get("objective") or {}).get("name", ""))
        size = run_size(path)
        events: list[EventFile] = []
        layout.list_events(storage, events)
        odd_files = len(damaged) + len(events)
        problem = f"{odd_files} damaged files, see `mhpo verify`" if odd_files else ""
        row = _newest_row(storage, files)
        if row is None:
            return RunSummary(path.name, path, state, objective=objective, size=size, problem=problem)
        loss = row["loss"]
        odd = (row["nonfinite_count"] or 0) > 0 or (loss is not None and not math.isfinite(loss))
        health = "non-finite" if odd else _health(storage)
        return RunSummary(
            path.name, path, state, health, objective, row["step"], row["wall_time"], row["reward_mean"], size, problem
        )
    except (StoreError, pa.ArrowException, OSError) as error:
        return RunSummary(path.name, path, state, problem=str(error).splitlines()[0])


def _health(storage: Storage) -> str:
    alarm = newest_critical(storage)
    return "ok" if alarm is None else f"critical at {alarm['step']}"


def _newest_row(storage: Storage, files: list[StepFile]) -> dict[str, Any] | None:
    if not files:
        return None
    newest = max(files, key=lambda f: (f.attempt, f.last, -f.rank))
    columns = ["step", "wall_time", "reward_mean", "nonfinite_count", "loss"]
    rows: list[dict[str, Any]] = read_rows(storage.read(newest.name), columns).to_pylist()
    return max(rows, key=lambda row: row["step"])


def run_size(path: Path) -> int:
    """Bytes of all files of a run folder."""
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
