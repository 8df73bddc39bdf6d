"""What the trainer hands over, copied so that nothing of it is shared, and checked before anything is kept.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from collectors.packing import Packed
from collectors.schema import StepScalars, json_text, utf8
from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.errors import BatchError
from mhpo_core.gradients import GradientNorms
from mhpo_core.metrics import METRICS
from mhpo_core.telemetry import Scalar

_Number = TypeVar("_Number", int, float)
_ENTRY_OF: dict[str, Callable[[Any], object]] = {
    "reward": float, "sequence_id": int, "group_id": int, "truncated": bool, "policy_lag": int, "prompt": utf8,
    "completion": utf8, "advantage": float, "length": int, "extra": json_text,
}  # fmt: skip
_ALWAYS_KNOWN = ("sequence_id", "group_id")


def owned_batch(batch: TokenBatch) -> TokenBatch:
    """A copy on the CPU that shares nothing with the trainer; from a device one transfer for all its floats."""
    present = {f.name: getattr(batch, f.name).detach() for f in fields(batch) if getattr(batch, f.name) is not None}
    floats = {n: t for n, t in present.items() if t.is_floating_point()}
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in floats.values()) else torch.float32
    if batch.mask.device.type == "cpu":
        # pieces of this size are memory that was used before; one large piece would be new pages each time
        copied = {name: _copy(values, dtype) for name, values in floats.items()}
    else:
        copied = dict(zip(floats, torch.stack([t.to(dtype) for t in floats.values()]).cpu(), strict=True))
    copied |= {n: t.cpu().clone() for n, t in present.items() if n not in floats}
    return TokenBatch(**copied)


def _copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.stride(1) == 0:  # one value per sequence
        return values[:, :1].to(dtype, copy=True).expand(values.shape)
    return values.to(dtype, copy=True, memory_format=torch.contiguous_format)


def owned_sequences(sequences: Sequences, reward: Tensor | Sequence[float] | None, n_sequences: int) -> Sequences:
    """The per-sequence fields as lists of Python values; None in a list stays None, except in an id.

    Raises:
        BatchError: a field does not have one entry per sequence, or an entry has the wrong type.
    """
    sequences = sequences if reward is None else replace(sequences, reward=reward)
    sequences.require_length(n_sequences)
    present = {f.name: getattr(sequences, f.name) for f in fields(sequences) if getattr(sequences, f.name) is not None}
    return Sequences(**{name: _entries(name, values) for name, values in present.items()})


def _entries(name: str, values: Any) -> list[Any]:
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    try:
        return [None if v is None and name not in _ALWAYS_KNOWN else _ENTRY_OF[name](v) for v in listed]
    except (TypeError, ValueError, OverflowError) as error:
        raise BatchError(
            f"Recorder.record: {name} cannot be stored ({error}). Give one {_ENTRY_OF[name].__name__} per sequence."
        ) from None


def trainer_scalars(
    loss: float | Tensor | None,
    grad_norm: float | Tensor | None,
    gradient_norms: GradientNorms | Mapping[str, float] | None,
    metrics: Mapping[str, float],
) -> StepScalars:
    """What the trainer says about the step besides its tokens.

    Raises:
        BatchError: a value is not a number.
    """
    numbers = {utf8(name): _number(name, value) for name, value in metrics.items()}
    if isinstance(gradient_norms, Mapping):
        by_group = {utf8(name): _number(name, value) for name, value in gradient_norms.items()}
        gradient_norms = GradientNorms(float("nan"), by_group, {}, {})
    elif gradient_norms is not None:
        grad_norm = gradient_norms.total if grad_norm is None else grad_norm
        gradient_norms = replace(
            gradient_norms,
            by_group=_renamed(gradient_norms.by_group),
            weight_by_group=_renamed(gradient_norms.weight_by_group),
            nonfinite_by_group=_renamed(gradient_norms.nonfinite_by_group),
        )
    return StepScalars(
        loss=_number("loss", loss) if loss is not None else numbers.get("loss"),
        grad_norm=_number("grad_norm", grad_norm) if grad_norm is not None else numbers.get("grad_norm"),
        gradients=gradient_norms,
        metrics=numbers,
    )


def step_columns(columns: Mapping[str, float]) -> dict[str, Scalar]:
    """Columns of `steps` that a trainer computed itself.

    Raises:
        BatchError: there is no such column, or a value is not a number.
    """
    found: dict[str, Scalar] = {}
    for name, value in columns.items():
        if name not in METRICS:
            raise BatchError(
                f"Recorder.record: {name!r} is no column of steps, allowed are those of mhpo_core.metrics. "
                "Give it in metrics."
            )
        number = _number(name, value)
        if not METRICS[name].integer:
            found[name] = number
        elif np.isfinite(number):
            found[name] = int(number)
    return found


def _number(name: str, value: object) -> float:
    if type(value) is float:
        return value
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise BatchError(
            f"Recorder.record: {name} is {value!r}, allowed are single numbers. Leave it out or convert it."
        ) from None


def _renamed(values: Mapping[str, _Number]) -> dict[str, _Number]:
    return {utf8(name): value for name, value in values.items()}


def sequence_scalars(sequences: Sequences) -> dict[str, Scalar]:
    """Step metrics that come from sequences rather than tokens; absent where not known."""
    scalars: dict[str, Scalar] = {}
    if sequences.truncated is not None:
        truncated = [t for t in sequences.truncated if t is not None]
        if truncated:
            scalars["truncated_fraction"] = float(np.mean(np.asarray(truncated, dtype=bool)))
    known = [r is not None for r in sequences.reward] if sequences.reward is not None else []
    if sequences.reward is None or not any(known):
        return scalars
    reward = np.asarray(sequences.reward, dtype=np.float64)[known]
    with np.errstate(invalid="ignore"):
        scalars |= {"reward_mean": float(reward.mean()), "reward_std": float(reward.std())}
    if sequences.group_id is not None:
        group = np.unique(np.asarray(sequences.group_id)[known], return_inverse=True)[1]
        low, high = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
        with np.errstate(invalid="ignore"):
            np.minimum.at(low, group, reward)
            np.maximum.at(high, group, reward)
        scalars |= {"n_groups": len(low), "zero_std_groups": int((low == high).sum())}
    return scalars


def sequence_sums(sequences: Sequences) -> dict[str, float]:
    """What a rank adds to the sequence metrics of a step of several ranks."""
    sums: dict[str, float] = {}
    if sequences.truncated is not None:
        truncated = [t for t in sequences.truncated if t is not None]
        sums |= {"sequences": len(truncated), "truncated": float(np.sum(np.asarray(truncated, bool)))}
    if sequences.reward is not None:
        reward = np.asarray([r for r in sequences.reward if r is not None], dtype=np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            sums |= {
                "rewards": len(reward), "reward": float(reward.sum()), "reward_squared": float((reward**2).sum()),
            }  # fmt: skip
    return sums


def batch_bytes(batch: TokenBatch | Packed) -> int:
    """Memory of a batch."""
    if isinstance(batch, Packed):
        return batch_bytes(batch.batch) + batch.trained.nbytes
    present = (getattr(batch, f.name) for f in fields(batch))
    return sum(t.numel() * t.element_size() for t in present if isinstance(t, Tensor))
