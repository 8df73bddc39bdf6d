"""Train the runs that are missing, label all that are there, and write the manifest."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from collectors import Recorder, open_run
from mhpo_core.training import open_task, train
from tests.benchmarks.collapses.labels import COLLAPSED, Label
from tests.benchmarks.collapses.modes import Case
from tests.benchmarks.collapses.slim import Slim
from tests.benchmarks.collapses.table import label_of, step_table

_DESCRIPTION = (
    "Runs of the training core (digit-sum, CPU): a preset per failure mode and its healthy twin. Per run a store with "
    "tokens (`store`) and a table of its steps (`file`). One row = one optimizer step. label: see labels.py; "
    "fault_step = first step that the cause acts on; twins have another seed than the faulty run."
)


# how a store is kept: whole, or small enough for a repository
WHOLE: dict[str, Any] = {"tokens": "flight"}
SLIM: dict[str, Any] = {"tokens": "sample:2", "columns": "minimal", "precision": "compact"}


def generate(folder: Path, cases: Iterable[Case], *, slim: bool = False) -> Iterator[Case]:
    """Train each case that has no table yet, and give back every case once it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if not _table_path(folder, case).exists():
            _train(folder, case, slim)
        yield case


def _train(folder: Path, case: Case, slim: bool) -> None:
    store = folder / case.id
    shutil.rmtree(store, ignore_errors=True)  # of a process that was killed: without a table it is not complete
    config, began = case.config, time.perf_counter()
    task = open_task(config)
    recorder = Recorder(
        store,
        objective=config.objective.create(),
        config=config.to_dict(),
        updates_per_iteration=config.updates_per_iteration,
        vocabulary={i: task.decode_token(i) for i in range(task.vocab_size)},
        fsync="never",
        when_full="wait",
        by_segment=True,
        **(SLIM if slim else WHOLE),
    )
    with recorder:
        train(config, Slim(recorder) if slim else recorder, "cpu")
    table = step_table(open_run(store))
    table.attrs["seconds"] = round(time.perf_counter() - began, 1)
    partial = folder / f"{case.id}.partial"
    table.to_parquet(partial, index=False)
    partial.replace(_table_path(folder, case))  # last: its name says that the run is complete


def write_manifest(folder: Path, cases: Iterable[Case]) -> list[tuple[Case, Label]]:
    """manifest.json over the cases that are there; returns their labels."""
    found, entries = [], []
    for case in cases:
        if _table_path(folder, case).exists():
            table = pd.read_parquet(_table_path(folder, case))
            label = label_of(table, case.faulty)
            found.append((case, label))
            entries.append(_entry(case, table, label))
    content = {
        "description": _DESCRIPTION,
        "n": len(entries),
        "counts": dict(Counter(e["label"] for e in entries)),
        "runs": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return found


def _entry(case: Case, table: pd.DataFrame, label: Label) -> dict[str, Any]:
    collapsed = label.label == COLLAPSED
    config = case.config
    return {
        "id": case.id,
        "file": f"{case.id}.parquet",
        "store": case.id,
        "label": label.label,
        "reason": label.reason,
        "failure_mode": case.mode.name if case.faulty and collapsed else None,
        "mode": case.mode.name,
        "twin": not case.faulty,
        "onset_step": label.onset_step,
        "onset_row": int(table["step"].searchsorted(label.onset_step)) if collapsed else None,
        "fault_step": case.fault_step,
        "peak_reward": round(label.peak, 4),
        "end_reward": round(label.end, 4),
        "seed": config.seed,
        "objective": config.objective.name,
        "n_rows": len(table),
        "first_step": int(table["step"].iloc[0]),
        "last_step": int(table["step"].iloc[-1]),
        "steps_per_row": 1.0,
        "updates_per_iteration": config.updates_per_iteration,
        "seconds": table.attrs.get("seconds"),
        "metrics": [c for c in table.columns if c != "step"],
        "framework": "mhpo training core",
        "redistributable": True,
    }


def _table_path(folder: Path, case: Case) -> Path:
    return folder / f"{case.id}.parquet"
