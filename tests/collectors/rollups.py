"""Rollup files without a recorder: steps of chosen values, and runs of a hundred thousand steps in seconds."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collectors import layout
from collectors.bin_tables import bins_of_steps
from collectors.bins import Bins, Stats, coarsen, drop_to
from collectors.schema import ROLLUP_SCHEMA
from collectors.storage import LocalStorage
from collectors.zoom import ZoomWriter
from mhpo_core.histograms import EDGES
from mhpo_core.metrics import METRICS

OBJECTIVE = {"name": "mhpo", "hyperparameters": {}}
SEALED_STEPS = 256
NAMES = ["loss", "grad_norm", "n_tokens"]
"""What `whole_rows` has values for."""

LEVELS = list(layout.ZOOM.values())
QUANTITIES = ("log_ratio", "mismatch", "entropy", "logit_grad_norm")


def make_run(path: Path, **manifest: Any) -> LocalStorage:
    """A run without a step."""
    path.mkdir(parents=True)
    content = {"schema_version": layout.SCHEMA_VERSION, "objective": OBJECTIVE, **manifest}
    (path / layout.MANIFEST).write_text(json.dumps(content))
    return LocalStorage(path)


def rollup_rows(
    steps: Sequence[int],
    metrics: Mapping[str, Sequence[Any]] | None = None,
    *,
    gradients: Sequence[Mapping[str, float]] | None = None,
    cells: Sequence[Sequence[tuple[str, int, int]]] | None = None,
    **key: int,
) -> pa.Table:
    """Rows of `rollup`.

    Args:
        metrics: name → value per step; None = not computed.
        gradients: per step, group → norm.
        cells: per step, (side, bin, tokens) of the log-ratio.
        key: attempt, rank, world_size.
    """
    n = len(steps)
    columns: dict[str, Any] = {
        "step": list(steps), "wall_time": [1e9 + step % 10**9 for step in steps], **(metrics or {}),
        "attempt": [key.get("attempt", 0)] * n, "rank": [key.get("rank", 0)] * n,
        "world_size": [key.get("world_size", 1)] * n,
    }  # fmt: skip
    if gradients is not None:
        columns["gradients"] = [[{"parameter": p, "grad_norm": v} for p, v in row.items()] for row in gradients]
    if cells is not None:
        columns["histograms"] = [
            [{"quantity": "log_ratio", "side": s, "bin": b, "count": c} for s, b, c in row]
            + [{"quantity": "mismatch", "side": "positive", "bin": 0, "count": 7}]
            for row in cells
        ]
    arrays = [
        pa.array(columns[f.name], f.type, from_pandas=False) if f.name in columns else pa.nulls(n, f.type)
        for f in ROLLUP_SCHEMA
    ]
    return pa.table(dict(zip(ROLLUP_SCHEMA.names, arrays, strict=True)), schema=ROLLUP_SCHEMA)


def write_level(storage: LocalStorage, level: str, table: pa.Table, first: int, last: int, **key: int) -> str:
    """Commit a file of `rollup`; returns its name."""
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {} if level == layout.HOT else {"compression": "zstd", "compression_level": 1}
    pq.write_table(
        table, sink, use_dictionary=["step", "attempt", "rank"], store_schema=False, row_group_size=131_072,
        max_rows_per_page=262_144, write_page_checksum=True, write_statistics=["step"],
        **{"compression": "lz4", **options},
    )  # fmt: skip
    data = sink.getvalue()
    name = layout.file_name(first, last, key.get("attempt", 0), key.get("rank", 0), data)
    storage.write(f"{layout.ROLLUP}/{level}/{name}", data, fsync=False)
    return f"{layout.ROLLUP}/{level}/{name}"


def write_rows(storage: LocalStorage, table: pa.Table) -> str:
    """Commit rows of one attempt of one rank as one file: sealed, or hot if it is a single one."""
    steps, keys = table["step"].to_pylist(), {k: table[k][0].as_py() for k in ("attempt", "rank")}
    return write_level(storage, layout.SEALED if len(steps) > 1 else layout.HOT, table, steps[0], steps[-1], **keys)


def zoom_writer(storage: LocalStorage, attempt: int = 0, *, resume: bool = False) -> ZoomWriter:
    """A writer of the coarser levels that commits into the run."""

    def write(level: str, first: int, last: int, attempt: int, rank: int, table: pa.Table) -> None:
        write_level(storage, level, table, first, last, attempt=attempt, rank=rank)

    if resume:
        return ZoomWriter.resume(storage, attempt, 0, write)
    return ZoomWriter(attempt, 0, write)


def random_rows(n_steps: int, seed: int = 0, *, filled: int = 110, groups: int = 26) -> pa.Table:
    """Steps 0 … n_steps − 1 of a run with every metric, eight histograms and gradient norms per group.

    Args:
        filled: bins of a histogram that hold tokens.
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "step": np.arange(n_steps), "attempt": np.zeros(n_steps, np.int32), "rank": np.zeros(n_steps, np.int32),
        "world_size": np.ones(n_steps, np.int32), "wall_time": 1.7e9 + 2.0 * np.arange(n_steps),
    }  # fmt: skip
    for metric in METRICS.values():
        columns[metric.name] = rng.integers(0, 10_000, n_steps) if metric.integer else rng.normal(size=n_steps)
    columns |= {"kept_tokens": columns["n_tokens"], "ring_tokens": np.zeros(n_steps, np.int64)}
    columns["histograms"] = _histograms(rng, n_steps, filled)
    norms = {
        "parameter": pa.array([f"model.layers.{i}" for i in range(groups)] * n_steps),
        "grad_norm": pa.array(rng.random(n_steps * groups)), "weight_norm": pa.array(rng.random(n_steps * groups)),
        "nonfinite": pa.array(np.zeros(n_steps * groups, np.int64)),
    }  # fmt: skip
    columns["gradients"] = _nested("gradients", norms, n_steps)
    arrays = [
        pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n_steps, f.type) for f in ROLLUP_SCHEMA
    ]
    return pa.table(dict(zip(ROLLUP_SCHEMA.names, arrays, strict=True)), schema=ROLLUP_SCHEMA)


