"""Objectives around an objective: whole sequences dropped, or every token weighed by the engine mismatch.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.checks import require_number, require_positive, require_ratio_range
from mhpo_core.objectives.clipping import ImportanceSampling, PpoClip
from mhpo_core.objectives.tokens import Tokens, product


@dataclass(frozen=True)
class Wrapper(Objective):
    """An objective that changes the terms of the one inside it.

    Args:
        base: the objective inside. `create` also takes its name, and then its hyperparameters beside the wrapper's.
    """

    canonical_aggregation: ClassVar[str] = "seq-mean-token-mean"

    base: Objective = field(default_factory=PpoClip)

    @classmethod
    def default_base(cls) -> str:
        """Name of the objective inside when none is given."""
        return next(f.default_factory.name for f in fields(cls) if f.name == "base")  # type: ignore[union-attr]

    def __post_init__(self) -> None:
        if not isinstance(self.base, Objective):
            raise ObjectiveError(
                f"{self.name}: base = {self.base!r}, allowed are objectives and, in create and [objective], the names "
                "of objectives. Change it in [objective]."
            )

    def hyperparameters(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "base"}
        return {"base": {"name": self.base.name, **self.base.hyperparameters()}, **own}


@dataclass(frozen=True)
class SequenceMask(Wrapper):
    """Drops whole sequences: surrogate and multiplier of their tokens are 0, but they still count in the averages."""

    @abstractmethod
    def keeps(self, tokens: Tokens) -> Tensor:
        """(B, T) bool: which tokens train; NaN statistics keep the sequence, so that the NaN shows."""

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        terms = self.base.evaluate(tokens)
        kept = self.keeps(tokens)
        return terms | {name: torch.where(kept, terms[name], 0.0) for name in ("surrogate", "gradient_multiplier")}


@dataclass(frozen=True)
class OffPolicyMask(SequenceMask):
    """OPSM: drops a sequence with A < 0 whose mean(logp_old − logp_new) exceeds kl_threshold.

    Args:
        base: see Wrapper.
        kl_threshold: nats, ≥ 0. 0.5 in TRL's documentation; Trinity found 0.05 to 0.2.

    Source: DeepSeek-V3.2; TRL 1.16 `off_policy_mask_threshold`.
    """

    name: ClassVar[str] = "opsm_ppo"

    kl_threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "kl_threshold", low=0)

    def keeps(self, tokens: Tokens) -> Tensor:
        return (tokens.advantage >= 0) | ~(-tokens.sequence_mean(tokens.log_ratio) > self.kl_threshold)


@dataclass(frozen=True)
class TrustRegionMask(SequenceMask):
    """TRM: drops a sequence whose divergence, estimated from its sampled tokens, exceeds threshold.

    Args:
        base: see Wrapper; without a bound of its own by default, the mask is the bound.
        threshold: nats, ≥ 0.

    Source: arXiv 2512.23075, whose own criterion is the true token KL or TV; verl 0.9.1 `seq_max_k2`, `seq_mean_k3`.
    """

    base: Objective = field(default_factory=ImportanceSampling)
    threshold: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "threshold", low=0)

    def keeps(self, tokens: Tokens) -> Tensor:
        return ~(self.divergence(tokens) > self.threshold)

    @abstractmethod
    def divergence(self, tokens: Tokens) -> Tensor:
        """(B, T), nats, the sequence's at each of its positions."""


@dataclass(frozen=True)
class TrustRegionMaxK2(TrustRegionMask):
    """TRM by the largest (log r)²/2 of the sequence."""

    name: ClassVar[str] = "trm_max_k2"

    def divergence(self, tokens: Tokens) -> Tensor:
        k2 = tokens.log_ratio.square() / 2
        return k2.amax(dim=1, keepdim=True).expand_as(k2)


@dataclass(frozen=True)
class TrustRegionMeanK3(TrustRegionMask):
    """TRM by the mean of r − 1 − log r over the sequence."""

    name: ClassVar[str] = "trm_mean_k3"

    threshold: float = 0.12

    def divergence(self, tokens: Tokens) -> Tensor:
        return tokens.sequence_mean(torch.expm1(tokens.exponent) - tokens.log_ratio)


@dataclass(frozen=True)
class Decoupled(Wrapper):
    """J = w·J_base with w a function of ρ = π_old/π_rollout, the engine mismatch; w has no gradient.

    Needs logp_rollout in the batch. Aggregates as its base does.

    Args:
        base: see Wrapper.
        mode: "token" or "sequence" (ρ of the token, or the product over its sequence), and how ρ becomes w:
            …_truncate w = min(ρ, clip_max) · …_mask w = ρ·1[ρ ≤ clip_max] · …_mask_two_sided
            w = ρ·1[clip_min ≤ ρ ≤ clip_max].
        clip_max: > 0. 3 in TRL 1.16, whose default mode is sequence_mask.
        clip_min: ≤ clip_max, for the two-sided modes; None, or 0 or less, for no lower bound. Not used by the others.

    Source: TRL 1.16 `vllm_importance_sampling_*`; verl 0.9.1 `rollout_is`.
    """

    name: ClassVar[str] = "decoupled"

    mode: str = "token_truncate"
    clip_max: float = 3.0
    clip_min: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise ObjectiveError(
                f"{self.name}: mode = {self.mode!r}, allowed are {', '.join(_MODES)}. Change it in [objective]."
            )
        require_positive(self, "clip_max")
        if self.mode.endswith("two_sided"):
            require_ratio_range(self, "clip_min", "clip_max")
        elif self.clip_min is not None:
            require_number(self, "clip_min")
        # a weight changes nothing about how an objective is averaged
        object.__setattr__(self, "canonical_aggregation", self.base.canonical_aggregation)

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        if tokens.log_mismatch is None:
            raise ObjectiveError(
                "decoupled: the batch has no logp_rollout, the mismatch weight needs it. Pass it in TokenBatch."
            )
        terms, weight = self.base.evaluate(tokens), self.weight(tokens)
        # where J is shared, a token's gradient comes from the J of every token of its sequence
        reach = tokens.sequence_mean(weight) if shares_gradient(self.base) else weight
        return terms | {
            "surrogate": _weighed(terms["surrogate"], weight),
            "gradient_multiplier": _weighed(terms["gradient_multiplier"], reach),
        }

    def weight(self, tokens: Tokens) -> Tensor:
        """w, (B, T), 0 at masked positions; compared in log space, so an infinite ρ is truncated or masked."""
        log_rho = tokens.log_mismatch
        assert log_rho is not None
        if self.mode.startswith("sequence"):
            log_rho = tokens.sequence_sum(log_rho)
        above = log_rho > math.log(self.clip_max)
        weight = torch.where(above, self.clip_max, log_rho.clamp(max=math.log(self.clip_max)).exp())
        outside = ~tokens.mask
        if "mask" in self.mode:
            outside = outside | above
        if self.mode.endswith("two_sided") and self.clip_min is not None and self.clip_min > 0:
            outside = outside | (log_rho < math.log(self.clip_min))
        return torch.where(outside, 0.0, weight)


_MODES = tuple(f"{level}_{kind}" for level in ("token", "sequence") for kind in ("truncate", "mask", "mask_two_sided"))


def shares_gradient(objective: Objective) -> bool:
    """Whether J at one token depends on the whole sequence, for an objective or the innermost one it wraps."""
    return shares_gradient(objective.base) if isinstance(objective, Wrapper) else objective.shares_gradient


def _weighed(values: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, product(values, weight))
