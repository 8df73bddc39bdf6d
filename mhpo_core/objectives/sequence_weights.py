"""Score-function objectives weighed by the importance ratio of the whole sequence.

J = stop_gradient(w)·A·logp_new with w a function of W = exp(Σ_t log r), kept in log space, or of its geometric mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.checks import require_positive, require_ratio_range
from mhpo_core.objectives.score_function import masked, truncated
from mhpo_core.objectives.tokens import Tokens


@dataclass(frozen=True)
class Vespo(Objective):
    """w = φ(W) = e^λ·W^k·e^(−λW), with (k, λ) by the sign of A; A ≥ 0 is positive.

    Args:
        k_pos, lambda_pos, k_neg, lambda_neg: > 0; φ peaks at W = k/λ.

    Source: VESPO as in TRL 1.16, which clamps log W to [log 1e-8, 20]; not clamped here.
    """

    name: ClassVar[str] = "vespo"
    canonical_aggregation: ClassVar[str] = "token-mean"

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        require_positive(self, "k_pos", "lambda_pos", "k_neg", "lambda_neg")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        # φ is 0 long before W = e^80; at an infinite W it would be Inf − Inf
        log_w = tokens.sequence_sum(tokens.log_ratio).clamp(max=80)
        negative = tokens.advantage < 0
        k = torch.full_like(log_w, self.k_pos).masked_fill(negative, self.k_neg)
        scale = torch.full_like(log_w, self.lambda_pos).masked_fill(negative, self.lambda_neg)
        log_weight = k * log_w - scale * torch.expm1(log_w)
        return tokens.score_function(log_weight.exp())


@dataclass(frozen=True)
class SequenceTis(Objective):
    """w = min(W, ratio_max).

    Args:
        ratio_max: > 0.
    """

    name: ClassVar[str] = "seq_tis"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-sum"

    ratio_max: float = 2.0

    def __post_init__(self) -> None:
        require_positive(self, "ratio_max")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return truncated(tokens, tokens.sequence_sum(tokens.log_ratio), None, self.ratio_max)


@dataclass(frozen=True)
class SequenceMis(Objective):
    """w = W inside [ratio_min, ratio_max], 0 outside.

    Args:
        ratio_min, ratio_max: bounds of the ratio; None, or a ratio_min ≤ 0, for none.
    """

    name: ClassVar[str] = "seq_mis"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-sum"

    ratio_min: float | None = 0.5
    ratio_max: float | None = 2.0

    def __post_init__(self) -> None:
        require_ratio_range(self, "ratio_min", "ratio_max")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return masked(tokens, tokens.sequence_sum(tokens.log_ratio), self.ratio_min, self.ratio_max)


@dataclass(frozen=True)
class GeometricMis(SequenceMis):
    """w = 1 where exp(mean_t log r) lies inside [ratio_min, ratio_max], else 0: kept or rejected, never weighed.

    verl 0.9.1's `rollout_rs="seq_mean_k1"` compares −log r, so its bounds act on 1/ratio.
    """

    name: ClassVar[str] = "geo_mis"

    ratio_min: float | None = 0.9
    ratio_max: float | None = 1.3

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        terms = masked(tokens, tokens.sequence_mean(tokens.log_ratio), self.ratio_min, self.ratio_max)
        kept = (~terms["out_of_range"]).to(tokens.log_ratio.dtype)
        return terms | tokens.score_function(torch.where(terms["gradient_multiplier"].isnan(), torch.nan, kept))
