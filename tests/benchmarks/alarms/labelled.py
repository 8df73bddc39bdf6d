"""Labelled runs: a folder with manifest.json and, per run, a Parquet table of its steps, a run folder of ours, or both.

An entry of `runs` has `id`, `label` (collapsed, healthy, or anything else, which no figure counts), the table as `file`
and the run folder as `store`; `file` and `id` may name a run folder as well. A collapsed one has `onset_step`, and
`onset_row` where a row is not a step; one of our own may have `fault_step`, the first step that the cause acts on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from collectors import open_run
from collectors.alarms import summaries_of
from mhpo_core.alarms.readings import readings_of
from mhpo_core.errors import ConfigError

COLLAPSED, HEALTHY = "collapsed", "healthy"

READING_OF = {
    "reward": "reward",
    "true_reward": "true_reward",
    "kl": "kl_reference",
    "ppo_kl": "kl_policy",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "clip_region": "clip_fraction",
    "len_mean": "length",
    "trunc": "truncated",
    "zero_std": "dead_groups",
    "loss": "loss",
    "lr": "lr",
    "is_mean": "importance_mean",
    "lpdiff_mean": "mismatch_mean",
    "lpdiff_max": "mismatch_largest",
}
"""Column of a table → reading of a run folder that is the same quantity."""

COLUMNS = frozenset({*READING_OF, "reward_std", "clip_low", "clip_high", "is_min", "is_max"})
"""Columns of a table that are given to the engines; `raw/…` repeats them under the source's names."""


@dataclass(frozen=True)
class LabelledRun:
    """One run with what became of it.

    Args:
        id: in the manifest.
        label: "collapsed", "healthy" or anything else.
        steps: of the rows, rising.
        rows: what is known of each step, by name of a column of COLUMNS; NaN and ±Inf are values.
        onset_row: first row of the failure; None unless collapsed.
        onset_step: its step.
        fault_step: first step on which a cause acts that was put there on purpose.
        store: run folder with token data.
        table: whether the rows come from a table of their own, so that `store` is a second source.
        repository: that it was found in.
    """

    id: str
    label: str
    steps: NDArray[np.float64]
    rows: Sequence[Mapping[str, float]]
    onset_row: int | None = None
    onset_step: float | None = None
    fault_step: float | None = None
    store: Path | None = None
    table: bool = True
    repository: str | None = None

    def row_of(self, step: float) -> int:
        """The row of a step, or the first after it."""
        return int(np.searchsorted(self.steps, step, side="left").clip(0, len(self.steps) - 1))


def load(folder: Path) -> Iterator[LabelledRun]:
    """The collapsed and healthy runs of a folder, in the order of its manifest.

    Raises:
        ConfigError: there is no manifest, or an entry names neither a table nor a run folder, or lacks its onset.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ConfigError(
            f"bench-alarms: {folder} has no manifest.json, allowed is a folder of labelled runs. Give one with RUNS=."
        )
    for entry in json.loads(manifest.read_text())["runs"]:
        if entry["label"] in (COLLAPSED, HEALTHY):
            yield _run(folder, entry)


def _run(folder: Path, entry: Mapping[str, Any]) -> LabelledRun:
    paths = [folder / entry[key] for key in ("store", "file", "id") if entry.get(key)]
    store = next((p for p in paths if p.is_dir()), None)
    table = next((p for p in paths if p.is_file()), None)
    if table is None and store is None:
        raise ConfigError(
            f"bench-alarms: the entry {entry['id']!r} of {folder / 'manifest.json'} names no file that exists, allowed "
            "are a Parquet table or a run folder. Put it there."
        )
    steps, rows = _of_table(table) if table else _of_store(store)
    repository = entry.get("source", {}).get("repo")
    run = LabelledRun(entry["id"], entry["label"], steps, rows, None, None, None, store, table is not None, repository)
    if run.label == HEALTHY:
        return run
    if entry.get("onset_step") is None:
        raise ConfigError(
            f"bench-alarms: the collapsed run {entry['id']!r} has no onset_step, allowed is the first step of its "
            "failure. Add it to the manifest."
        )
    onset, row = float(entry["onset_step"]), entry.get("onset_row")
    row = run.row_of(onset) if row is None else int(row)
    return replace(run, onset_row=row, onset_step=onset, fault_step=entry.get("fault_step"))


def _of_table(path: Path) -> tuple[NDArray[np.float64], list[dict[str, float]]]:
    table = pq.read_table(path)
    names = [name for name in table.column_names if name in COLUMNS]
    rows = [{n: float(v) for n, v in row.items() if v is not None} for row in table.select(names).to_pylist()]
    return table["step"].to_numpy().astype(float), rows


def _of_store(path: Path | None) -> tuple[NDArray[np.float64], list[dict[str, float]]]:
    steps, rows = [], []
    for summary in summaries_of(open_run(str(path))):
        readings = readings_of(summary.scalars)
        steps.append(float(summary.step))
        rows.append({column: readings[name] for column, name in READING_OF.items() if name in readings})
    return np.array(steps), rows
