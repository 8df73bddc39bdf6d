"""A step as it is handed over, and the same step measured, as rows that can be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from collectors import layout
from collectors.intake import sequence_sums
from collectors.packing import Packed, measure_packed, pack, without_ratio
from collectors.policy import TokenPolicy
from collectors.ranks import parts_of
from collectors.repetition import REPETITION, repetition
from collectors.schema import StepKey, StepScalars, rollup_table
from collectors.store import Rows, without_tokens
from collectors.token_rows import StepRows, TokenColumns, sequence_table, step_rows
from mhpo_core.alarms import Alarm
from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.objectives import Objective
from mhpo_core.telemetry import Scalar


@dataclass(frozen=True)
class Step:
    """A step on its way, all tensors owned by it and on the CPU.

    Args:
        batch: packed where its terms allow that and padding is most of it; None where the trainer gave none, or where
            not even the memory for it was left and its tokens are counted as dropped.
        scalars: of the step; they win over what is measured.
        columns: of `steps`, as the trainer computed them; what is measured wins over them.
        ratio_known: false where logp_new of the batch stands in for what nobody knows.
    """

    key: StepKey
    wall_time: float
    batch: TokenBatch | Packed | None
    sequences: Sequences
    sequence_id: NDArray[np.int64]
    trainer: StepScalars
    scalars: dict[str, Scalar]
    columns: Mapping[str, Scalar] = field(default_factory=dict)
    ratio_known: bool = True


@dataclass(frozen=True)
class Ready:
    """A step as it is written.

    Args:
        tables: rows of tokens and sequences.
        rollup: its row of `rollup`.
        incident: why the ring should be pinned; empty if nothing is wrong.
        alarms: that were raised at this step.
    """

    key: StepKey
    tables: tuple[Rows, ...]
    rollup: pa.Table
    incident: str = ""
    alarms: tuple[Alarm, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of its tokens and sequences."""
        return sum(int(part.rows.nbytes) for part in self.tables)


def prepare(
    step: Step, objective: Objective, what: TokenPolicy, how: TokenColumns, world_size: int, keeps_tokens: bool
) -> Ready:
    """Measure a step and make the rows that are written of it."""
    given: dict[str, Scalar] = {"world_size": world_size, "wall_time": step.wall_time}
    given |= {"kept_tokens": 0, "ring_tokens": 0}
    if step.batch is None:
        sequences_alone = {"sequences": sequence_sums(step.sequences)} if world_size > 1 else None
        scalars = {**step.columns, **step.scalars}
        rollup = rollup_table(step.key, given, scalars, [], step.trainer, sequences_alone)
        return Ready(step.key, _sequences_alone(step) if keeps_tokens else (), rollup)
    whole = step.batch if isinstance(step.batch, TokenBatch) else None
    packed = step.batch if isinstance(step.batch, Packed) else pack(step.batch)
    telemetry = measure_packed(None if objective.follows_from_ratio else whole, packed, objective)
    if not step.ratio_known:
        telemetry, how = without_ratio(telemetry), replace(how, ratio_known=False)
    rows: StepRows | None = None
    scalars = {**step.columns, **telemetry.scalars, **step.scalars}
    if keeps_tokens:
        rows = step_rows(step.key, packed, telemetry, step.sequences, step.sequence_id, what, how)
        given |= {"kept_tokens": _count(rows.kept), "ring_tokens": _count(rows.ring)}
    else:
        scalars["dropped_tokens"] = scalars["n_tokens"]
    parts = parts_of(telemetry.accumulated, sequence_sums(step.sequences)) if world_size > 1 else None
    repeated = repetition(packed)
    own = {} if repeated is None else {REPETITION: repeated}
    trainer = replace(step.trainer, metrics={**step.trainer.metrics, **own})
    rollup = rollup_table(step.key, given, scalars, telemetry.histograms, trainer, parts)
    return Ready(step.key, _tables(rows), rollup, _incident(step, scalars))


def _sequences_alone(step: Step) -> tuple[Rows, ...]:
    if not len(step.sequence_id):
        return ()
    return (Rows(layout.SEQUENCES, layout.HOT, sequence_table(step.key, None, step.sequences, step.sequence_id)),)


def _tables(rows: StepRows | None) -> tuple[Rows, ...]:
    if rows is None:
        return ()
    parts = (
        (layout.TOKENS, layout.HOT, rows.kept),
        (layout.TOKENS, layout.RING, rows.ring),
        (layout.SEQUENCES, layout.HOT, rows.sequences),
        (layout.SEQUENCES, layout.RING, rows.texts),
    )
    return tuple(Rows(table, level, found) for table, level, found in parts if found is not None and len(found))


def _incident(step: Step, scalars: dict[str, Scalar]) -> str:
    """Why the ring should be pinned at this step; empty if nothing is wrong."""
    if scalars.get("nonfinite_count"):
        return f"{scalars['nonfinite_count']} non-finite tokens at step {step.key.step}"
    loss = scalars.get("loss")
    if loss is not None and not np.isfinite(loss):
        return f"loss {loss} at step {step.key.step}"
    return ""


def _count(rows: pa.Table | None) -> int:
    return 0 if rows is None else len(rows)


def without_batch(step: Step) -> Step:
    """The step whose tokens are counted as dropped."""
    if step.batch is None:
        return step
    n_tokens = step.batch.trained.n_tokens if isinstance(step.batch, Packed) else int(step.batch.mask.sum())
    return replace(step, batch=None, scalars=step.scalars | {"n_tokens": n_tokens, "dropped_tokens": n_tokens})


def without_rows(ready: Ready) -> Ready:
    """The step with its summary alone, which says that its tokens were dropped."""
    rollup = ready.rollup
    for part in ready.tables:
        if part.table == layout.TOKENS:
            rollup = without_tokens(rollup, part.level, len(part.rows))
    return replace(ready, tables=(), rollup=rollup)
