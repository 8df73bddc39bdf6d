"""One pass over a step's tokens: per-token terms, scalars and histograms.

Shape letters: B sequences, T response tokens, N trained tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mhpo_core.batch import TokenBatch
from mhpo_core.histograms import N_BINS, bin_index
from mhpo_core.metrics import QUANTILE_LEVELS, SUFFIX_OF_SIDE
from mhpo_core.objectives.base import Objective, Terms

Scalar = float | int | None


@dataclass(frozen=True)
class Histogram:
    """Counts and gradient weights of one quantity on one side of the advantage, over the fixed bins.

    Args:
        quantity: log_ratio, mismatch_log_ratio, entropy or logit_grad_norm.
        side: positive, negative or zero: the sign of the advantage.
        count: (N_BINS,) int64; NaN tokens are in no bin, ±Inf in the open end bins.
        weight: (N_BINS,) float64, Σ|A·M| of the tokens of the bin.
    """

    quantity: str
    side: str
    count: NDArray[np.int64]
    weight: NDArray[np.float64]


@dataclass(frozen=True)
class StepTelemetry:
    """What one step says about its policy shift.

    Args:
        terms: per-token terms, (B, T).
        logit_grad_norm: |A·M|·sqrt(1 − 2p + Σp²), (B, T), 0 at masked positions; see `logit_gradient_norm`.
        scalars: metric name → value; None = not computed because an input is missing or no token has a finite value.
        histograms: by quantity and side.
    """

    terms: Terms
    logit_grad_norm: Tensor
    scalars: dict[str, Scalar]
    histograms: list[Histogram]


@torch.no_grad()
def measure(batch: TokenBatch, objective: Objective) -> StepTelemetry:
    """Terms, scalars and histograms of one step's tokens.

    Statistics are over trained tokens with a finite value; smallest and largest keep ±Inf; tokens that are NaN or
    ±Inf are counted in `nonfinite_count`.
    """
    terms = objective.terms(batch)
    norm = logit_gradient_norm(batch, terms)
    mask = batch.mask
    picked = _Picked(batch, terms, norm)
    lengths = mask.sum(dim=1)
    scalars: dict[str, Scalar] = {
        "n_tokens": int(lengths.sum()),
        "n_sequences": int((lengths > 0).sum()),
        "length_mean": float(lengths[lengths > 0].double().mean()),
        "nonfinite_count": picked.nonfinite_count(),
        "clamped_count": int(terms.clamped.sum()),
        **_distribution("log_ratio", picked.log_ratio),
        "log_ratio_std": _std(picked.log_ratio),
        **_ratio_statistics(picked.log_ratio),
        **_mismatch(picked.mismatch),
        **_gradient_statistics(picked),
    }
    for side, suffix in SUFFIX_OF_SIDE.items():
        scalars |= _distribution("log_ratio", picked.log_ratio[picked.sides[side]], suffix)
    for name, values in _token_means(batch, terms).items():
        scalars[name] = None if values is None else _mean(values[mask].double())
    return StepTelemetry(terms, norm, scalars, picked.histograms())


def logit_gradient_norm(batch: TokenBatch, terms: Terms) -> Tensor:
    """|A·M|·sqrt(1 − 2p + Σp²): L2 norm of one token's policy-gradient term with respect to its logits.

    Without Σp² it is |A·M|·(1 − p), which is at most √2 too small. Both at temperature 1.

    Returns:
        (B, T) ≥ 0, 0 at masked positions.

    Source: ∂log p_y/∂z = e_y − p, whose squared norm is 1 − 2p_y + Σp².
    """
    dtype = terms.log_ratio.dtype
    logp = torch.where(batch.mask, batch.logp_new.to(dtype), 0.0)
    # a log-probability a rounding error above 0 is a probability of 1
    miss = -torch.expm1(logp.clamp(max=0))
    if batch.sum_p_squared is not None:
        # 1 − 2p + Σp² = (1−p)² + (Σp² − p²), and the second part lies in [0, (1−p)²]; for p near 1 it is all rounding
        rest = batch.sum_p_squared.to(dtype) - torch.exp(2 * logp)
        miss = (miss.square() + torch.minimum(rest.clamp(min=0), miss.square())).sqrt()
    weight = (terms.gradient_multiplier * torch.where(batch.mask, batch.advantage.to(dtype), 0.0)).abs()
    return torch.where(batch.mask & (weight != 0), weight * miss, 0.0)


class _Picked:
    """The trained tokens of the batch as flat float64 vectors of length N."""

    def __init__(self, batch: TokenBatch, terms: Terms, norm: Tensor) -> None:
        mask = batch.mask

        def flat(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.detach()[mask].double()

        self.log_ratio = terms.log_ratio[mask].double()
        self.advantage = batch.advantage[mask].double()
        self.logp_new = batch.logp_new.detach()[mask].double()
        self.multiplier = terms.gradient_multiplier[mask].double()
        self.logit_grad_norm = norm[mask].double()
        self.entropy = flat(batch.entropy)
        self.logp_ref = flat(batch.logp_ref)
        rollout = flat(batch.logp_rollout)
        self.mismatch = None if rollout is None else batch.logp_old.detach()[mask].double() - rollout
        self.sides = {"positive": self.advantage > 0, "negative": self.advantage < 0, "zero": self.advantage == 0}

    def nonfinite_count(self) -> int:
        values = (self.log_ratio, self.advantage, self.logp_new, self.mismatch, self.logp_ref)
        good = [v.isfinite() for v in values if v is not None]
        return int((~torch.stack(good).all(dim=0)).sum())

    def histograms(self) -> list[Histogram]:
        weight = (self.advantage * self.multiplier).abs().nan_to_num(nan=0.0, posinf=0.0)
        side = torch.where(self.advantage > 0, 0, torch.where(self.advantage < 0, 1, 2))
        side = torch.where(self.advantage.isnan(), 3, side)
        quantities = {
            "log_ratio": self.log_ratio,
            "mismatch_log_ratio": self.mismatch,
            "entropy": self.entropy,
            "logit_grad_norm": self.logit_grad_norm,
        }
        present = {name: values for name, values in quantities.items() if values is not None}
        stacked = torch.stack(list(present.values()))
        # the fourth slot takes what has no side or no bin: a NaN advantage or value
        slot = torch.where(stacked.isnan(), 3, side) + 4 * torch.arange(len(present), device=side.device)[:, None]
        index = (slot * N_BINS + bin_index(stacked)).ravel()
        shape = (len(present), 4, N_BINS)
        size = len(present) * 4 * N_BINS
        count = torch.bincount(index, minlength=size).view(shape).cpu().numpy()
        weights = torch.bincount(index, weight.repeat(len(present)), size).view(shape).cpu().numpy()
        return [
            Histogram(name, side_name, count[q, s], weights[q, s])
            for q, name in enumerate(present)
            for s, side_name in enumerate(self.sides)
            if count[q, s].any()
        ]


def _distribution(prefix: str, values: Tensor, suffix: str = "") -> dict[str, Scalar]:
    known = values[~values.isnan()]
    finite = known[known.isfinite()].sort().values
    result: dict[str, Scalar] = {
        f"{prefix}_mean{suffix}": _mean(finite),
        f"{prefix}_min{suffix}": float(known.min()) if known.numel() else None,
        f"{prefix}_max{suffix}": float(known.max()) if known.numel() else None,
    }
    result |= dict.fromkeys([f"{prefix}_{name}{suffix}" for name in QUANTILE_LEVELS])
    if finite.numel():
        position = torch.tensor(list(QUANTILE_LEVELS.values()), dtype=torch.float64, device=values.device)
        position = position * (finite.numel() - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=finite.numel() - 1)
        found = finite[below] + (position - below) * (finite[above] - finite[below])
        result |= {f"{prefix}_{name}{suffix}": v for name, v in zip(QUANTILE_LEVELS, found.tolist(), strict=True)}
    return result


def _ratio_statistics(log_ratio: Tensor) -> dict[str, Scalar]:
    finite = log_ratio[log_ratio.isfinite()]
    if not finite.numel():
        return dict.fromkeys(("ess_fraction", "kl_old_new_k1", "kl_old_new_k3"))
    ess = torch.exp(2 * finite.logsumexp(0) - (2 * finite).logsumexp(0))
    return {
        "ess_fraction": float(ess) / finite.numel(),
        "kl_old_new_k1": -float(finite.mean()),
        "kl_old_new_k3": float((torch.expm1(finite) - finite).mean()),
    }


def _mismatch(mismatch: Tensor | None) -> dict[str, Scalar]:
    values = torch.empty(0, dtype=torch.float64) if mismatch is None else mismatch
    finite = values[values.isfinite()]
    # expm1 of a finite value can be +Inf and must stay in the mean
    k3 = float((torch.expm1(finite) - finite).mean()) if finite.numel() else None
    return {**_distribution("mismatch", values), "kl_rollout_old_k3": k3}


def _gradient_statistics(picked: _Picked) -> dict[str, Scalar]:
    known = picked.logit_grad_norm[~picked.logit_grad_norm.isnan()]
    norm = known[known.isfinite()]
    total = float(norm.sum())
    top = norm.topk(math.ceil(norm.numel() / 100)).values if norm.numel() else norm
    return {
        "gradient_multiplier_mean": _mean(picked.multiplier[~picked.sides["zero"]]),
        "logit_grad_norm_mean": _mean(norm),
        "logit_grad_norm_max": float(known.max()) if known.numel() else None,
        "logit_grad_norm_top1_share": float(top.sum()) / total if total > 0 else None,
    }


def _token_means(batch: TokenBatch, terms: Terms) -> dict[str, Tensor | None]:
    return {
        "hazard_mean": terms.hazard,
        "hazard_positive_mean": terms.hazard_positive,
        "hazard_negative_mean": terms.hazard_negative,
        "survival_weight_mean": terms.survival_weight,
        "clip_fraction_low": terms.clipped_low,
        "clip_fraction_high": terms.clipped_high,
        "out_of_range_fraction": terms.out_of_range,
        "entropy_mean": batch.entropy,
    }


def _mean(values: Tensor) -> float | None:
    finite = values[values.isfinite()]
    return float(finite.mean()) if finite.numel() else None


def _std(values: Tensor) -> float | None:
    finite = values[values.isfinite()]
    return float(finite.std(correction=0)) if finite.numel() else None
