"""Bins from rows of `rollup`, and bins as rows of the coarser levels x8, x64, x512.

A row of a coarser level is one bin. Its statistics are lists with one entry per metric, its histogram holds the filled
cells only. The names of metrics and of gradient groups are the same for a whole file and stand in its first row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from collectors.bins import Bins, Stats, concatenate
from mhpo_core.histograms import N_BINS
from mhpo_core.metrics import SIDES

LOG_RATIO = "log_ratio"
ROLLUP_LEAVES = [
    *(f"histograms.list.element.{name}" for name in ("quantity", "side", "bin", "count")),
    *(f"gradients.list.element.{name}" for name in ("parameter", "grad_norm")),
]
"""Parquet columns that bins are made of, besides step, wall_time and the metrics."""

ROLLUP_TEXTS = [leaf for leaf in ROLLUP_LEAVES if leaf.rsplit(".", 1)[1] in ("quantity", "side", "parameter")]

_CELLS = len(SIDES) * N_BINS
_STATS = {
    "total": pa.float64(), "low": pa.float64(), "high": pa.float64(),
    "finite": pa.int32(), "nan": pa.int32(), "above": pa.int32(), "below": pa.int32(),
}  # fmt: skip
_CELL = pa.struct([("cell", pa.int32()), ("count", pa.int64())])


def bins_of_steps(table: pa.Table, metrics: Sequence[str]) -> Bins:
    """One bin per step.

    Args:
        table: rows of `rollup`, one per step, steps rising; columns that are missing count as not computed.
        metrics: names of columns.
    """
    parts = [_of_batch(batch, metrics) for batch in table.to_batches() if batch.num_rows]
    return concatenate(parts) if parts else Bins.empty(0, 1, metrics)


def _of_batch(batch: pa.RecordBatch, metrics: Sequence[str]) -> Bins:
    size, columns = batch.num_rows, set(batch.schema.names)
    step = _numbers(batch.column("step"), np.int64)
    values, known = np.zeros((size, len(metrics))), np.zeros((size, len(metrics)), bool)
    places = [place for place, name in enumerate(metrics) if name in columns]
    if places:
        present = batch.select([metrics[place] for place in places])
        values[:, places] = present.to_tensor(null_to_nan=True).to_numpy()
        known[:, places] = True
        for place, column in zip(places, present.columns, strict=True):
            if column.null_count:
                known[:, place] = _values(column)[1]
    return Bins(
        1, step, step.copy(), np.ones(size, np.int64), _values(batch.column("wall_time"))[0],
        Stats.of_values(metrics, values, known),
        _gradients(batch.column("gradients"), size) if "gradients" in columns else Stats.empty(size, []),
        _log_ratio(batch.column("histograms"), size) if "histograms" in columns else _no_counts(size),
    )  # fmt: skip


def _no_counts(size: int) -> NDArray[np.int64]:
    return np.zeros((size, len(SIDES), N_BINS), np.int64)


def _gradients(lists: pa.Array, size: int) -> Stats:
    rows, structs = _unnested(lists)
    labels = structs.field("parameter")
    labels = labels if pa.types.is_dictionary(labels.type) else labels.dictionary_encode()
    names = labels.dictionary.to_pylist()
    column = _numbers(labels.indices, np.intp)
    values, known = np.zeros((size, len(names))), np.zeros((size, len(names)), bool)
    values[rows, column], known[rows, column] = _values(structs.field("grad_norm"))
    used = np.flatnonzero(known.any(axis=0))
    return Stats.of_values([names[i] for i in used], values[:, used], known[:, used])


def _log_ratio(lists: pa.Array, size: int) -> NDArray[np.int64]:
    rows, structs = _unnested(lists)
    side = _codes(structs.field("side"), list(SIDES))
    wanted = (_codes(structs.field("quantity"), [LOG_RATIO]) == 0) & (side >= 0)
    cell = side[wanted] * N_BINS + _numbers(structs.field("bin"), np.int64)[wanted]
    counts = np.zeros(size * _CELLS, np.int64)
    np.add.at(counts, rows[wanted] * _CELLS + cell, _numbers(structs.field("count"), np.int64)[wanted])
    return counts.reshape(size, len(SIDES), N_BINS)


def _unnested(lists: pa.Array) -> tuple[NDArray[np.intp], pa.StructArray]:
    """Row of every element, and the elements."""
    lengths = _numbers(pc.fill_null(lists.value_lengths(), 0), np.intp)
    return np.repeat(np.arange(len(lists)), lengths), lists.flatten()


def _codes(texts: pa.Array, wanted: list[str]) -> NDArray[np.intp]:
    """Position of each text in `wanted`, −1 for any other."""
    if pa.types.is_dictionary(texts.type):
        codes = _codes(texts.dictionary, wanted)
        return codes[_numbers(texts.indices, np.intp)] if len(codes) else np.empty(0, np.intp)
    found = pc.index_in(texts, value_set=pa.array(wanted, texts.type))
    return _numbers(pc.fill_null(found, -1), np.intp)


def _values(column: pa.Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values, and which of them are not NULL."""
    known = np.ones(len(column), bool)
    if column.null_count:
        known = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), bool)
    return _numbers(column, np.float64), known


