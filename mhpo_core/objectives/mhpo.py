"""MHPO: the Log-Fidelity Modulator and the Decoupled Hazard Penalty.

The formulas come from two public secondary sources that agree with each other (a paper note and the verl fork
hope586/verl @5cc426a), because the authors have published no code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhpo_core.objectives.base import Objective, require_positive


@dataclass(frozen=True)
class Mhpo(Objective):
    """J = exp(ψ − sg(ζ))·A with ψ = c·tanh(log r / c), ζ = (s(ψ)/λ₊)^k₊ + (s(−ψ)/λ₋)^k₋, s = softplus.

    The gradient multiplier is M = exp(ψ − ζ)·sech²(log r / c), whatever the sign of the advantage. At ratio 1 it is
    0.265 with the defaults, not 1, because softplus(0) = ln 2: compare gradient norms with other objectives only
    after dividing by it.

    Args:
        c: half-width of the modulator, nats, > 0.
        k_pos, lambda_pos: Weibull shape and scale of the hazard of positive shifts, > 0.
        k_neg, lambda_neg: the same for negative shifts, > 0.

    Source: Wang et al. 2026, arXiv 2603.16929 (see the head of this file).
    """

    name: ClassVar[str] = "mhpo"
    canonical_aggregation: ClassVar[str] = "seq-mean-token-mean"

    c: float = 1.5
    k_pos: float = 1.5
    lambda_pos: float = 1.0
    k_neg: float = 2.0
    lambda_neg: float = 0.8

    def __post_init__(self) -> None:
        require_positive(self, "c", "k_pos", "lambda_pos", "k_neg", "lambda_neg")

    def evaluate(self, log_ratio: Tensor, exponent: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        modulated = self.c * torch.tanh(log_ratio / self.c)
        hazard_positive = (_softplus(modulated) / self.lambda_pos) ** self.k_pos
        hazard_negative = (_softplus(-modulated) / self.lambda_neg) ** self.k_neg
        log_weight = modulated - hazard_positive - hazard_negative
        return {
            "surrogate": log_weight.exp() * advantage,
            "gradient_multiplier": (log_weight + _log_sech_squared(log_ratio / self.c)).exp(),
            "modulated_log_ratio": modulated,
            "hazard_positive": hazard_positive,
            "hazard_negative": hazard_negative,
            "survival_weight": (-hazard_positive - hazard_negative).exp(),
        }


def _softplus(value: Tensor) -> Tensor:
    # torch's softplus switches to the identity above 20, which is off by 2e-9 there
    return value.clamp(min=0) + torch.log1p(torch.exp(-value.abs()))


def _log_sech_squared(value: Tensor) -> Tensor:
    # 1 − tanh² loses every digit above 14 in float32; this keeps them all
    double = 2 * value.abs()
    return math.log(4) - double - 2 * torch.log1p(torch.exp(-double))
