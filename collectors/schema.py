"""Arrow schemas of the physical tables, and how a step's numbers become their rows.

Shape letters: B sequences, T response tokens, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.gradients import GradientNorms
from mhpo_core.histograms import EDGES
from mhpo_core.metrics import METRICS
from mhpo_core.telemetry import Histogram, Scalar, StepTelemetry

_KEY = [("step", pa.int64()), ("attempt", pa.int32()), ("rank", pa.int32())]
_KEY_TYPES = dict(_KEY)

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

ROLLUP_SCHEMA = pa.schema(
    [
        *_KEY,
        ("wall_time", pa.float64()),
        *[(m.name, pa.int64() if m.integer else pa.float64()) for m in METRICS.values()],
        ("histograms", pa.list_(HISTOGRAM)),
        ("gradients", pa.list_(GRADIENT)),
        ("metrics", pa.list_(TRAINER_METRIC)),
    ]
)

TOKEN_FLOATS = (
    "logp_new", "logp_old", "logp_rollout", "logp_ref", "advantage", "entropy", "log_ratio", "hazard_positive",
    "hazard_negative", "gradient_multiplier", "logit_grad_norm",
)  # fmt: skip
TOKEN_SCHEMA = pa.schema(
    [
        *_KEY,
        ("sequence_id", pa.int64()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        *[(name, pa.float32()) for name in TOKEN_FLOATS],
        ("kept_because", pa.string()),
    ]
)
TOKEN_DICTIONARY = ["step", "attempt", "rank", "sequence_id", "advantage", "kept_because"]
TOKEN_ENCODINGS = {"position": "DELTA_BINARY_PACKED", "token_id": "DELTA_BINARY_PACKED"} | {
    name: "BYTE_STREAM_SPLIT" for name in TOKEN_FLOATS if name not in TOKEN_DICTIONARY
}

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
    ]
)

EVENT_SCHEMA = pa.schema([("time", pa.float64()), ("kind", pa.string()), ("detail", pa.string())])
VOCABULARY_SCHEMA = pa.schema([("token_id", pa.int32()), ("token", pa.string())])


def utf8(text: object) -> str:
    """The text as a store can hold it: a tokenizer can cut a character in half; what is not UTF-8 becomes "?"."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class StepKey:
    """Which step, in which attempt at it; ranks other than 0 are not written yet."""

    step: int
    attempt: int
    rank: int = 0

    def columns(self, n_rows: int) -> dict[str, pa.Array]:
        """The key repeated for every row."""
        values = {"step": self.step, "attempt": self.attempt, "rank": self.rank}
        return {name: pa.repeat(pa.scalar(v, _KEY_TYPES[name]), n_rows) for name, v in values.items()}


@dataclass(frozen=True)
class StepScalars:
    """What the trainer says about a step besides its tokens."""

    loss: float | None = None
    grad_norm: float | None = None
    gradients: GradientNorms | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def rollup_table(
    key: StepKey, wall_time: float, scalars: Mapping[str, Scalar], histograms: list[Histogram], trainer: StepScalars
) -> pa.Table:
    """One row: every metric of METRICS (NULL where not computed), histograms, gradient norms, trainer metrics."""
    row = {
        "wall_time": wall_time,
        **{name: scalars.get(name) for name in METRICS},
        "gradients": _gradient_rows(trainer.gradients),
        "metrics": [{"name": name, "value": float(v)} for name, v in trainer.metrics.items()],
    }
    columns = {name: pa.array([value], ROLLUP_SCHEMA.field(name).type) for name, value in row.items()}
    columns |= key.columns(1) | {"histograms": _histogram_column(histograms)}
    return pa.table({name: columns[name] for name in ROLLUP_SCHEMA.names}, schema=ROLLUP_SCHEMA)


def token_table(key: StepKey, batch: TokenBatch, telemetry: StepTelemetry, sequence_id: NDArray[np.int64]) -> pa.Table:
    """One row per trained token, ordered by sequence and position; all tensors on the CPU."""
    mask = batch.mask.numpy()
    # the position counts response tokens, masked ones too, so that it points into the completion
    row, position = np.nonzero(mask)
    terms = telemetry.terms
    tensors: dict[str, Tensor | None] = {
        **{name: getattr(batch, name) for name in TOKEN_FLOATS[:6]},
        "log_ratio": terms.log_ratio,
        "hazard_positive": terms.hazard_positive,
        "hazard_negative": terms.hazard_negative,
        "gradient_multiplier": terms.gradient_multiplier,
        "logit_grad_norm": telemetry.logit_grad_norm,
    }
    columns = key.columns(len(row))
    columns["sequence_id"] = pa.array(sequence_id[row])
    columns["position"] = pa.array(position.astype(np.int32))
    columns["token_id"] = _picked(batch.token_id, mask, np.int32, pa.int32())
    columns |= {name: _picked(values, mask, np.float32, pa.float32()) for name, values in tensors.items()}
    columns["kept_because"] = pa.repeat(pa.scalar("all"), len(row))
    return pa.table({name: columns[name] for name in TOKEN_SCHEMA.names}, schema=TOKEN_SCHEMA)


def sequence_table(key: StepKey, batch: TokenBatch, sequences: Sequences, sequence_id: NDArray[np.int64]) -> pa.Table:
    """One row per sequence, fully masked ones too; `advantage` is the mean over its trained tokens."""
    mask = batch.mask.numpy()
    length = mask.sum(axis=1)
    advantage = np.where(mask, batch.advantage.double().numpy(), 0.0).sum(axis=1) / np.maximum(length, 1)
    columns = key.columns(batch.n_sequences) | {
        "sequence_id": pa.array(sequence_id),
        "group_id": _column(sequences.group_id, pa.int64()),
        "reward": _column(sequences.reward, pa.float64()),
        "advantage": pa.array(advantage, mask=length == 0),
        "length": pa.array(length.astype(np.int32)),
        "truncated": _column(sequences.truncated, pa.bool_()),
        "policy_lag": _column(sequences.policy_lag, pa.int32()),
        "prompt": _column(sequences.prompt, pa.string()),
        "completion": _column(sequences.completion, pa.string()),
    }
    n_rows = batch.n_sequences
    filled = {n: pa.nulls(n_rows, SEQUENCE_SCHEMA.field(n).type) if c is None else c for n, c in columns.items()}
    return pa.table({n: filled[n] for n in SEQUENCE_SCHEMA.names}, schema=SEQUENCE_SCHEMA)


def _histogram_column(histograms: list[Histogram]) -> pa.Array:
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


def _picked(values: Tensor | None, mask: NDArray[np.bool_], dtype: type, arrow: pa.DataType) -> pa.Array:
    if values is None:
        return pa.nulls(int(mask.sum()), arrow)
    array = values.float() if values.is_floating_point() else values
    # from_pandas=False keeps NaN a value; NULL means not computed
    return pa.array(array.numpy()[mask].astype(dtype, copy=False), arrow, from_pandas=False)


def _column(values: object, arrow: pa.DataType) -> pa.Array | None:
    if values is None:
        return None
    listed = values.tolist() if hasattr(values, "tolist") else list(values)  # type: ignore[call-overload]
    return pa.array(listed, arrow, from_pandas=False)
