"""Objectives with a hard bound on the ratio, and importance sampling without one.

Bounds are compared in log space, so a ratio that overflows is on the right side of them. A ratio exactly on a bound
counts as inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.base import Objective, is_number


@dataclass(frozen=True)
class PpoClip(Objective):
    """J = min(r·A, clip(r, 1−eps_low, 1+eps_high)·A); PPO's bound, used per token by GRPO.

    The gradient is r·A inside the bounds and where the update pulls the ratio back, 0 where it would push it further
    out. For A < 0 and large r it is unbounded.

    Args:
        eps_low: lower half-width, in [0, 1). 0.2 in Schulman et al. 2017, TRL 1.16 and verl 0.9.1.
        eps_high: upper half-width, ≥ 0.

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; Shao et al. 2024, arXiv 2402.03300, eq. 3.
    """

    name: ClassVar[str] = "ppo_clip"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-mean"

    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self) -> None:
        numbers = is_number(self.eps_low) and is_number(self.eps_high)
        if not numbers or not 0 <= self.eps_low < 1 or not 0 <= self.eps_high < math.inf:
            raise ObjectiveError(
                f"{self.name}: eps_low = {self.eps_low!r}, eps_high = {self.eps_high!r}, allowed are 0 ≤ eps_low < 1 "
                "and finite eps_high ≥ 0. Change them in [objective]."
            )

    def evaluate(self, log_ratio: Tensor, exponent: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        above = log_ratio > math.log1p(self.eps_high)
        below = log_ratio < math.log1p(-self.eps_low)
        clipped_high, clipped_low = above & (advantage > 0), below & (advantage < 0)
        ratio = exponent.exp()
        bounded = torch.where(clipped_high, 1 + self.eps_high, torch.where(clipped_low, 1 - self.eps_low, ratio))
        return {
            "surrogate": torch.where(advantage == 0, torch.zeros_like(ratio), bounded * advantage),
            "gradient_multiplier": torch.where(clipped_high | clipped_low, torch.zeros_like(ratio), ratio),
            "clipped_low": clipped_low,
            "clipped_high": clipped_high,
            "out_of_range": above | below,
        }


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
class ImportanceSampling(Objective):
    """J = r·A, the policy gradient with an importance ratio and no bound; the baseline that collapses."""

    name: ClassVar[str] = "is_pg"
    canonical_aggregation: ClassVar[str] = "token-mean"

    def evaluate(self, log_ratio: Tensor, exponent: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        ratio = exponent.exp()
        return {
            "surrogate": torch.where(advantage == 0, torch.zeros_like(ratio), ratio * advantage),
            "gradient_multiplier": ratio,
        }
