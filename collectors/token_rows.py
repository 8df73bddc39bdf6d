"""The rows of `tokens` and `sequences` of one step.

Shape letters: B sequences, T response tokens, N trained tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from collectors import policy
from collectors.packing import Packed
from collectors.policy import Choice, TokenPolicy
from collectors.schema import SEQUENCE_SCHEMA, TEXT_SCHEMA, TOKEN_FLOATS, TOKEN_SCHEMA, StepKey
from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.telemetry import StepTelemetry

EXACT, COMPACT = "exact", "compact"
FULL, MINIMAL = "full", "minimal"

_KEPT_BITS = 10
"""Bits of a float32's mantissa that the compact tier keeps: relative error at most 2⁻¹¹ = 4.9e-4."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TokenColumns:
    """Which columns of a token are stored, and how exactly.

    Args:
        columns: "full" stores log-ratio, hazard and token gradient norm; "minimal" leaves out what follows from others.
        precision: "exact" float32; "compact" keeps 10 bits of the mantissa, relative error ≤ 4.9e-4.
        derived: columns that follow from stored ones by a formula of the objective, see `formulas`.
        ratio_known: false where logp_new only stands in for what nobody knows; what follows from it is not stored.
    """

    columns: str = FULL
    precision: str = EXACT
    derived: frozenset[str] = frozenset()
    ratio_known: bool = True


_FROM_RATIO = ("logp_new", "log_ratio", "hazard", "gradient_multiplier", "logit_grad_norm")


@dataclass(frozen=True)
class StepRows:
    """What is written of the tokens of a step.

    Args:
        kept, ring: rows of `tokens`; None where there are none.
        sequences: one row per sequence; text only where it is kept.
        texts: the other texts, None where there are none.
    """

    kept: pa.Table | None
    ring: pa.Table | None
    sequences: pa.Table
    texts: pa.Table | None


def step_rows(
    key: StepKey,
    packed: Packed,
    measured: StepTelemetry,
    sequences: Sequences,
    sequence_id: NDArray[np.int64],
    what: TokenPolicy,
    how: TokenColumns,
) -> StepRows:
    """The rows of one step, tokens ordered by sequence and position.

    Args:
        measured: telemetry whose terms are those of the packed tokens, (1, N).
    """
    log_ratio = _flat(measured.terms.log_ratio)
    choice = what.choose(packed.row, log_ratio, sequence_id)
    columns = _token_columns(key, packed.batch, measured, how, log_ratio)
    columns["sequence_id"] = pa.array(sequence_id[packed.row])
    columns["position"] = pa.array(packed.position.astype(np.int32))
    columns["kept_because"] = pa.DictionaryArray.from_arrays(pa.array(choice.reason), pa.array(policy.REASONS))
    # no schema: the dictionary of kept_because stays one until it is encoded
    tokens = pa.table({name: columns[name] for name in TOKEN_SCHEMA.names})
    all_sequences = sequence_table(key, packed, sequences, sequence_id)
    if what.kind == policy.ALL:
        return StepRows(tokens, None, all_sequences, None)
    in_ring = choice.reason == policy.RING
    ring = tokens.filter(pa.array(in_ring)) if what.ring and in_ring.any() else None
    kept = tokens.filter(pa.array(~in_ring)) if not in_ring.all() else None
    return StepRows(kept, ring, *_split_texts(all_sequences, choice, bool(what.ring)))


def _token_columns(
    key: StepKey, batch: TokenBatch, measured: StepTelemetry, how: TokenColumns, log_ratio: Floats
) -> dict[str, pa.Array]:
    logp_old, logp_new = _flat(batch.logp_old), _flat(batch.logp_new)
    found: dict[str, Floats | None] = {
        "logp_old": logp_old,
        "log_ratio": log_ratio,
        "logp_new": logp_new,
        "logp_rollout": _optional(batch.logp_rollout),
        "logp_ref": _optional(batch.logp_ref),
        "entropy": _optional(batch.entropy),
        "hazard": _optional(measured.terms.hazard),
        "gradient_multiplier": _flat(measured.terms.gradient_multiplier),
        "logit_grad_norm": _flat(measured.logit_grad_norm),
    }
    for name in how.derived & {"gradient_multiplier"}:
        found[name] = None
    if how.columns == MINIMAL:
        found["log_ratio"] = None
        if "hazard_positive" in how.derived:
            found["hazard"] = None
        if batch.sum_p_squared is None:
            found["logit_grad_norm"] = None
    masks: dict[str, NDArray[np.bool_]] = {}
    if how.precision == COMPACT:
        found = _compact(found, log_ratio)
    elif how.columns == FULL:
        # logp_old + log_ratio gives back nearly every logp_new to the last bit; only the others are stored
        with np.errstate(invalid="ignore", over="ignore"):
            masks["logp_new"] = (logp_old + log_ratio).view(np.int32) == logp_new.view(np.int32)
    if not how.ratio_known:
        found |= dict.fromkeys(_FROM_RATIO)
    n_rows = len(log_ratio)
    columns = key.columns(n_rows)
    for name in TOKEN_FLOATS:
        columns[name] = _float_array(found.get(name), masks.get(name), n_rows)
    columns["advantage"] = _float_array(_flat(batch.advantage), None, n_rows)
    columns["token_id"] = _token_ids(batch.token_id, n_rows)
    return columns


