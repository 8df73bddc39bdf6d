"""Objectives that bound the geometric mean of a sequence's ratios.

Shape letters: B sequences, T response tokens; |y| trained tokens of a sequence. Every term is still (B, T): a
sequence's value stands at each of its tokens. With an advantage that differs within a sequence they train each token
by its own, as GSPO-token does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.checks import require_number
from mhpo_core.objectives.clipping import clipped_surrogate, require_band
from mhpo_core.objectives.tokens import Tokens


@dataclass(frozen=True)
class Gspo(Objective):
    """s = exp(mean_t log r); J = min(s·A, clip(s, 1−eps_low, 1+eps_high)·A) at every token; M = s, or 0 if clipped.

    Args:
        eps_low, eps_high: half-widths; bf16 and fp16 cannot represent them, the ratio is computed in float64.

    Source: Zheng et al. 2025, arXiv 2507.18071; TRL `importance_sampling_level="sequence"`. verl 0.9.1 averages over
    tokens by default, which is `aggregation="token-mean"` here.
    """

    name: ClassVar[str] = "gspo"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-mean"
    shares_gradient: ClassVar[bool] = True

    eps_low: float = 3e-4
    eps_high: float = 4e-4

    def __post_init__(self) -> None:
        require_band(self)

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return clipped_surrogate(tokens, tokens.sequence_mean(tokens.log_ratio), self.eps_low, self.eps_high)


@dataclass(frozen=True)
class Luspo(Gspo):
    """GSPO with each sequence weighed by its length: the mean over sequences of |y|·J.

    Source: LUSPO as in TRL 1.16.
    """

    name: ClassVar[str] = "luspo"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-sum"

    eps_low: float = 2e-3
    eps_high: float = 2.5e-3


@dataclass(frozen=True)
class Gmpo(Objective):
    """G = exp(mean_t of log r, clipped one-sidedly); J = G·A; M = G where the token was not clipped, else 0.

    log r is clipped at +eps_high where A > 0 and at −eps_low where A < 0; the other side is unbounded.

    Args:
        eps_low, eps_high: bounds of log r, nats, ≥ 0. verl 0.9.1 reuses clip_ratio = 0.2 unless set.

    Source: Zhao et al. 2025, arXiv 2507.20673.
    """

    name: ClassVar[str] = "gmpo"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-mean"
    shares_gradient: ClassVar[bool] = True

    eps_low: float = 0.4
    eps_high: float = 0.4

    def __post_init__(self) -> None:
        require_number(self, "eps_low", low=0)
        require_number(self, "eps_high", low=0)

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        above, below = tokens.log_ratio > self.eps_high, tokens.log_ratio < -self.eps_low
        clipped_high, clipped_low = above & (tokens.advantage > 0), below & (tokens.advantage < 0)
        bounded = torch.where(
            clipped_high, self.eps_high, torch.where(clipped_low, -self.eps_low, tokens.log_ratio)
        ).masked_fill(~tokens.mask, 0.0)
        log_geometric = tokens.sequence_mean(bounded)
        geometric = tokens.bounded_exp(log_geometric)
        return {
            "surrogate": tokens.times_advantage(geometric),
            "gradient_multiplier": torch.where(clipped_high | clipped_low, 0.0, geometric),
            "clamped": tokens.overflows(log_geometric),
            "clipped_low": clipped_low,
            "clipped_high": clipped_high,
            "out_of_range": above | below,
        }
