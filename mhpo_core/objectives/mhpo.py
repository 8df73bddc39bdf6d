"""MHPO: the Log-Fidelity Modulator (LFM) and the Decoupled Hazard Penalty (DHP), its ablations and a variant.

The formulas come from two public secondary sources that agree with each other (a paper note and the verl fork
hope586/verl @5cc426a), because the authors have published no code. "DHP only" is our reading: no source defines it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mhpo_core.batch import TokenBatch
from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.checks import require_positive
from mhpo_core.objectives.mhpo_facts import MhpoFacts, facts
from mhpo_core.objectives.tokens import Tokens


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
    follows_from_ratio: ClassVar[bool] = True

    c: float = 1.5
    k_pos: float = 1.5
    lambda_pos: float = 1.0
    k_neg: float = 2.0
    lambda_neg: float = 0.8

    def __post_init__(self) -> None:
        require_positive(self, "c", "k_pos", "lambda_pos", "k_neg", "lambda_neg")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        modulated = self.modulated(tokens.log_ratio)
        positive, negative = self.hazards(modulated)
        log_weight = modulated - positive - negative
        return {
            "surrogate": tokens.times_advantage(tokens.bounded_exp(log_weight)),
            "gradient_multiplier": tokens.bounded_exp(log_weight + self.log_slope(tokens.log_ratio)),
            **_hazard_terms(modulated, positive, negative),
        }

    def modulated(self, log_ratio: Tensor) -> Tensor:
        """ψ, nats."""
        return self.c * torch.tanh(log_ratio / self.c)

    def log_slope(self, log_ratio: Tensor) -> Tensor:
        """log ∂ψ/∂log r ≤ 0."""
        return _log_sech_squared(log_ratio / self.c)

    def hazards(self, modulated: Tensor) -> tuple[Tensor, Tensor]:
        """ζ₊ and ζ₋ of ψ, ≥ 0."""
        positive = _power(_softplus(modulated) / self.lambda_pos, self.k_pos)
        return positive, _power(_softplus(-modulated) / self.lambda_neg, self.k_neg)

    def hazard_slope(self, modulated: Tensor) -> Tensor:
        """∂ζ/∂ψ."""
        rise = _hazard_rate(modulated, self.k_pos, self.lambda_pos)
        return rise - _hazard_rate(-modulated, self.k_neg, self.lambda_neg)

    def explain(self) -> MhpoFacts:
        """The numbers that follow from these hyperparameters, computed."""

        def hazard_slope(log_ratio: Tensor) -> Tensor:
            return self.hazard_slope(self.modulated(log_ratio))

        return facts(self._multiplier, hazard_slope, self.c, self.on_policy_terms().get("hazard"))

    def _multiplier(self, log_ratio: Tensor) -> Tensor:
        row = log_ratio[None]
        batch = TokenBatch(row, torch.zeros_like(row), torch.ones_like(row), torch.ones_like(row))
        return self.terms(batch).gradient_multiplier[0]


@dataclass(frozen=True)
class MhpoLfmOnly(Mhpo):
    """MHPO without the hazard: J = exp(ψ)·A, M = exp(ψ)·sech²(log r / c).

    Args:
        c: see Mhpo; the other four have no effect.
        dhp: False, as the name says.
    """

    name: ClassVar[str] = "mhpo_lfm_only"

    dhp: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_false(self, "dhp")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        modulated = self.modulated(tokens.log_ratio)
        return {
            "surrogate": tokens.times_advantage(tokens.bounded_exp(modulated)),
            "gradient_multiplier": tokens.bounded_exp(modulated + self.log_slope(tokens.log_ratio)),
            "modulated_log_ratio": modulated,
        }

    def hazard_slope(self, modulated: Tensor) -> Tensor:
        return torch.zeros_like(modulated)


@dataclass(frozen=True)
class MhpoDhpOnly(Mhpo):
    """MHPO without the modulator, ψ = log r: J = exp(log r − sg(ζ))·A, M = exp(log r − ζ). Our reading.

    Args:
        c: no effect; the other four see Mhpo.
        lfm: False, as the name says.
    """

    name: ClassVar[str] = "mhpo_dhp_only"

    lfm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_false(self, "lfm")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        terms, shift = super().evaluate(tokens), tokens.log_ratio
        return terms | _hazard_terms(shift, *self.hazards(shift))

    def modulated(self, log_ratio: Tensor) -> Tensor:
        # an infinite shift would be Inf − Inf in the weight
        limit = torch.finfo(log_ratio.dtype).max ** 0.25
        return log_ratio.clamp(-limit, limit)

    def log_slope(self, log_ratio: Tensor) -> Tensor:
        return torch.zeros_like(log_ratio)


@dataclass(frozen=True)
class MhpoNoStopgrad(Mhpo):
    """MHPO with the gradient through ζ: M = exp(ψ − ζ)·(1 − ζ′(ψ))·sech², negative beyond log r = 1.218.

    Args:
        c, k_pos, lambda_pos, k_neg, lambda_neg: see Mhpo.
        stop_grad: False, as the name says.
    """

    name: ClassVar[str] = "mhpo_no_stopgrad"

    stop_grad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_false(self, "stop_grad")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        terms = super().evaluate(tokens)
        slope = self.hazard_slope(terms["modulated_log_ratio"])
        return terms | {"gradient_multiplier": terms["gradient_multiplier"] * (1 - slope)}


@dataclass(frozen=True)
class MhpoSignAware(Mhpo):
    """**Experimental, and ours, not the paper's**: the hazard acts only where the update pushes the ratio further out.

    Where A·log r ≥ 0 it is MHPO. Where the update pulls the ratio back, A·log r < 0, the hazard stays at its on-policy
    value and the modulator bounds the weight without flattening it: J = sg(w)·A·exp(logp − sg(logp)), M = w with
    w = exp(ψ − ζ(0)). M is continuous at ratio 1. Plain MHPO damps corrective moves as much as harmful ones and learns
    less where a batch is used many times.

    Args:
        c, k_pos, lambda_pos, k_neg, lambda_neg: see Mhpo.
    """

    name: ClassVar[str] = "mhpo_sa"

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        terms = super().evaluate(tokens)
        modulated = terms["modulated_log_ratio"]
        positive, negative = self.hazards(torch.zeros_like(modulated))
        weight = tokens.bounded_exp(modulated - positive - negative)
        corrective = {
            "surrogate": tokens.times_advantage(weight),
            "gradient_multiplier": weight,
            **_hazard_terms(modulated, positive, negative),
        }
        pulls_back = tokens.advantage * tokens.log_ratio < 0
        return {name: torch.where(pulls_back, corrective[name], values) for name, values in terms.items()}


def _hazard_terms(modulated: Tensor, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
    return {
        "modulated_log_ratio": modulated,
        "hazard_positive": positive,
        "hazard_negative": negative,
        "survival_weight": (-positive - negative).exp(),
    }


def _require_false(objective: Mhpo, name: str) -> None:
    if getattr(objective, name) is not False:
        raise ObjectiveError(
            f"{objective.name}: {name} = {getattr(objective, name)!r}, allowed is False. "
            "Take the objective mhpo to have both parts and the stop-gradient."
        )


def _softplus(value: Tensor) -> Tensor:
    # torch's softplus switches to the identity above 20, which is off by 2e-9 there
    return value.clamp(min=0) + torch.log1p(torch.exp(-value.abs()))


def _hazard_rate(value: Tensor, k: float, scale: float) -> Tensor:
    """∂/∂value of (softplus(value)/scale)^k, in log space: for k < 1 it is 0^(k−1)·0 far below 0."""
    # softplus(v) and sigmoid(v) are e^v to all digits there
    log_softplus = torch.where(value < -40, value, _softplus(value.clamp(min=-40)).log())
    return k / scale * ((k - 1) * (log_softplus - math.log(scale)) + logsigmoid(value)).exp()


def _power(value: Tensor, exponent: float) -> Tensor:
    """value ** exponent; the common shapes without pow, which torch.compile does one element at a time on a CPU."""
    if exponent == 1.5:
        return value * value.sqrt()
    if exponent == 2:
        return value * value
    return value**exponent


def _log_sech_squared(value: Tensor) -> Tensor:
    # 1 − tanh² loses every digit above 14 in float32; this keeps them all
    double = 2 * value.abs()
    return math.log(4) - double - 2 * torch.log1p(torch.exp(-double))
