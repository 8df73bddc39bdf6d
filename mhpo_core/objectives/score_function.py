"""Score-function objectives: J = stop_gradient(w)·A·logp_new, with a bounded or masked ratio as the weight w.

The gradient is w·A at every token, whatever side of a bound it lies on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.checks import is_number, require_ratio_range
from mhpo_core.objectives.tokens import Tokens


@dataclass(frozen=True)
class Reinforce(Objective):
    """w = 1: no ratio at all; GPG.

    Source: Williams 1992; verl 0.9.1 `gpg`.
    """

    name: ClassVar[str] = "reinforce"
    canonical_aggregation: ClassVar[str] = "token-mean"
    follows_from_ratio: ClassVar[bool] = True

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return tokens.score_function(torch.ones_like(tokens.log_ratio))


@dataclass(frozen=True)
class Cispo(Objective):
    """w = clip(r, ratio_min, ratio_max).

    Args:
        ratio_min: 0 or less leaves the lower bound off, as MiniMax-M1 does.
        ratio_max: an absolute cap, as TRL's `epsilon_high`; verl, SkyRL and ROLL write 1 + eps_high.

    Source: MiniMax-M1, arXiv 2506.13585; 5 is TRL's recommendation.
    """

    name: ClassVar[str] = "cispo"
    canonical_aggregation: ClassVar[str] = "token-mean"
    follows_from_ratio: ClassVar[bool] = True

    ratio_min: float = 0.0
    ratio_max: float = 5.0

    def __post_init__(self) -> None:
        require_ratio_range(self, "ratio_min", "ratio_max")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return truncated(tokens, tokens.log_ratio, self.ratio_min, self.ratio_max)


@dataclass(frozen=True)
class CispoVerl(Cispo):
    """CISPO with verl 0.9.1's default bounds, [1 − 0.2, 1 + 0.2]."""

    name: ClassVar[str] = "cispo_verl"

    ratio_min: float = 0.8
    ratio_max: float = 1.2


@dataclass(frozen=True)
class TruncatedSampling(Objective):
    """TIS: w = clip(r, ratio_min, ratio_max).

    Args:
        ratio_min: lower bound; None, or 0 or less, for none.
        ratio_max: > 0, or None for no upper bound. 2 is verl 0.9.1's `rollout_is_threshold`; TRL 1.16 truncates at 3.
    """

    name: ClassVar[str] = "tis"
    canonical_aggregation: ClassVar[str] = "token-mean"
    follows_from_ratio: ClassVar[bool] = True

    ratio_min: float | None = None
    ratio_max: float | None = 2.0

    def __post_init__(self) -> None:
        require_ratio_range(self, "ratio_min", "ratio_max")

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return truncated(tokens, tokens.log_ratio, self.ratio_min, self.ratio_max)


@dataclass(frozen=True)
class MaskedSampling(TruncatedSampling):
    """MIS: w = r inside [ratio_min, ratio_max], 0 outside."""

    name: ClassVar[str] = "mis"

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        return masked(tokens, tokens.log_ratio, self.ratio_min, self.ratio_max)


@dataclass(frozen=True)
class IcePop(MaskedSampling):
    """MIS with the band of IcePop.

    Source: [0.5, 5] as in rllm; open-instruct and prime-rl use [1/5, 5].
    """

    name: ClassVar[str] = "icepop"

    ratio_min: float | None = 0.5
    ratio_max: float | None = 5.0


@dataclass(frozen=True)
class Topr(Objective):
    """w = clip(r, *pos_clip) where A > 0, clip(r, *neg_clip) where A ≤ 0.

    Args:
        pos_clip: bounds of the ratio for A > 0; (1, 1) ignores it.
        neg_clip: bounds for A ≤ 0; (0, 1) is min(r, 1).

    Source: Le Roux et al. 2025, arXiv 2503.14286, which weighs whole sequences by the sign of the reward; here per
    token and by the sign of A, as ROLL does per token.
    """

    name: ClassVar[str] = "topr"
    canonical_aggregation: ClassVar[str] = "token-mean"
    follows_from_ratio: ClassVar[bool] = True

    pos_clip: tuple[float, float] = (1.0, 1.0)
    neg_clip: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("pos_clip", "neg_clip"):
            pair = getattr(self, name)
            if not _is_ratio_range(pair):
                raise ObjectiveError(
                    f"{self.name}: {name} = {pair!r}, allowed are two finite numbers 0 ≤ low ≤ high with high > 0. "
                    "Change it in [objective]."
                )
            # a list from JSON or TOML would not compare equal to a tuple
            object.__setattr__(self, name, (float(pair[0]), float(pair[1])))

    def evaluate(self, tokens: Tokens) -> dict[str, Tensor]:
        positive, negative = (self._terms(tokens, *bounds) for bounds in (self.pos_clip, self.neg_clip))
        return {name: torch.where(tokens.advantage > 0, positive[name], negative[name]) for name in positive}

    @staticmethod
    def _terms(tokens: Tokens, low: float, high: float) -> dict[str, Tensor]:
        terms = truncated(tokens, tokens.log_ratio, low, high)
        if low == high:  # a constant weight, not a bound
            terms |= {name: torch.zeros_like(flags) for name, flags in terms.items() if flags.dtype == torch.bool}
        return terms


def truncated(tokens: Tokens, log_ratio: Tensor, low: float | None, high: float | None) -> dict[str, Tensor]:
    """Terms of w = clip(r, low, high), clipped in log space.

    Args:
        log_ratio: (B, T), of the token or of its sequence.
    """
    below, above = log_ratio < _log(low, -math.inf), log_ratio > _log(high, math.inf)
    weight = tokens.bounded_exp(log_ratio)
    weight = torch.where(below, low or 0.0, weight)
    weight = weight if high is None else torch.where(above, high, weight)
    return tokens.score_function(weight) | {"clipped_low": below, "clipped_high": above, "out_of_range": below | above}


def masked(tokens: Tokens, log_ratio: Tensor, low: float | None, high: float | None) -> dict[str, Tensor]:
    """Terms of w = r inside [low, high], 0 outside."""
    terms = truncated(tokens, log_ratio, low, high)
    weight = torch.where(terms["out_of_range"], 0.0, terms["gradient_multiplier"])
    return terms | tokens.score_function(weight)


def _log(bound: float | None, without: float) -> float:
    return math.log(bound) if bound is not None and bound > 0 else without


def _is_ratio_range(pair: object) -> bool:
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(is_number(v) for v in pair)
        and 0 <= pair[0] <= pair[1] < math.inf
        and pair[1] > 0
    )
