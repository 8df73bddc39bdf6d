"""DPPO: a token trains while its probability, not its ratio, stays near the old one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.checks import require_number, require_positive
from mhpo_core.objectives.tokens import Tokens


@dataclass(frozen=True)
class DppoTv(Objective):
    """J = sg(w)·A·logp_new with w = min(r, ratio_cap) where p moved little in the direction of A, else 0.

    Kept are A > 0 with p − p_old ≤ delta_high and A ≤ 0 with p − p_old ≥ −delta_low.

    Args:
        delta_low, delta_high: largest change of the token's probability, ≥ 0.
        ratio_cap: > 0. verl's comment says 20, its script 10000, its effective default is 3.

    Source: arXiv 2602.04879; deltas of verl 0.9.1's script.
    """

    name: ClassVar[str] = "dppo_tv"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-sum-norm"

    delta_low: float = 0.15
    delta_high: float = 0.15
    ratio_cap: float = 20.0

    def __post_init__(self) -> None:
        require_number(self, "delta_low", low=0)
        require_number(self, "delta_high", low=0)
        require_positive(self, "ratio_cap")

    def keeps(self, tokens: Tokens) -> Tensor:
        """(B, T) bool: which tokens train."""
        # p − p_old without its cancellation, and with the small factor where p_old is small
        change = torch.where(
            tokens.log_ratio > 0,
            -tokens.logp_new.exp() * torch.expm1(-tokens.log_ratio),
            tokens.logp_old.exp() * torch.expm1(tokens.log_ratio),
        )
        return torch.where(tokens.advantage > 0, change <= self.delta_high, change >= -self.delta_low)

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        dropped = ~self.keeps(tokens)
        ratio = torch.where(tokens.log_ratio > math.log(self.ratio_cap), self.ratio_cap, tokens.exponent.exp())
        return tokens.score_function(torch.where(dropped & ~ratio.isnan(), 0.0, ratio)) | {
            "clipped_low": dropped & (tokens.advantage < 0),
            "clipped_high": dropped & (tokens.advantage > 0),
            "out_of_range": dropped,
        }


@dataclass(frozen=True)
class DppoKl(DppoTv):
    """DPPO with the token's Bernoulli KL(old‖new) as the distance; a move back towards old is always kept.

    Args:
        delta_low, delta_high: largest divergence for A ≤ 0 and A > 0, nats, ≥ 0. 0.05 in verl 0.9.1's script.
        ratio_cap: see DppoTv.
    """

    name: ClassVar[str] = "dppo_kl"

    delta_low: float = 0.05
    delta_high: float = 0.05

    def keeps(self, tokens: Tokens) -> Tensor:
        divergence = _bernoulli_kl(tokens.logp_old, tokens.logp_new)
        outward = torch.where(tokens.advantage > 0, tokens.log_ratio > 0, tokens.log_ratio < 0)
        near = torch.where(tokens.advantage > 0, divergence <= self.delta_high, divergence <= self.delta_low)
        return near | ~outward


def _bernoulli_kl(logp_old: Tensor, logp_new: Tensor) -> Tensor:
    """KL of Bernoulli(p_old) from Bernoulli(p_new), nats, ≥ 0; 1 − p is −expm1(log p), which keeps its digits."""
    # a log-probability a rounding error above 0 is a probability of 1
    rest_old, rest_new = -torch.expm1(logp_old.clamp(max=0)), -torch.expm1(logp_new.clamp(max=0))
    hit = torch.where(logp_old == -math.inf, 0.0, logp_old.exp() * (logp_old - logp_new))
    miss = torch.where(rest_old > 0, rest_old * (rest_old.log() - rest_new.log()), 0.0)
    return hit + miss