def _compact(found: dict[str, Floats | None], log_ratio: Floats) -> dict[str, Floats | None]:
    """Fewer bits of each column; differences are rounded themselves and never taken between rounded values."""
    rollout, old = found["logp_rollout"], found["logp_old"]
    with np.errstate(invalid="ignore", over="ignore"):
        mismatch = None if rollout is None or old is None else old - rollout
    given = found | {"log_ratio": log_ratio, "logp_new": None, "logp_rollout": None, "mismatch": mismatch}
    return {name: None if values is None else _rounded(values) for name, values in given.items()}


def _rounded(values: Floats) -> Floats:
    """To the nearest float32 with 10 bits of mantissa; NaN, ±Inf and denormals as they are."""
    dropped = 23 - _KEPT_BITS
    bits = values.view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1) + ((bits >> np.uint32(dropped)) & np.uint32(1))
    rounded = ((bits + half) & np.uint32((0xFFFFFFFF << dropped) & 0xFFFFFFFF)).view(np.float32)
    # a denormal has leading zeros, of which dropping as many bits could leave nothing
    normal = np.isfinite(values) & (np.abs(values) >= np.finfo(np.float32).tiny)
    return np.where(normal & np.isfinite(rounded), rounded, values)


def sequence_table(
    key: StepKey, packed: Packed | None, sequences: Sequences, sequence_id: NDArray[np.int64]
) -> pa.Table:
    """One row per sequence, fully masked ones too; `advantage` is the mean over its trained tokens.

    Args:
        packed: None where no token of the step is known.
    """
    n_rows = len(sequence_id)
    columns = {name: values.dictionary_decode() for name, values in key.columns(n_rows).items()} | {
        "sequence_id": pa.array(sequence_id),
        "group_id": _column(sequences.group_id, pa.int64()),
        "reward": _column(sequences.reward, pa.float64()),
        "advantage": _column(sequences.advantage, pa.float64()) if packed is None else _mean_advantage(packed),
        "length": _column(sequences.length if packed is None else packed.length, pa.int32()),
        "truncated": _column(sequences.truncated, pa.bool_()),
        "policy_lag": _column(sequences.policy_lag, pa.int32()),
        "prompt": _column(sequences.prompt, pa.string()),
        "completion": _column(sequences.completion, pa.string()),
        "extra": _column(sequences.extra, pa.string()),
    }
    filled = {n: pa.nulls(n_rows, SEQUENCE_SCHEMA.field(n).type) if c is None else c for n, c in columns.items()}
    return pa.table({n: filled[n] for n in SEQUENCE_SCHEMA.names}, schema=SEQUENCE_SCHEMA)


def _mean_advantage(packed: Packed) -> pa.Array:
    length = packed.length
    total = np.zeros(len(length))
    nonempty = np.flatnonzero(length)
    starts = np.cumsum(length)[nonempty] - length[nonempty]
    with np.errstate(invalid="ignore", over="ignore"):
        total[nonempty] = np.add.reduceat(packed.batch.advantage.numpy().reshape(-1), starts, dtype=np.float64)
    return pa.array(total / np.maximum(length, 1), mask=length == 0)


def _split_texts(rows: pa.Table, choice: Choice, ring: bool) -> tuple[pa.Table, pa.Table | None]:
    """The rows with the texts that are kept for ever, and the other texts."""
    given = any(rows[name].null_count < len(rows) for name in ("prompt", "completion"))
    if not given or choice.text.all():
        return rows, None
    dropped = pa.array(~choice.text)
    texts = rows.select(TEXT_SCHEMA.names).filter(dropped) if ring else None
    for name in ("prompt", "completion"):
        values = pa.array(rows[name].to_pylist(), pa.string(), mask=~choice.text)
        rows = rows.set_column(rows.schema.get_field_index(name), SEQUENCE_SCHEMA.field(name), values)
    return rows, texts


def _flat(values: Tensor) -> Floats:
    return np.ascontiguousarray(values.detach().float().numpy().reshape(-1))


def _optional(values: Tensor | None) -> Floats | None:
    return None if values is None else _flat(values)


def _float_array(values: Floats | None, missing: NDArray[np.bool_] | None, n_rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(n_rows, pa.float32())
    # from_pandas=False keeps NaN a value; NULL means not computed
    return pa.array(values, pa.float32(), mask=missing, from_pandas=False)


def _token_ids(token_id: Tensor | None, n_rows: int) -> pa.Array:
    if token_id is None:
        return pa.nulls(n_rows, pa.int32())
    return pa.array(token_id.numpy().reshape(-1).astype(np.int32))


def _column(values: object, arrow: pa.DataType) -> pa.Array | None:
    if values is None:
        return None
    listed = values.tolist() if hasattr(values, "tolist") else list(values)  # type: ignore[call-overload]
    return pa.array(listed, arrow, from_pandas=False)