def _histograms(rng: np.random.Generator, n_steps: int, filled: int) -> pa.Array:
    names = [(q, s) for q in QUANTITIES for s in ("positive", "negative")]
    chosen = np.sort(rng.random((n_steps, len(names), 2 * filled)).argsort(axis=2)[:, :, :filled], axis=2).ravel() + 40
    labels = np.repeat(np.array(names, object), filled, axis=0)
    values = {
        "quantity": pa.array(np.tile(labels[:, 0], n_steps)), "side": pa.array(np.tile(labels[:, 1], n_steps)),
        "bin": pa.array(chosen, pa.int32()), "count": pa.array(rng.geometric(0.02, len(chosen))),
        "bin_low": pa.array(EDGES[chosen]), "bin_high": pa.array(EDGES[chosen + 1]),
        "weight": pa.array(rng.random(len(chosen))), "advantage_weight": pa.array(rng.random(len(chosen))),
    }  # fmt: skip
    return _nested("histograms", values, n_steps)


def _nested(name: str, values: dict[str, pa.Array], n_steps: int) -> pa.Array:
    kind = ROLLUP_SCHEMA.field(name).type.value_type
    structs = pa.StructArray.from_arrays([values[f.name] for f in kind], fields=list(kind))
    ends = np.arange(n_steps + 1) * (len(structs) // n_steps)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), structs, type=ROLLUP_SCHEMA.field(name).type)


def shifted(table: pa.Table, first: int) -> pa.Table:
    """The same rows as steps first, first + 1, …"""
    moved = pa.array(np.arange(first, first + len(table)))
    times = pa.array(1.7e9 + 2.0 * np.arange(first, first + len(table)))
    table = table.set_column(0, ROLLUP_SCHEMA.field("step"), moved)
    return table.set_column(table.schema.get_field_index("wall_time"), ROLLUP_SCHEMA.field("wall_time"), times)


def make_long_run(path: Path, n_steps: int) -> LocalStorage:
    """A run of one attempt as a recorder leaves it: sealed files, the rest hot, and the coarser levels."""
    storage, writer = make_run(path), None
    writer = zoom_writer(storage)
    variants = [random_rows(SEALED_STEPS, seed) for seed in range(4)]
    for number, first in enumerate(range(0, n_steps - SEALED_STEPS + 1, SEALED_STEPS)):
        table = shifted(variants[number % len(variants)], first)
        write_rows(storage, table)
        writer.add(table)
    for step in range(n_steps // SEALED_STEPS * SEALED_STEPS, n_steps):
        add_step(storage, step, variants[0])
    return storage


def add_step(storage: LocalStorage, step: int, like: pa.Table) -> str:
    """Commit one more step; its values are those of some row of a table."""
    return write_rows(storage, shifted(like.slice(step % len(like), 1), step))


class Counting(LocalStorage):
    """Notes which files of `rollup` are read, and which of its folders are listed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.names: list[str] = []
        self.folders: list[str] = []

    def read(self, name: str) -> bytes:
        if name.startswith(layout.ROLLUP):
            self.names.append(name)
        return super().read(name)

    def list(self, folder: str) -> dict[str, int]:
        if folder.startswith(layout.ROLLUP):
            self.folders.append(folder.split("/")[1])
        return super().list(folder)

    def levels(self) -> builtins.list[str]:
        """Levels of the files that were read."""
        return [name.split("/")[1] for name in self.names]


def whole_rows(steps: list[int], *, attempt: int = 0, seed: int = 0, **key: int) -> pa.Table:
    """Rows whose values are whole numbers, so that sums are exact in any order."""
    rng = np.random.default_rng([seed, attempt])
    odd = [None, float("nan"), float("inf"), -float("inf"), 1e9]
    table = rollup_rows(
        steps,
        {
            "loss": [odd[i] if i < len(odd) else float(i) for i in rng.integers(0, 50, len(steps))],
            "grad_norm": rng.integers(0, 9, len(steps)).astype(float),
            "n_tokens": rng.integers(0, 99, len(steps)),
        },
        gradients=[{g: float(rng.integers(0, 9)) for g in "abc"[: rng.integers(1, 4)]} for _ in steps],
        cells=[[("positive", int(rng.integers(0, 291)), 3)] for _ in steps],
        attempt=attempt,
        **key,
    )
    # a column that is not there was not computed, and a narrow file is made quickly
    return table if key else table.select([n for n in table.column_names if table[n].null_count < max(1, len(steps))])


@dataclass
class Written:
    """What was recorded: a table per attempt."""

    storage: LocalStorage
    attempts: list[pa.Table]

    def branch(self) -> pa.Table:
        """Rows of the latest branch."""
        kept, end = [], 2**62
        for table in reversed(self.attempts):
            step = table["step"].to_numpy()
            kept.append(table.filter(pa.array(step < end)))
            end = min(end, step[0])
        return pa.concat_tables(reversed(kept))

    def direct(self, first: int, last: int, max_points: int, base: int = 1) -> Bins:
        """What a zoom shows, from all rows at once."""
        table = self.branch()
        step = table["step"].to_numpy()
        steps = bins_of_steps(table.filter(pa.array((step >= first) & (step <= last))), NAMES)
        return drop_to(coarsen(steps, base), max_points)


def store_attempt(storage: LocalStorage, table: pa.Table, sizes: Iterator[int], restarts: Iterator[bool]) -> None:
    """Commit an attempt in files of these sizes; a writer that is restarted leaves the newest ones hot."""
    writer = zoom_writer(storage, table["attempt"][0].as_py())
    while table.num_rows:
        size = next(sizes)
        piece, table = table.slice(0, size), table.slice(size)
        if next(restarts):
            for row in range(piece.num_rows):
                write_rows(storage, piece.slice(row, 1))
            writer = zoom_writer(storage, piece["attempt"][0].as_py(), resume=True)
        else:
            write_rows(storage, piece)
            writer.add(piece)


def long_run(path: Path, n_steps: int) -> Written:
    """A run of one attempt in sealed files of 16 steps."""
    written = Written(make_run(path), [whole_rows(list(range(n_steps)))])
    store_attempt(written.storage, written.attempts[0], repeat(16), repeat(False))
    return written


def _with_values(stats: Stats) -> set[str]:
    return {n for n, count in zip(stats.names, (stats.finite + stats.nonfinite).sum(axis=0), strict=True) if count}


def assert_same_bins(found: Bins, wanted: Bins) -> None:
    """Equal to the last bit but for sums, which may be rounded otherwise; names in any order."""
    assert (found.width, found.size) == (wanted.width, wanted.size)
    for name in ("first", "last", "n_steps", "wall_time", "log_ratio"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    for kind in ("metrics", "gradients"):
        ours, theirs = getattr(found, kind), getattr(wanted, kind)
        assert _with_values(ours) == _with_values(theirs)
        ours = ours.select(theirs.names)
        for name in ("finite", "nan", "above", "below", "low", "high"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=f"{kind} {name}")
        largest = np.where(ours.finite > 0, np.maximum(abs(ours.low), abs(ours.high)), 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            rounding = 1e-12 * ours.finite * largest
            # sums of huge values overflow in one order and not in another
            fits = np.isfinite(ours.finite * largest)
            assert not (abs(ours.total - theirs.total) > rounding)[fits].any(), f"{kind} total"