def _numbers(column: pa.Array, dtype: Any) -> NDArray[Any]:
    return np.asarray(column.to_numpy(zero_copy_only=False)).astype(dtype, copy=False)


def bins_to_table(bins: Bins) -> pa.Table:
    """One row per bin."""
    row, cell = np.nonzero(bins.log_ratio.reshape(bins.size, _CELLS))
    counts = bins.log_ratio.reshape(bins.size, _CELLS)[row, cell]
    cells = pa.StructArray.from_arrays([pa.array(cell, pa.int32()), pa.array(counts)], fields=list(_CELL))
    columns: dict[str, Any] = {
        "width": pa.repeat(pa.scalar(bins.width, pa.int64()), bins.size),
        "first": pa.array(bins.first), "last": pa.array(bins.last), "n_steps": pa.array(bins.n_steps),
        "wall_time": pa.array(bins.wall_time, from_pandas=False),
        "log_ratio": _lists(np.searchsorted(row, np.arange(bins.size + 1)), cells),
    }  # fmt: skip
    for kind, stats in (("metric", bins.metrics), ("gradient", bins.gradients)):
        names = [stats.names, *[[]] * (bins.size - 1)][: bins.size]
        columns[f"{kind}_names"] = pa.array(names, pa.list_(pa.string()))
        ends = np.arange(bins.size + 1) * len(stats.names)
        for name, arrow in _STATS.items():
            flat = getattr(stats, name).ravel().astype(arrow.to_pandas_dtype(), copy=False)
            columns[f"{kind}_{name}"] = _lists(ends, pa.array(flat, arrow, from_pandas=False))
    return pa.table(columns)


def _lists(ends: NDArray[np.intp], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)


def bins_from_table(table: pa.Table) -> Bins:
    """The bins that `bins_to_table` made rows of, from at least one row.

    Raises:
        KeyError, ValueError: the table holds something else.
    """
    whole = {name: table.column(name).combine_chunks() for name in table.column_names}
    size = table.num_rows
    rows, cells = _unnested(whole["log_ratio"])
    counts = np.zeros((size, _CELLS), np.int64)
    counts[rows, _numbers(cells.field("cell"), np.intp)] = _numbers(cells.field("count"), np.int64)
    step = [_numbers(whole[name], np.int64) for name in ("first", "last", "n_steps")]
    return Bins(
        int(whole["width"][0].as_py()), step[0], step[1], step[2], _numbers(whole["wall_time"], np.float64),
        _stats(whole, "metric", size), _stats(whole, "gradient", size), counts.reshape(size, len(SIDES), N_BINS),
    )  # fmt: skip


def _stats(columns: dict[str, pa.Array], kind: str, size: int) -> Stats:
    names = columns[f"{kind}_names"][0].as_py()
    return Stats(names, **{name: _matrix(columns[f"{kind}_{name}"], (size, len(names)), name) for name in _STATS})


def _matrix(lists: pa.Array, shape: tuple[int, int], name: str) -> NDArray[Any]:
    dtype = np.float64 if pa.types.is_floating(_STATS[name]) else np.int64
    return _numbers(lists.flatten(), dtype).reshape(shape)
