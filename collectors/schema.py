"""Arrow schemas of the physical tables, and the rollup row of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mhpo_core.gradients import GradientNorms
from mhpo_core.histograms import EDGES
from mhpo_core.metrics import METRICS
from mhpo_core.telemetry import Histogram, Scalar

_KEY = [("step", pa.int64()), ("attempt", pa.int32()), ("rank", pa.int32())]

HISTOGRAM = pa.struct(
    [
        ("quantity", pa.string()), ("side", pa.string()), ("bin", pa.int32()), ("bin_low", pa.float64()),
        ("bin_high", pa.float64()), ("count", pa.int64()), ("weight", pa.float64()), ("advantage_weight", pa.float64()),
    ]
)  # fmt: skip
GRADIENT = pa.struct(
    [("parameter", pa.string()), ("grad_norm", pa.float64()), ("weight_norm", pa.float64()), ("nonfinite", pa.int64())]
)
TRAINER_METRIC = pa.struct([("name", pa.string()), ("value", pa.float64())])

PART = pa.struct([("kind", pa.string()), ("name", pa.string()), ("value", pa.float64())])
"""One count, sum or extreme of a rank's tokens, from which the ranks of a step are merged."""

ROLLUP_SCHEMA = pa.schema(
    [
        *_KEY,
        ("world_size", pa.int32()),
        ("wall_time", pa.float64()),
        ("kept_tokens", pa.int64()),
        ("ring_tokens", pa.int64()),
        *[(m.name, pa.int64() if m.integer else pa.float64()) for m in METRICS.values()],
        ("histograms", pa.list_(HISTOGRAM)),
        ("gradients", pa.list_(GRADIENT)),
        ("metrics", pa.list_(TRAINER_METRIC)),
        ("parts", pa.list_(PART)),
    ]
)

_NO_HISTOGRAMS = pa.array([[]], pa.list_(HISTOGRAM))
_HISTOGRAMS = ROLLUP_SCHEMA.get_field_index("histograms")
_ROLLUP_ROW = pa.struct([field for field in ROLLUP_SCHEMA if field.name != "histograms"])

TOKEN_FLOATS = (
    "logp_old", "log_ratio", "logp_new", "logp_rollout", "mismatch", "logp_ref", "entropy", "hazard",
    "gradient_multiplier", "logit_grad_norm",
)  # fmt: skip
TOKEN_SCHEMA = pa.schema(
    [
        *_KEY[:2],
        ("sequence_id", pa.int64()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("advantage", pa.float32()),
        *[(name, pa.float32()) for name in TOKEN_FLOATS],
        ("kept_because", pa.string()),
    ]
)
# for numbers that repeat, too: a dictionary costs three times as long and is no smaller after zstd
TOKEN_ENCODINGS = dict.fromkeys([n for n in TOKEN_SCHEMA.names if n != "kept_because"], "BYTE_STREAM_SPLIT")

SEQUENCE_SCHEMA = pa.schema(
    [
        *_KEY,
        ("sequence_id", pa.int64()),
        ("group_id", pa.int64()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("length", pa.int32()),
        ("truncated", pa.bool_()),
        ("policy_lag", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("extra", pa.string()),
    ]
)
TEXT_SCHEMA = pa.schema([*_KEY, *[(n, SEQUENCE_SCHEMA.field(n).type) for n in ("sequence_id", "prompt", "completion")]])

EVENT_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("rank", pa.int32()),
        ("time", pa.float64()),
        ("kind", pa.string()),
        ("detail", pa.string()),
    ]
)
ALARM_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("step", pa.int64()),
        ("attempt", pa.int32()),
        ("time", pa.float64()),
        *[(name, pa.string()) for name in ("id", "rule", "mode", "severity")],
        ("onset_step", pa.int64()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("message", pa.string()),
        ("evidence", pa.string()),
        ("advice", pa.list_(pa.string())),
    ]
)
VOCABULARY_SCHEMA = pa.schema([("token_id", pa.int32()), ("token", pa.string())])


def utf8(text: object) -> str:
    """The text as a store can hold it: a tokenizer can cut a character in half; what is not UTF-8 becomes "?"."""
    if type(text) is str and text.isascii():
        return text
    return str(text).encode("utf-8", "replace").decode("utf-8")


def json_text(value: object) -> str:
    """The value as JSON, with NaN and ±Infinity as Python writes them; what is not JSON as its text."""
    return utf8(json.dumps(value, ensure_ascii=False, default=str))


