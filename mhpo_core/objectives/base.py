"""What every objective shares: one safe way from a token batch to terms and to a differentiable loss.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from mhpo_core.batch import TokenBatch
from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.aggregation import aggregate

# exp(x) leaves the float32 range above 88.7228 and the float64 range above 709.7827.
LARGEST_EXPONENT = {torch.float32: 88.72, torch.float64: 709.78}


@dataclass(frozen=True)
class Terms:
    """Per-token terms of an objective, all (B, T), without a graph; masked positions hold 0 (False).

    Args:
        log_ratio: logp_new − logp_old, nats; positive = now more likely. Never clamped.
        surrogate: J, the value that is maximised, reward units.
        gradient_multiplier: ∂J/∂logp_new ÷ advantage with stop-gradients frozen.
        clamped: the ratio was too large for the dtype and was evaluated at the largest exponent it can hold.
        modulated_log_ratio: ψ, nats (MHPO).
        hazard_positive, hazard_negative: the two parts of the cumulative hazard ζ, ≥ 0 (MHPO).
        survival_weight: exp(−ζ), in (0, 1] (MHPO).
        clipped_low, clipped_high: the lower or upper bound really binds, that is it stops the gradient.
        out_of_range: the ratio is outside the bounds, whatever the sign of the advantage.
    """

    log_ratio: Tensor
    surrogate: Tensor
    gradient_multiplier: Tensor
    clamped: Tensor
    modulated_log_ratio: Tensor | None = None
    hazard_positive: Tensor | None = None
    hazard_negative: Tensor | None = None
    survival_weight: Tensor | None = None
    clipped_low: Tensor | None = None
    clipped_high: Tensor | None = None
    out_of_range: Tensor | None = None

    @property
    def hazard(self) -> Tensor | None:
        """ζ = hazard_positive + hazard_negative, or None where the objective has no hazard."""
        if self.hazard_positive is None or self.hazard_negative is None:
            return None
        return self.hazard_positive + self.hazard_negative


@dataclass(frozen=True)
class Objective(ABC):
    """A token-level ratio-control objective; its hyperparameters are its dataclass fields.

    A subclass gives the surrogate and the gradient multiplier in closed form. The loss has the value of the one and
    the gradient of the other, so it is exact and meets none of the overflow that autograd meets in exp, tanh and clip.
    """

    name: ClassVar[str]
    canonical_aggregation: ClassVar[str]

    @abstractmethod
    def evaluate(self, log_ratio: Tensor, exponent: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        """Closed-form terms at every position.

        Args:
            log_ratio: (B, T) in float32 or float64, 0 at masked positions.
            exponent: log_ratio clamped to what exp can hold in this dtype.
            advantage: (B, T), 0 at masked positions.

        Returns:
            fields of Terms, `surrogate` and `gradient_multiplier` at least.
        """

    @torch.no_grad()
    def terms(self, batch: TokenBatch) -> Terms:
        """Per-token terms of the batch, without a graph.

        Computed in float32, or in float64 where a log-probability is float64. Masked positions are overwritten
        before anything is computed from them, so a NaN there stays there.
        """
        dtype = _compute_dtype(batch)
        zero = torch.zeros((), dtype=dtype, device=batch.logp_new.device)
        log_ratio = torch.where(batch.mask, batch.logp_new.to(dtype) - batch.logp_old.to(dtype), zero)
        advantage = torch.where(batch.mask, batch.advantage.to(dtype), zero)
        limit = LARGEST_EXPONENT[dtype]
        found = self.evaluate(log_ratio, log_ratio.clamp(-limit, limit), advantage)
        found = {
            name: torch.where(batch.mask, v, torch.zeros((), dtype=v.dtype, device=v.device))
            for name, v in found.items()
        }
        return Terms(log_ratio=log_ratio, clamped=log_ratio > limit, **found)

    def loss(self, batch: TokenBatch, aggregation: str | None = None, loss_scale: float | None = None) -> Tensor:
        """loss = −aggregate(J), differentiable in batch.logp_new.

        Args:
            batch: the tokens; only logp_new receives a gradient.
            aggregation: see `aggregate`; default is the objective's canonical one.
            loss_scale: the constant length of seq-mean-token-sum-norm.

        Returns:
            scalar tensor, reward units.
        """
        terms = self.terms(batch)
        logp = torch.where(batch.mask, batch.logp_new.to(terms.surrogate.dtype), torch.zeros_like(terms.surrogate))
        slope = terms.gradient_multiplier * torch.where(batch.mask, batch.advantage, 0).to(logp.dtype)
        surrogate = _WithSlope.apply(terms.surrogate, slope, logp)  # type: ignore[no-untyped-call]
        return -aggregate(surrogate, batch.mask, aggregation or self.canonical_aggregation, loss_scale)

    def on_policy_terms(self) -> dict[str, float]:
        """The terms of a token with ratio 1 and advantage 1: the baseline every plot of them needs."""
        one, zero = torch.ones((1, 1), dtype=torch.float64), torch.zeros((1, 1), dtype=torch.float64)
        terms = self.terms(TokenBatch(logp_new=zero, logp_old=zero, advantage=one, mask=one.bool()))
        found = {f.name: getattr(terms, f.name) for f in fields(terms)} | {"hazard": terms.hazard}
        return {name: float(v) for name, v in found.items() if v is not None}

    def hyperparameters(self) -> dict[str, Any]:
        """Field names and values."""
        return asdict(self)


class _WithSlope(torch.autograd.Function):
    """The given value with the given gradient; value + slope · (logp − logp) is NaN where either is infinite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor, logp: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, None, gradients[0] * slope


def is_number(value: object) -> bool:
    """True for a Python int or float, NaN and ±Inf too; False for a bool, which is an int to Python only."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_positive(objective: Objective, *names: str) -> None:
    """Raise ObjectiveError unless the named hyperparameters are finite and > 0."""
    for name in names:
        value = getattr(objective, name)
        if not is_number(value) or not 0 < value < float("inf"):
            raise ObjectiveError(
                f"{objective.name}: {name} = {value!r}, allowed are finite numbers > 0. Change it in [objective]."
            )


def _compute_dtype(batch: TokenBatch) -> torch.dtype:
    doubles = torch.float64 in (batch.logp_new.dtype, batch.logp_old.dtype)
    return torch.float64 if doubles else torch.float32
