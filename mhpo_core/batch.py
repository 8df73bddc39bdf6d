"""The tokens of one optimizer step, checked once at the boundary.

Shape letters: B sequences, T response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mhpo_core.errors import BatchError

_LOG_PROBABILITIES = ("logp_new", "logp_old", "logp_rollout", "logp_ref")
_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class TokenBatch:
    """Per-token log-probabilities, advantages and mask of one optimizer step.

    Masked positions may hold anything, NaN and ±Inf too: nothing is read from them. A non-finite value at a trained
    position is data; it is counted by the telemetry, not rejected here.

    Args:
        logp_new: log π(token) under the policy being trained, (B, T), nats. The only field that may carry a graph.
        logp_old: the same under the policy the ratio is taken against, (B, T), nats.
        advantage: (B, T), or (B,) for one value per sequence, reward units. Positive = make the sequence likelier.
        mask: (B, T), True (or 1) = the token trains.
        logp_rollout: log-probability reported by the engine that sampled, (B, T), nats.
        logp_ref: log-probability under a frozen reference policy, (B, T), nats.
        entropy: entropy of the policy being trained at each position, (B, T), nats.
        sum_p_squared: Σ_v p_v² of the policy being trained at each position, (B, T), in (0, 1].
        token_id: sampled token ids, (B, T), integers.

    Raises:
        BatchError: shapes disagree, a dtype does not fit, or no token trains.
    """

    logp_new: Tensor
    logp_old: Tensor
    advantage: Tensor
    mask: Tensor
    logp_rollout: Tensor | None = None
    logp_ref: Tensor | None = None
    entropy: Tensor | None = None
    sum_p_squared: Tensor | None = None
    token_id: Tensor | None = None

    def __post_init__(self) -> None:
        shape = _require_matrix("logp_new", self.logp_new)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            _require_tensor(field.name, value)
            if field.name == "advantage":
                object.__setattr__(self, "advantage", _expand_advantage(value, shape))
            elif value.shape != shape:
                raise BatchError(
                    f"TokenBatch: {field.name} has shape {tuple(value.shape)}, but logp_new has {tuple(shape)}. "
                    "Give every per-token tensor the same (B, T) shape."
                )
        for name in (*_LOG_PROBABILITIES, "advantage", "entropy", "sum_p_squared"):
            value = getattr(self, name)
            if value is not None and not value.is_floating_point():
                raise BatchError(
                    f"TokenBatch: {name} has dtype {value.dtype}, allowed are floating-point dtypes. "
                    f"Convert it, for instance with {name}.float()."
                )
        object.__setattr__(self, "mask", _boolean_mask(self.mask))
        if self.token_id is not None and self.token_id.dtype not in _INTEGER_DTYPES:
            raise BatchError(
                f"TokenBatch: token_id has dtype {self.token_id.dtype}, allowed are integer dtypes. "
                "Pass the ids the sampler drew."
            )
        devices = {getattr(self, f.name).device for f in fields(self) if getattr(self, f.name) is not None}
        if len(devices) > 1:
            raise BatchError(
                f"TokenBatch: tensors lie on {sorted(map(str, devices))}, allowed is one device. Move them together."
            )
        # numpy stops at the first one that is True
        trains = self.mask.numpy().any() if self.mask.device.type == "cpu" else self.mask.any()
        if not bool(trains):
            raise BatchError(
                "TokenBatch: the mask selects no token, at least one must train. Skip the step or check the mask."
            )

    @property
    def n_sequences(self) -> int:
        """Number of sequences B, fully masked ones included."""
        return self.logp_new.shape[0]

    def detach(self) -> TokenBatch:
        """The same batch without a graph."""
        return replace(self, logp_new=self.logp_new.detach())


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """One batch from the micro-batches of a step, padded on the right with masked positions.

    Args:
        batches: at least one; an optional field must be present in all or in none.

    Raises:
        BatchError: the list is empty, or an optional field is present in only some.
    """
    if not batches:
        raise BatchError("concatenate: got no batch, at least one is needed. Skip the step.")
    if len(batches) == 1:
        return batches[0]
    width = max(b.logp_new.shape[1] for b in batches)
    joined: dict[str, Any] = {}
    for field in fields(TokenBatch):
        values = [getattr(b, field.name) for b in batches]
        present = [v for v in values if v is not None]
        if present and len(present) != len(values):
            raise BatchError(
                f"concatenate: {field.name} is present in {len(present)} of {len(values)} micro-batches. "
                "Pass it in all of them or in none."
            )
        joined[field.name] = torch.cat([_pad_right(v, width) for v in present]) if present else None
    return TokenBatch(**joined)


@dataclass(frozen=True)
class Sequences:
    """What is known about each sampled completion of a batch; every field is optional and has length B.

    Args:
        reward: verifier's reward, reward units.
        sequence_id: unique within the run; the same completion keeps its id when it trains again.
        group_id: completions of one prompt share it.
        truncated: True = stopped by the length limit, not by an end token.
        policy_lag: optimizer steps between the policy that sampled and the policy being trained.
        prompt, completion: text, shown to people and never interpreted.
        advantage: the mean over its trained tokens; taken from the tokens where there are any.
        length: number of trained tokens; taken from the tokens where there are any.
        extra: what else is known, name → anything JSON.
    """

    reward: Tensor | Sequence[float] | None = None
    sequence_id: Tensor | Sequence[int] | None = None
    group_id: Tensor | Sequence[int] | None = None
    truncated: Tensor | Sequence[bool] | None = None
    policy_lag: Tensor | Sequence[int] | None = None
    prompt: Sequence[str] | None = None
    completion: Sequence[str] | None = None
    advantage: Tensor | Sequence[float] | None = None
    length: Tensor | Sequence[int] | None = None
    extra: Sequence[Mapping[str, Any] | None] | None = None

    def count(self, *more: object) -> int:
        """Number of entries of the first field that is given, or of what is given besides; 0 if there is none."""
        given = [*more, *(getattr(self, field.name) for field in fields(self))]
        return next((len(v) for v in given if hasattr(v, "__len__")), 0)

    def require_length(self, n_sequences: int) -> None:
        """Raise BatchError unless every given field has one entry per sequence."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if not hasattr(value, "__len__") or (isinstance(value, Tensor) and value.dim() == 0):
                raise BatchError(
                    f"Sequences: {field.name} is one {type(value).__name__} for {n_sequences} sequences, allowed is a "
                    "sequence. Give one entry per row of the batch."
                )
            if len(value) != n_sequences:
                raise BatchError(
                    f"Sequences: {field.name} has {len(value)} entries for {n_sequences} sequences. "
                    "Give one entry per row of the batch."
                )


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise BatchError(
            f"TokenBatch: {name} is a {type(value).__name__}, allowed is a torch.Tensor. Convert it first."
        )


def _require_matrix(name: str, value: Tensor) -> torch.Size:
    _require_tensor(name, value)
    if value.dim() != 2 or value.numel() == 0:
        raise BatchError(
            f"TokenBatch: {name} has shape {tuple(value.shape)}, allowed is a non-empty (B, T). "
            "Pad the responses into one rectangle."
        )
    return value.shape


def _expand_advantage(value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape == shape:
        return value
    if value.dim() == 1 and value.shape[0] == shape[0]:
        return value[:, None].expand(shape)
    raise BatchError(
        f"TokenBatch: advantage has shape {tuple(value.shape)}, allowed are {tuple(shape)} or ({shape[0]},). "
        "Give one value per token or one per sequence."
    )


def _boolean_mask(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BatchError("TokenBatch: mask holds values other than 0 and 1. Pass booleans, or zeros and ones.")
    return mask.bool()


def _pad_right(value: Tensor, width: int) -> Tensor:
    missing = width - value.shape[1]
    return value if missing == 0 else torch.nn.functional.pad(value, (0, missing))
