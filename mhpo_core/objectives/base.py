"""What every objective shares: one safe way from a token batch to terms and to a differentiable loss.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mhpo_core.batch import TokenBatch
from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.aggregation import aggregate
from mhpo_core.objectives.tokens import Tokens


@dataclass(frozen=True)
class Terms:
    """Per-token terms of an objective, all (B, T), without a graph; masked positions hold 0 (False).

    Args:
        log_ratio: logp_new − logp_old, nats; positive = now more likely. Never clamped.
        surrogate: J, the value that is maximised, reward units.
        gradient_multiplier: M = ∂J/∂logp_new ÷ advantage with stop-gradients frozen. Of a sequence-level objective it
            is the multiplier under the objective's canonical aggregation.
        clamped: the ratio does not fit the dtype of these terms; what does not is its largest finite value.
        modulated_log_ratio: ψ, nats (MHPO).
        hazard_positive, hazard_negative: the two parts of the cumulative hazard ζ, ≥ 0 (MHPO).
        survival_weight: exp(−ζ), in (0, 1] (MHPO).
        clipped_low, clipped_high: the lower or upper bound really binds, that is it changes or stops the gradient.
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


_TERMS = frozenset(f.name for f in fields(Terms))


@dataclass(frozen=True)
class Objective(ABC):
    """A ratio-control objective; its hyperparameters are its dataclass fields.

    A subclass gives the surrogate and the gradient multiplier in closed form. The loss has the value of the one and
    the gradient of the other, so it is exact and meets none of the overflow that autograd meets in exp, tanh and clip.
    Where no closed form is at hand, derive from `AutogradObjective`.

    Attributes:
        name: how `create` and a recorded run call it.
        canonical_aggregation: what `loss` uses unless told otherwise.
        shares_gradient: J at one token depends on the log-probabilities of its whole sequence (GSPO), so a weight on
            J reaches every token of the sequence.
        follows_from_ratio: the terms other than J depend on the token's own ratio and the sign of its advantage alone,
            so they follow from a histogram of log-ratios.
    """

    name: ClassVar[str]
    canonical_aggregation: ClassVar[str]
    shares_gradient: ClassVar[bool] = False
    follows_from_ratio: ClassVar[bool] = False

    @abstractmethod
    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        """Closed-form terms at every position.

        Returns:
            fields of Terms, `surrogate` and `gradient_multiplier` at least, each (B, T). What stands at masked
            positions does not matter.
        """

    def terms(self, batch: TokenBatch) -> Terms:
        """Per-token terms of the batch, without a graph, float32, or float64 where a log-probability is float64.

        What does not fit that dtype is its largest finite value, and counted in `clamped` if it is the ratio.
        """
        return self.rounded_terms(Tokens.of(batch))

    @torch.no_grad()
    def rounded_terms(self, tokens: Tokens) -> Terms:
        """`terms` of tokens in a dtype of one's choice."""
        found = self._exact_terms(tokens)
        rounded = {n: _rounded(v, tokens.result_dtype) if v.is_floating_point() else v for n, v in found.items()}
        return Terms(log_ratio=tokens.log_ratio.to(tokens.result_dtype), **rounded)

    def _exact_terms(self, tokens: Tokens) -> dict[str, Tensor]:
        found = {"clamped": tokens.too_large} | self.evaluate(tokens)
        self._require_terms(found, tokens.log_ratio.shape)
        return {name: torch.where(tokens.mask, v, torch.zeros_like(v)) for name, v in found.items()}

    def _require_terms(self, found: dict[str, Tensor], shape: torch.Size) -> None:
        wrong = [f"{name} {tuple(v.shape)}" for name, v in found.items() if v.shape != shape or name not in _TERMS]
        missing = {"surrogate", "gradient_multiplier"} - set(found)
        if wrong or missing:
            given = ", ".join(wrong) or " and ".join(f"no {name}" for name in sorted(missing))
            raise ObjectiveError(
                f"{self.name}: evaluate gave {given}, allowed are "
                f"surrogate, gradient_multiplier and other fields of Terms, each {tuple(shape)}. Correct its class."
            )

    def loss(self, batch: TokenBatch, aggregation: str | None = None, loss_scale: float | None = None) -> Tensor:
        """loss = −aggregate(J), differentiable in batch.logp_new.

        Args:
            batch: the tokens; only logp_new receives a gradient.
            aggregation: see `aggregate`; default is the objective's canonical one.
            loss_scale: the constant length of seq-mean-token-sum-norm.

        Returns:
            scalar tensor, reward units.
        """
        with torch.no_grad():
            tokens = Tokens.of(batch)
            terms = self._exact_terms(tokens)
            slope = tokens.times_advantage(terms["gradient_multiplier"])
        logp = torch.where(batch.mask, batch.logp_new.to(tokens.result_dtype), 0.0)
        surrogate = _WithSlope.apply(terms["surrogate"], slope, logp)  # type: ignore[no-untyped-call]
        mode = aggregation or self.canonical_aggregation
        total = -aggregate(surrogate, batch.mask, mode, loss_scale)
        if total.dtype == tokens.result_dtype:
            return total
        value = _rounded(total.detach(), tokens.result_dtype)
        loss: Tensor = _WithSlope.apply(value, torch.ones_like(value), total)  # type: ignore[no-untyped-call]
        return loss

    def on_policy_terms(self) -> dict[str, float]:
        """The terms of a token with ratio 1 and advantage 1: the baseline every plot of them needs."""
        one, zero = torch.ones((1, 1), dtype=torch.float64), torch.zeros((1, 1), dtype=torch.float64)
        terms = self.terms(TokenBatch(zero, zero, advantage=one, mask=one.bool(), logp_rollout=zero))
        found = {f.name: getattr(terms, f.name) for f in fields(terms)} | {"hazard": terms.hazard}
        return {name: float(v) for name, v in found.items() if v is not None}

    @cached_property
    def on_policy_multiplier(self) -> float:
        """M of a token with ratio 1: divide gradient norms by it before comparing them with another objective's."""
        return self.on_policy_terms()["gradient_multiplier"]

    def hyperparameters(self) -> dict[str, Any]:
        """Field names and values; `create(name, **hyperparameters)` gives the same objective."""
        return asdict(self)


