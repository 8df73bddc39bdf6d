"""Objectives that stop the gradient at a bound of the token's ratio, and importance sampling without one.

Bounds are compared in log space, so a ratio that overflows is on the right side of them. A ratio exactly on a bound
counts as inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.checks import require_number
from mhpo_core.objectives.tokens import Tokens


@dataclass(frozen=True)
class ImportanceSampling(Objective):
    """J = r·A, the policy gradient with an importance ratio and no bound; the baseline that collapses."""

    name: ClassVar[str] = "is_pg"
    canonical_aggregation: ClassVar[str] = "token-mean"
    follows_from_ratio: ClassVar[bool] = True

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        ratio = tokens.exponent.exp()
        return {"surrogate": tokens.times_advantage(ratio), "gradient_multiplier": ratio}


@dataclass(frozen=True)
class PpoClip(Objective):
    """J = min(r·A, clip(r, 1−eps_low, 1+eps_high)·A); PPO's bound, used per token by GRPO.

    The gradient is r·A inside the bounds and where the update pulls the ratio back, 0 where it would push it further
    out. For A < 0 and large r it is unbounded.

    Args:
        eps_low: lower half-width, ≥ 0; from 1 on there is no lower bound.
        eps_high: upper half-width, ≥ 0. Both 0.2 in Schulman et al. 2017, TRL 1.16 and verl 0.9.1.

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; Shao et al. 2024, arXiv 2402.03300, eq. 3.
    """

    name: ClassVar[str] = "ppo_clip"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-mean"
    follows_from_ratio: ClassVar[bool] = True

    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self) -> None:
        require_band(self)

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return clipped_surrogate(tokens, tokens.log_ratio, self.eps_low, self.eps_high)


@dataclass(frozen=True)
class DapoClip(PpoClip):
    """PPO's bound with a higher upper half-width ("clip-higher"), averaged over all tokens of the batch.

    Source: Yu et al. 2025, arXiv 2503.14476, eq. 8.
    """

    name: ClassVar[str] = "dapo_clip"
    canonical_aggregation: ClassVar[str] = "token-mean"

    eps_low: float = 0.2
    eps_high: float = 0.28


@dataclass(frozen=True)
class DualClip(PpoClip):
    """PPO's bound, and for A < 0 also r ≤ dual_c: J = max(PPO, dual_c·A).

    Args:
        eps_low, eps_high: see PpoClip.
        dual_c: > 1. 3 in verl 0.9.1, whose `vanilla` loss always applies it.

    Source: Ye et al. 2020, arXiv 1912.09729.
    """

    name: ClassVar[str] = "dual_clip"
    canonical_aggregation: ClassVar[str] = "token-mean"

    dual_c: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "dual_c", above=1)

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return clipped_surrogate(tokens, tokens.log_ratio, self.eps_low, self.eps_high, self.dual_c)


@dataclass(frozen=True)
class TwoSidedClip(PpoClip):
    """J = min(min(r, delta)·A, clip(r)·A): PPO's bound, and r ≤ delta for A < 0.

    Args:
        eps_low, eps_high: see PpoClip.
        delta: > 0. 4 in TRL's paper index; off in TRL by default.

    Source: INTELLECT-2, arXiv 2505.07291.
    """

    name: ClassVar[str] = "two_sided_clip"
    canonical_aggregation: ClassVar[str] = "token-mean"

    delta: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "delta", above=0)

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        # a delta below 1 + eps_high is the tighter bound for A > 0, and none for A < 0
        high, cap = min(self.eps_high, self.delta - 1), max(self.delta, 1 + self.eps_high)
        return clipped_surrogate(tokens, tokens.log_ratio, self.eps_low, high, cap)


def clipped_surrogate(
    tokens: Tokens, log_ratio: Tensor, eps_low: float, eps_high: float, cap: float = math.inf
) -> dict[str, Tensor]:
    """Terms of min(r·A, clip(r, 1−eps_low, 1+eps_high)·A), with r ≤ cap where A < 0.

    Args:
        log_ratio: (B, T), of the token or of its sequence.
    """
    above = log_ratio > math.log1p(eps_high)
    below = log_ratio < (math.log1p(-eps_low) if eps_low < 1 else -math.inf)
    clipped_low = below & (tokens.advantage < 0)
    clipped_high = above & (tokens.advantage > 0)
    ratio = tokens.bounded_exp(log_ratio)
    bounded = torch.where(clipped_low, 1 - eps_low, torch.where(clipped_high, 1 + eps_high, ratio))
    if cap < math.inf:
        capped = (log_ratio > math.log(cap)) & (tokens.advantage < 0)
        bounded, clipped_high = torch.where(capped, cap, bounded), clipped_high | capped
    return {
        "surrogate": tokens.times_advantage(bounded),
        "gradient_multiplier": torch.where(clipped_low | clipped_high, 0.0, ratio),
        "clamped": tokens.overflows(log_ratio),
        "clipped_low": clipped_low,
        "clipped_high": clipped_high,
        "out_of_range": above | below,
    }


def require_band(objective: Objective) -> None:
    """Raise ObjectiveError unless both half-widths are finite and ≥ 0."""
    require_number(objective, "eps_low", low=0)
    require_number(objective, "eps_high", low=0)
