"""One pass over a step's tokens: from a batch to mergeable statistics, without waiting for the device.

Nothing here reads a value back to the host, so on CUDA the pass is only launched; shapes depend on (B, T) alone.
Shape letters: B sequences, T response tokens, N = B·T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mhpo_core.batch import TokenBatch
from mhpo_core.histograms import N_BINS, bin_index
from mhpo_core.objectives import Objective, Terms, Tokens
from mhpo_core.telemetry.accumulators import (
    ADVANTAGE_UNIT,
    OUTLIER_FIELDS,
    OUTLIERS,
    AccumulatorNames,
    Accumulators,
)  # fmt: skip
from mhpo_core.telemetry.logit_norm import logit_gradient_norm

SIDES = ("positive", "negative", "zero")
# A log-probability or Σp² − 1 above this, or an entropy below its negative, is impossible beyond rounding.
IMPOSSIBLE = 1e-4
# A multiplier below this share of the on-policy one no longer pulls a ratio back.
RESTORING_SHARE = 0.1
_LARGEST_ADVANTAGE = 2.0**18
_BLOCK = 1024


@torch.no_grad()
def accumulate(batch: TokenBatch, objective: Objective, *, compiled: bool = False) -> Accumulators:
    """Mergeable statistics of the batch's trained tokens under the objective; see `Accumulators`.

    The terms are computed in float32, or in float64 where a log-probability is; `Objective.terms` and `measure` compute
    them in float64 always, which differs only where a multiplier leaves the float32 range.

    Args:
        compiled: run the pass through torch.compile, whose first batch takes half a minute and more and needs a C++
            compiler. On a CPU it pays from about ten thousand tokens; on CUDA it has not been measured.
    """
    on_policy = objective.on_policy_multiplier
    run = _compiled() if compiled else _reduce
    return run(batch, objective, on_policy).accumulators(batch.n_sequences)


@torch.no_grad()
def accumulate_terms(batch: TokenBatch, terms: Terms, norm: Tensor, on_policy: float) -> Accumulators:
    """`accumulate` of terms and token gradient norms that are already there."""
    return _reduce_terms(batch, terms, norm, on_policy).accumulators(batch.n_sequences)


class _Reduced(NamedTuple):
    """What the pass leaves; only the histograms are still to be filled."""

    names: AccumulatorNames
    vectors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    slots: _Slots
    outliers: tuple[Tensor, Tensor]

    def accumulators(self, n_rows: int) -> Accumulators:
        # torch's own scatter, outside of what torch.compile sees
        return Accumulators(self.names, *self.vectors, *_fill(self.slots), *self.outliers, n_rows)


@cache
def _compiled() -> Callable[..., _Reduced]:
    return torch.compile(_reduce, dynamic=True, fullgraph=True)


def _reduce(batch: TokenBatch, objective: Objective, on_policy: float) -> _Reduced:
    # in the dtype of the result, which is enough for statistics
    terms = objective.rounded_terms(Tokens.of(batch, Tokens.result_dtype_of(batch)))
    return _reduce_terms(batch, terms, logit_gradient_norm(batch, terms), on_policy)


def _reduce_terms(batch: TokenBatch, terms: Terms, norm: Tensor, on_policy: float) -> _Reduced:
    advantage = torch.where(batch.mask, batch.advantage.to(terms.log_ratio.dtype), 0.0)
    reduced = _Reductions(batch.mask)
    _reduce_ratio(reduced, terms.log_ratio, advantage)
    _reduce_mismatch(reduced, batch)
    _reduce_health(reduced, batch, terms)
    _reduce_gradient(reduced, terms, advantage, norm, on_policy)
    slots = _slots(batch, terms, advantage, norm)
    counts, sums = torch.stack(list(reduced.counts.values())), torch.stack(list(reduced.sums.values()))
    log_sums = torch.stack(list(reduced.log_sums.values()))
    minima, maxima = torch.stack(list(reduced.minima.values())), torch.stack(list(reduced.maxima.values()))
    names = AccumulatorNames(
        tuple(reduced.counts), tuple(reduced.sums), tuple(reduced.log_sums), tuple(reduced.minima), slots.quantities
    )
    return _Reduced(names, (counts, sums, log_sums, minima, maxima), slots, _outliers(batch, terms, advantage, norm))


class _Reductions:
    """Named scalars on the device, each over the positions where its condition holds."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.counts: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.log_sums: dict[str, Tensor] = {}
        self.minima: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}

    def count(self, name: str, hits: Tensor) -> None:
        self.counts[name] = _number(hits & self.mask)

    def sum(self, name: str, values: Tensor, where: Tensor) -> None:
        self.sums[name] = torch.where(where, values, 0.0).sum(dtype=torch.float64)

    def mean(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Sum and number of the finite values."""
        finite = values.isfinite() & (self.mask if where is None else where & self.mask)
        self.counts[name] = _number(finite)
        self.sum(name, values, finite)

    def share(self, name: str, flags: Tensor, of: Tensor | None = None) -> None:
        """Number of trained tokens, or of `of`, and of those with the flag."""
        where = self.mask if of is None else of & self.mask
        self.counts[name] = _number(where)
        self.sums[name] = _number(flags & where).double()

    def log_sum(self, name: str, exponent: Tensor, where: Tensor) -> None:
        """log Σ exp(exponent), −Inf where there is nothing."""
        self.log_sums[name] = torch.where(where, exponent, -torch.inf).reshape(-1).logsumexp(0)

    def extremes(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        known = ~values.isnan() & (self.mask if where is None else where & self.mask)
        self.counts[f"{name}_known"] = _number(known)
        self.counts[f"{name}_infinite"] = _number(known & (values == torch.inf))
        self.minima[name] = torch.where(known, values, torch.inf).amin().double()
        self.maxima[name] = torch.where(known, values, -torch.inf).amax().double()


def _number(flags: Tensor) -> Tensor:
    # 32 bits per row and 64 across them; 64 throughout is five times slower on a CPU
    return flags.sum(dim=1, dtype=torch.int32).sum(dtype=torch.int64)


def _k3(x: Tensor) -> Tensor:
    """expm1(x) − x with all digits of a small x, also where torch.compile makes exp(x) − 1 of expm1."""
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x / 120)))
    return torch.where(x.abs() < 0.01, series, torch.expm1(x) - x)


def _reduce_ratio(reduced: _Reductions, log_ratio: Tensor, advantage: Tensor) -> None:
    finite = log_ratio.isfinite() & reduced.mask
    x = torch.where(finite, log_ratio, 0.0).double()  # of a position that does not count it is 0
    for side, here in zip(SIDES, (advantage > 0, advantage < 0, advantage == 0), strict=True):
        reduced.extremes(f"log_ratio_{side}", log_ratio, here)
        reduced.counts[f"log_ratio_{side}"] = _number(here & finite)
        power = x
        for order in (1, 2, 3, 4):
            reduced.sum(f"log_ratio_{side}_{order}", power, here)
            power = power * x
    reduced.extremes("log_ratio", log_ratio)
    reduced.counts["log_ratio"] = _number(finite)
    reduced.sum("log_ratio", x, finite)
    reduced.sum("kl_old_new_k3", _k3(x), finite)
    # in log space: the square of a ratio of e^±400 is no float64
    reduced.log_sum("ratio", x, finite)
    reduced.log_sum("ratio_squared", 2 * x, finite)


def _reduce_mismatch(reduced: _Reductions, batch: TokenBatch) -> None:
    if batch.logp_rollout is None:
        return
    mismatch = batch.logp_old.double() - batch.logp_rollout.double()
    finite = mismatch.isfinite() & batch.mask
    x = torch.where(finite, mismatch, 0.0)
    reduced.mean("mismatch", mismatch)
    reduced.extremes("mismatch", mismatch)
    reduced.sum("kl_rollout_old_k3", _k3(x), finite)


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
    if batch.sum_p_squared is not None:
        impossible = impossible | (batch.sum_p_squared > 1 + IMPOSSIBLE)
    exact = batch.mask if batch.sum_p_squared is not None else torch.zeros_like(batch.mask)
    reduced.count("logit_grad_norm_exact_count", exact)
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


@dataclass(frozen=True)
class _Slots:
    """Where each position goes in the histograms; masked positions carry weight 0.

    Letters: Q quantities, N positions.
    """

    quantities: tuple[str, ...]
    slot: Tensor  # (Q, N) int64, side · N_BINS + bin
    one: Tensor  # (N,) int64
    weight: Tensor  # (N,) float64, |A·M|
    units: Tensor  # (N,) int64, |A| in ADVANTAGE_UNIT


def _slots(batch: TokenBatch, terms: Terms, advantage: Tensor, norm: Tensor) -> _Slots:
    side = torch.where(advantage > 0, 0, torch.where(advantage < 0, 1, torch.where(advantage == 0, 2, 3)))
    weight = (advantage * terms.gradient_multiplier).abs().nan_to_num(nan=0.0, posinf=0.0)
    units = (advantage.abs().nan_to_num(nan=0.0).clamp(max=_LARGEST_ADVANTAGE).double() / ADVANTAGE_UNIT).round()
    quantities: dict[str, Tensor | None] = {
        "log_ratio": terms.log_ratio,
        "mismatch_log_ratio": None,
        "entropy": batch.entropy,
        "logit_grad_norm": norm,
    }
    if batch.logp_rollout is not None:
        quantities["mismatch_log_ratio"] = batch.logp_old.double() - batch.logp_rollout.double()
    present = {name: values for name, values in quantities.items() if values is not None}
    slots = []
    for values in present.values():
        known = batch.mask & ~values.isnan()
        # the fourth side takes what has no side or no bin: a NaN advantage or value
        slots.append(torch.where(values.isnan(), 3, side) * N_BINS + bin_index(torch.where(known, values, 0.0)))
    return _Slots(
        quantities=tuple(present),
        slot=torch.stack([s.reshape(-1) for s in slots]),
        one=batch.mask.reshape(-1).long(),
        weight=torch.where(batch.mask, weight, 0.0).double().reshape(-1),
        units=torch.where(batch.mask, units, 0.0).long().reshape(-1),
    )


def _fill(slots: _Slots) -> tuple[Tensor, Tensor, Tensor]:
    """Counts and Σ|A·M| per quantity, side and bin, and Σ|A| of log_ratio. No bincount: it reads its input back."""
    n_quantities, device = len(slots.slot), slots.slot.device
    count = torch.zeros((n_quantities, 4 * N_BINS), dtype=torch.int64, device=device)
    weight = torch.zeros((n_quantities, 4 * N_BINS), dtype=torch.float64, device=device)
    units = torch.zeros(4 * N_BINS, dtype=torch.int64, device=device)
    for row in range(n_quantities):
        count[row].scatter_add_(0, slots.slot[row], slots.one)
        weight[row].scatter_add_(0, slots.slot[row], slots.weight)
    units.scatter_add_(0, slots.slot[0], slots.units)
    return count.view(-1, 4, N_BINS), weight.view(-1, 4, N_BINS), units.view(4, N_BINS)


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
        largest, index = _largest(torch.where(here, size, -1.0).reshape(-1), kept)
        there = largest >= 0
        rows = torch.stack([torch.where(there, values[index].double(), torch.nan) for values in table], dim=1)
        places = torch.where(there[:, None], torch.stack([index // width, index % width], dim=1), -1)
        missing = (0, 0, 0, OUTLIERS - kept)
        found.append(torch.nn.functional.pad(rows, missing, value=torch.nan))
        place.append(torch.nn.functional.pad(places, missing, value=-1))
    return torch.stack(found), torch.stack(place)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of a vector and where they are.

    The blocks with the k largest maxima hold them all, so only those are searched.
    """
    if values.numel() < 4 * k * _BLOCK:
        found = values.topk(k)
        return found.values, found.indices
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % _BLOCK), value=-1.0).view(-1, _BLOCK)
    best = blocks.amax(dim=1).topk(k).indices
    found = blocks[best].reshape(-1).topk(k)
    return found.values, best[found.indices // _BLOCK] * _BLOCK + found.indices % _BLOCK