class AutogradObjective(Objective):
    """An objective given by its surrogate alone; autograd finds the multiplier, with autograd's accuracy and overflow.

    Meant for trying out an idea. A closed form in `Objective.evaluate` keeps its digits in the tails. A surrogate that
    depends on whole sequences needs one advantage per sequence.
    """

    @abstractmethod
    def surrogate(self, tokens: Tokens) -> Tensor:
        """J at every position, (B, T), differentiable in tokens.log_ratio; use tokens.exponent inside exp."""

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        # the multiplier is also defined where the advantage is 0
        given, flat = tokens.advantage, torch.ones_like(tokens.advantage)
        value, slope = self._with_slope(tokens, given)
        at_zero = self._with_slope(tokens, flat)[1]
        return {
            "surrogate": torch.where(given == 0, 0.0, value),
            "gradient_multiplier": torch.where(given == 0, at_zero, slope / torch.where(given == 0, 1.0, given)),
        }

    def _with_slope(self, tokens: Tokens, advantage: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = tokens.logp_new.clone().requires_grad_()
            value = self.surrogate(tokens.along(leaf, advantage))
            self._require_terms({"surrogate": value, "gradient_multiplier": leaf}, leaf.shape)
            (slope,) = torch.autograd.grad(torch.where(tokens.mask, value, 0.0).sum(), leaf)
        return value.detach(), slope


class _WithSlope(torch.autograd.Function):
    """The given value with the given gradient; value + slope · (logp − logp) is NaN where either is infinite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor, logp: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = logp.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, None, _rounded(gradients[0] * slope, ctx.dtype)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in this dtype; a finite value beyond its range becomes its largest one, ±Inf and NaN stay."""
    largest = torch.finfo(dtype).max
    if largest >= torch.finfo(values.dtype).max:
        return values.to(dtype)
    return torch.where(values.isfinite(), values.clamp(-largest, largest), values).to(dtype)