@dataclass(frozen=True)
class StepKey:
    """Which step of which rank, in which attempt at it."""

    step: int
    attempt: int
    rank: int = 0

    def columns(self, n_rows: int) -> dict[str, pa.Array]:
        """The key repeated for every row, as dictionaries of one entry, which are cheap to make and to write."""
        zeros = pa.array(np.zeros(n_rows, np.int32))  # a segment has more steps than fit eight bits
        entries = {n: pa.array([getattr(self, n)], kind) for n, kind in _KEY}
        return {n: pa.DictionaryArray.from_arrays(zeros, entry) for n, entry in entries.items()}


@dataclass(frozen=True)
class StepScalars:
    """What the trainer says about a step besides its tokens."""

    loss: float | None = None
    grad_norm: float | None = None
    gradients: GradientNorms | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def rollup_table(
    key: StepKey,
    given: Mapping[str, Scalar],
    scalars: Mapping[str, Scalar],
    histograms: list[Histogram],
    trainer: StepScalars,
    parts: Mapping[str, Mapping[str, float]] | None = None,
) -> pa.Table:
    """One row: every metric of METRICS (NULL where not computed), histograms, gradient norms, trainer metrics.

    Args:
        given: world_size, wall_time, kept_tokens, ring_tokens.
        parts: kind → name → value of what ranks are merged from; None where there is one rank.
    """
    row: dict[str, object] = {
        **given,
        **{name: value for name, value in scalars.items() if name in METRICS},
        "gradients": _gradient_rows(trainer.gradients),
        "metrics": [(name, float(v)) for name, v in trainer.metrics.items()],
        "parts": _part_rows(parts) if parts is not None else None,
        "step": key.step, "attempt": key.attempt, "rank": key.rank,
    }  # fmt: skip
    # one conversion for all columns: a hundred small ones take ten times as long
    columns = pa.array([row], _ROLLUP_ROW).flatten()
    columns.insert(_HISTOGRAMS, _histogram_column(histograms))
    return pa.Table.from_arrays(columns, schema=ROLLUP_SCHEMA)


def _part_rows(parts: Mapping[str, Mapping[str, float]]) -> list[dict[str, object]]:
    return [
        {"kind": kind, "name": name, "value": float(value)}
        for kind, values in parts.items()
        for name, value in values.items()
    ]


def _histogram_column(histograms: list[Histogram]) -> pa.Array:
    if not histograms:
        return _NO_HISTOGRAMS
    filled = [np.flatnonzero(h.count) for h in histograms]
    lengths = [len(bins) for bins in filled]
    bins = np.concatenate(filled) if filled else np.empty(0, np.int64)
    parts: dict[str, pa.Array] = {
        "quantity": _repeated([h.quantity for h in histograms], lengths),
        "side": _repeated([h.side for h in histograms], lengths),
        "bin": pa.array(bins.astype(np.int32)),
        "bin_low": pa.array(EDGES[bins]),
        "bin_high": pa.array(EDGES[bins + 1]),
        "count": pa.array(_concatenated([h.count[f] for h, f in zip(histograms, filled, strict=True)], np.int64)),
        "weight": pa.array(_concatenated([h.weight[f] for h, f in zip(histograms, filled, strict=True)], np.float64)),
        "advantage_weight": _advantage_weight(histograms, filled),
    }
    rows = pa.StructArray.from_arrays([parts[f.name] for f in HISTOGRAM], fields=list(HISTOGRAM))
    return pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)


def _advantage_weight(histograms: list[Histogram], filled: list[NDArray[np.intp]]) -> pa.Array:
    """Σ|A| of each filled bin; NULL for the quantities that do not have it."""
    parts = [
        pa.nulls(len(bins), pa.float64()) if h.advantage_weight is None else pa.array(h.advantage_weight[bins])
        for h, bins in zip(histograms, filled, strict=True)
    ]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.float64())


def _repeated(labels: list[str], lengths: list[int]) -> pa.Array:
    return pa.array(np.repeat(np.array(labels, dtype=object), lengths), pa.string())


def _concatenated(parts: list[NDArray[np.generic]], dtype: type) -> NDArray[np.generic]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


def _gradient_rows(norms: GradientNorms | None) -> list[dict[str, object]]:
    if norms is None:
        return []
    return [
        {
            "parameter": group, "grad_norm": norm, "weight_norm": norms.weight_by_group.get(group),
            "nonfinite": norms.nonfinite_by_group.get(group),
        }
        for group, norm in norms.by_group.items()
    ]  # fmt: skip
