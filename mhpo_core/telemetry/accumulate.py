"""One pass over a step's tokens: from a batch to mergeable statistics, without waiting for the device.

Nothing here reads a value back to the host, so on CUDA the pass is only launched; shapes depend on (B, T) alone.
Shape letters: B sequences, T response tokens, N = B·T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mhpo_core.batch import TokenBatch
from mhpo_core.histograms import N_BINS, bin_index
from mhpo_core.objectives import Objective, Terms
from mhpo_core.telemetry.accumulators import (
    ADVANTAGE_UNIT,
    OUTLIER_FIELDS,
    OUTLIERS,
    AccumulatorNames,
    Accumulators,
)  # fmt: skip
from mhpo_core.telemetry.logit_norm import logit_gradient_norm

SIDES = ("positive", "negative", "zero")
# A ratio enters the effective sample size with at most e^300: its square must fit float64.
LARGEST_SQUARED_EXPONENT = 300.0
# A log-probability above this, or an entropy below its negative, is impossible beyond rounding.
IMPOSSIBLE = 1e-4
# A multiplier below this share of the on-policy one no longer pulls a ratio back.
RESTORING_SHARE = 0.1
_LARGEST_ADVANTAGE = 2.0**18


@torch.no_grad()
def accumulate(batch: TokenBatch, objective: Objective, *, compiled: bool = False) -> Accumulators:
    """Mergeable statistics of the batch's trained tokens under the objective; see `Accumulators`.

    Args:
        compiled: run the pass through torch.compile: one or two kernels in place of some two hundred, after several
            seconds for the first batch of a shape. Pays on CUDA and for long runs of large batches on a CPU.
    """
    on_policy = objective.on_policy_multiplier
    run = _compiled() if compiled else _reduce
    return Accumulators(*run(batch, objective, on_policy), batch.n_sequences)


@torch.no_grad()
def accumulate_terms(batch: TokenBatch, terms: Terms, norm: Tensor, on_policy: float) -> Accumulators:
    """`accumulate` of terms and token gradient norms that are already there."""
    return Accumulators(*_reduce_terms(batch, terms, norm, on_policy), batch.n_sequences)


_Reduced = tuple[
    AccumulatorNames, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # the fields of Accumulators without n_rows


@cache
def _compiled() -> Callable[..., _Reduced]:
    return torch.compile(_reduce, dynamic=True, fullgraph=True)


def _reduce(batch: TokenBatch, objective: Objective, on_policy: float) -> _Reduced:
    terms = objective.terms(batch)
    return _reduce_terms(batch, terms, logit_gradient_norm(batch, terms), on_policy)


def _reduce_terms(batch: TokenBatch, terms: Terms, norm: Tensor, on_policy: float) -> _Reduced:
    advantage = torch.where(batch.mask, batch.advantage.to(terms.log_ratio.dtype), 0.0)
    reduced = _Reductions(batch.mask)
    _reduce_ratio(reduced, terms.log_ratio, advantage)
    _reduce_mismatch(reduced, batch)
    _reduce_health(reduced, batch, terms)
    _reduce_gradient(reduced, terms, advantage, norm, on_policy)
    quantities, count, weight, units = _bins(batch, terms, advantage, norm)
    counts, sums, minima, maxima = (
        torch.stack(list(d.values())) for d in (reduced.counts, reduced.sums, reduced.minima, reduced.maxima)
    )
    names = AccumulatorNames(tuple(reduced.counts), tuple(reduced.sums), tuple(reduced.minima), quantities)
    return (names, counts, sums, minima, maxima, count, weight, units, *_outliers(batch, terms, advantage, norm))


class _Reductions:
    """Named scalars on the device, each over the positions where its condition holds."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.counts: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.minima: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}

    def count(self, name: str, hits: Tensor) -> None:
        self.counts[name] = (hits & self.mask).sum()

    def sum(self, name: str, values: Tensor, where: Tensor) -> None:
        self.sums[name] = torch.where(where, values, 0.0).sum(dtype=torch.float64)

    def mean(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Sum and number of the finite values."""
        finite = values.isfinite() & (self.mask if where is None else where & self.mask)
        self.counts[name] = finite.sum()
        self.sum(name, values, finite)

    def share(self, name: str, flags: Tensor, of: Tensor | None = None) -> None:
        """Number of trained tokens, or of `of`, and of those with the flag."""
        where = self.mask if of is None else of & self.mask
        self.counts[name] = where.sum()
        self.sums[name] = (flags & where).sum().double()

    def extremes(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        known = ~values.isnan() & (self.mask if where is None else where & self.mask)
        self.counts[f"{name}_known"] = known.sum()
        self.minima[name] = torch.where(known, values, torch.inf).amin().double()
        self.maxima[name] = torch.where(known, values, -torch.inf).amax().double()


def _reduce_ratio(reduced: _Reductions, log_ratio: Tensor, advantage: Tensor) -> None:
    finite = log_ratio.isfinite() & reduced.mask
    x = torch.where(finite, log_ratio, 0.0).double()
    for side, here in zip(SIDES, (advantage > 0, advantage < 0, advantage == 0), strict=True):
        reduced.extremes(f"log_ratio_{side}", log_ratio, here)
        reduced.counts[f"log_ratio_{side}"] = (here & finite).sum()
        power = x
        for order in (1, 2, 3, 4):
            reduced.sum(f"log_ratio_{side}_{order}", power, here)
            power = power * x
    reduced.extremes("log_ratio", log_ratio)
    reduced.counts["log_ratio"] = finite.sum()
    reduced.sum("log_ratio", x, finite)
    shift = torch.expm1(x)  # of a position that does not count: 0
    reduced.sums["kl_old_new_k3"] = (shift - x).sum()
    capped = torch.where(x > LARGEST_SQUARED_EXPONENT, _CAPPED_RATIO, shift + 1)
    reduced.sum("ratio", capped, finite)
    reduced.sum("ratio_squared", capped * capped, finite)


_CAPPED_RATIO = float(torch.tensor(LARGEST_SQUARED_EXPONENT, dtype=torch.float64).exp())


def _reduce_mismatch(reduced: _Reductions, batch: TokenBatch) -> None:
    if batch.logp_rollout is None:
        return
    mismatch = batch.logp_old.double() - batch.logp_rollout.double()
    finite = mismatch.isfinite() & batch.mask
    x = torch.where(finite, mismatch, 0.0)
    reduced.mean("mismatch", mismatch)
    reduced.extremes("mismatch", mismatch)
    reduced.sums["kl_rollout_old_k3"] = (torch.expm1(x) - x).sum()


def _reduce_health(reduced: _Reductions, batch: TokenBatch, terms: Terms) -> None:
    lengths = batch.mask.sum(dim=1)
    reduced.counts["n_tokens"] = lengths.sum()
    reduced.counts["n_sequences"] = (lengths > 0).sum()
    bad = ~(terms.log_ratio.isfinite() & batch.advantage.isfinite() & batch.logp_new.isfinite())
    if batch.logp_rollout is not None:
        bad = bad | ~(batch.logp_old.double() - batch.logp_rollout.double()).isfinite()
    if batch.logp_ref is not None:
        bad = bad | ~batch.logp_ref.isfinite()
    impossible = batch.logp_new > IMPOSSIBLE
    if batch.entropy is not None:
        impossible = impossible | (batch.entropy < -IMPOSSIBLE)
        reduced.mean("entropy_mean", batch.entropy)
    reduced.count("nonfinite_count", bad)
    reduced.count("clamped_count", terms.clamped)
    reduced.count("impossible_count", impossible)


def _reduce_gradient(reduced: _Reductions, terms: Terms, advantage: Tensor, norm: Tensor, on_policy: float) -> None:
    restoring = advantage * terms.log_ratio < 0
    reduced.share("restoring_lost_fraction", terms.gradient_multiplier < RESTORING_SHARE * on_policy, restoring)
    reduced.mean("gradient_multiplier_mean", terms.gradient_multiplier, advantage != 0)
    reduced.mean("logit_grad_norm_mean", norm)
    reduced.extremes("logit_grad_norm", norm)
    for name, values in _term_means(terms).items():
        if values is not None:
            reduced.mean(name, values)
    for name, flags in _term_shares(terms).items():
        if flags is not None:
            reduced.share(name, flags)


def _term_means(terms: Terms) -> dict[str, Tensor | None]:
    return {
        "hazard_mean": terms.hazard,
        "hazard_positive_mean": terms.hazard_positive,
        "hazard_negative_mean": terms.hazard_negative,
        "survival_weight_mean": terms.survival_weight,
        "modulated_log_ratio_mean": terms.modulated_log_ratio,
    }


def _term_shares(terms: Terms) -> dict[str, Tensor | None]:
    return {
        "clip_fraction_low": terms.clipped_low,
        "clip_fraction_high": terms.clipped_high,
        "out_of_range_fraction": terms.out_of_range,
    }


def _bins(
    batch: TokenBatch, terms: Terms, advantage: Tensor, norm: Tensor
) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
    """Counts, Σ|A·M| and fixed-point Σ|A| per quantity, side and bin."""
    side = torch.where(advantage > 0, 0, torch.where(advantage < 0, 1, torch.where(advantage == 0, 2, 3)))
    weight = (advantage * terms.gradient_multiplier).abs().double().nan_to_num(nan=0.0, posinf=0.0)
    units = (advantage.abs().double().nan_to_num(nan=0.0).clamp(max=_LARGEST_ADVANTAGE) / ADVANTAGE_UNIT).round()
    quantities: dict[str, Tensor | None] = {
        "log_ratio": terms.log_ratio,
        "mismatch_log_ratio": None,
        "entropy": batch.entropy,
        "logit_grad_norm": norm,
    }
    if batch.logp_rollout is not None:
        quantities["mismatch_log_ratio"] = batch.logp_old.double() - batch.logp_rollout.double()
    present = {name: values for name, values in quantities.items() if values is not None}
    shape = (len(present), 4, N_BINS)
    count = torch.zeros(shape, dtype=torch.int64, device=side.device).view(-1)
    weights = torch.zeros(shape, dtype=torch.float64, device=side.device).view(-1)
    units_of_bins = torch.zeros((4, N_BINS), dtype=torch.int64, device=side.device).view(-1)
    for number, (name, values) in enumerate(present.items()):
        counts_here = batch.mask & ~values.isnan()
        # the fourth side takes what has no side or no bin: a NaN advantage or value
        slot = torch.where(values.isnan(), 3, side) * N_BINS + bin_index(torch.where(counts_here, values, 0.0))
        flat = slot.reshape(-1)
        # no bincount: it reads its input back to find the largest value
        count.scatter_add_(0, flat + number * 4 * N_BINS, batch.mask.reshape(-1).long())
        weights.scatter_add_(0, flat + number * 4 * N_BINS, torch.where(batch.mask, weight, 0.0).reshape(-1))
        if name == "log_ratio":
            units_of_bins.scatter_add_(0, flat, torch.where(batch.mask, units, 0.0).reshape(-1).long())
    return tuple(present), count.view(shape), weights.view(shape), units_of_bins.view(4, N_BINS)


def _outliers(batch: TokenBatch, terms: Terms, advantage: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    columns = {
        "log_ratio": terms.log_ratio, "logp_new": batch.logp_new, "logp_old": batch.logp_old, "advantage": advantage,
        "gradient_multiplier": terms.gradient_multiplier, "logit_grad_norm": norm,
    }  # fmt: skip
    table = [columns[name].reshape(-1) for name in OUTLIER_FIELDS]
    size = torch.where(batch.mask & ~terms.log_ratio.isnan(), terms.log_ratio.abs(), -1.0)
    found, place = [], []
    n_positions, width = size.numel(), size.shape[1]
    kept = min(OUTLIERS, n_positions)
    for here in (advantage > 0, advantage < 0):
        largest, index = torch.where(here, size, -1.0).reshape(-1).topk(kept)
        there = largest >= 0
        rows = torch.stack([torch.where(there, values[index].double(), torch.nan) for values in table], dim=1)
        places = torch.where(there[:, None], torch.stack([index // width, index % width], dim=1), -1)
        missing = (0, 0, 0, OUTLIERS - kept)
        found.append(torch.nn.functional.pad(rows, missing, value=torch.nan))
        place.append(torch.nn.functional.pad(places, missing, value=-1))
    return torch.stack(found), torch.stack(place)
