"""A whole step measured at once: what accumulates, and what needs all tokens in one place to be exact.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mhpo_core.batch import TokenBatch
from mhpo_core.metrics import QUANTILE_LEVELS, SUFFIX_OF_SIDE
from mhpo_core.objectives import Objective, Terms
from mhpo_core.telemetry.accumulators import Accumulators
from mhpo_core.telemetry.logit_norm import logit_gradient_norm
from mhpo_core.telemetry.one_pass import accumulate_terms
from mhpo_core.telemetry.summary import Histogram, Scalar, histograms_of, scalars_of


@dataclass(frozen=True)
class StepTelemetry:
    """What one step says about its policy shift.

    Args:
        terms: per-token terms, (B, T).
        logit_grad_norm: |A·M|·sqrt(1 − 2p + Σp²), (B, T), 0 at masked positions; see `logit_gradient_norm`.
        scalars: metric name → value; None = not computed because an input is missing or no token has a finite value.
        histograms: by quantity and side.
        accumulated: the mergeable statistics behind them, on the CPU.
    """

    terms: Terms
    logit_grad_norm: Tensor
    scalars: dict[str, Scalar]
    histograms: list[Histogram]
    accumulated: Accumulators


@torch.no_grad()
def measure(batch: TokenBatch, objective: Objective) -> StepTelemetry:
    """Terms, scalars and histograms of one step's tokens.

    Statistics are over trained tokens with a finite value; smallest and largest keep ±Inf; tokens that are NaN or
    ±Inf are counted in `nonfinite_count`. Quantiles are exact.
    """
    terms = objective.terms(batch)
    norm = logit_gradient_norm(batch, terms)
    accumulated = accumulate_terms(batch, terms, norm, objective.on_policy_multiplier).cpu()
    scalars = scalars_of(accumulated) | _exact(batch, terms, norm)
    return StepTelemetry(terms, norm, scalars, histograms_of(accumulated), accumulated)


def _exact(batch: TokenBatch, terms: Terms, norm: Tensor) -> dict[str, Scalar]:
    mask = batch.mask
    log_ratio, advantage = terms.log_ratio[mask].double(), batch.advantage[mask]
    found = _quantiles("log_ratio", log_ratio) | _top_share(norm[mask].double())
    finite = log_ratio[log_ratio.isfinite()]
    found["log_ratio_std"] = float(finite.std(correction=0)) if finite.numel() else None
    for side, suffix in SUFFIX_OF_SIDE.items():
        here = advantage > 0 if side == "positive" else advantage < 0
        found |= _quantiles("log_ratio", log_ratio[here], suffix)
    if batch.logp_rollout is not None:
        mismatch = batch.logp_old.detach()[mask].double() - batch.logp_rollout.detach()[mask].double()
        found |= _quantiles("mismatch", mismatch)
    return found


def _quantiles(prefix: str, values: Tensor, suffix: str = "") -> dict[str, Scalar]:
    finite = values[values.isfinite()].sort().values
    names = [f"{prefix}_{name}{suffix}" for name in QUANTILE_LEVELS]
    if not finite.numel():
        return dict.fromkeys(names)
    position = torch.tensor(list(QUANTILE_LEVELS.values()), dtype=torch.float64, device=values.device)
    position = position * (finite.numel() - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=finite.numel() - 1)
    found = finite[below] + (position - below) * (finite[above] - finite[below])
    return dict(zip(names, found.tolist(), strict=True))


def _top_share(norm: Tensor) -> dict[str, Scalar]:
    finite = norm[norm.isfinite()]
    total = float(finite.sum())
    share = float(finite.topk(math.ceil(finite.numel() / 100)).values.sum()) / total if total > 0 else None
    return {"logit_grad_norm_top1_share": share}
