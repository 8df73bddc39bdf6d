"""The runs of a folder, with their state and newest numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import duckdb

from collectors import layout
from collectors.state import RunState, run_state
from collectors.views import read_parquet
from mhpo_core.errors import StoreError


@dataclass(frozen=True)
class RunSummary:
    """One run of a folder.

    Args:
        run_id: folder name, untrusted text.
        path: the run folder.
        state: what it is doing.
        health: "non-finite" if its newest step has non-finite tokens or loss, "ok" otherwise, "no data" before the
            first step.
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
    connection = duckdb.connect(":memory:")
    try:
        return [_summary(path, connection) for path in run_folders(folder)]
    finally:
        connection.close()


def _summary(path: Path, connection: duckdb.DuckDBPyConnection) -> RunSummary:
    state = RunState("unreadable", "", "")
    try:
        manifest = layout.read_manifest(path)
        state = run_state(path, connection)
        files = layout.list_table(path, layout.ROLLUP)
        objective = str((manifest.get("objective") or {}).get("name", ""))
        size = _size(path)
        if not files:
            return RunSummary(path.name, path, state, objective=objective, size=size)
        newest = max(files, key=lambda f: (f.attempt, f.last))
        row = connection.execute(
            "SELECT step, wall_time, reward_mean, nonfinite_count > 0 OR NOT isfinite(coalesce(loss, 0)) "
            f"FROM {read_parquet([newest.path])} ORDER BY step DESC LIMIT 1"
        ).fetchone()
        assert row is not None
        health = "non-finite" if row[3] else "ok"
        return RunSummary(path.name, path, state, health, objective, row[0], row[1], row[2], size)
    except (StoreError, duckdb.Error, OSError) as error:
        return RunSummary(path.name, path, state, problem=str(error).splitlines()[0])


def _size(path: Path) -> int:
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
