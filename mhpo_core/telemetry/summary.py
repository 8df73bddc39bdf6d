"""From accumulated statistics to the numbers of METRICS and to histograms, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mhpo_core.histograms import EDGES, quantiles
from mhpo_core.metrics import QUANTILE_LEVELS, SUFFIX_OF_SIDE
from mhpo_core.telemetry.accumulators import ADVANTAGE_UNIT, Accumulators
from mhpo_core.telemetry.one_pass import SIDES

Scalar = float | int | None
_LEVELS = np.array(list(QUANTILE_LEVELS.values()))
# metric → name under which its sum and its number of tokens are accumulated
_MEANS = (
    "gradient_multiplier_mean", "logit_grad_norm_mean", "restoring_lost_fraction", "hazard_mean",
    "hazard_positive_mean", "hazard_negative_mean", "survival_weight_mean", "modulated_log_ratio_mean",
    "clip_fraction_low", "clip_fraction_high", "out_of_range_fraction", "entropy_mean",
)  # fmt: skip
_COUNTS = (
    "n_tokens",
    "n_sequences",
    "nonfinite_count",
    "clamped_count",
    "impossible_count",
    "logit_grad_norm_exact_count",
)


@dataclass(frozen=True)
class Histogram:
    """Counts and weights of one quantity on one side of the advantage, over the fixed bins.

    Args:
        quantity: log_ratio, mismatch_log_ratio, entropy or logit_grad_norm.
        side: positive, negative or zero: the sign of the advantage.
        count: (N_BINS,) int64; NaN tokens are in no bin, ±Inf in the open end bins.
        weight: (N_BINS,) float64, Σ|A·M| of the tokens of the bin.
        advantage_weight: (N_BINS,) float64, Σ|A|, a multiple of 2⁻²⁰; for log_ratio only.
    """

    quantity: str
    side: str
    count: NDArray[np.int64]
    weight: NDArray[np.float64]
    advantage_weight: NDArray[np.float64] | None = None


def scalars_of(accumulated: Accumulators) -> dict[str, Scalar]:
    """Every metric that follows from the tokens, of one part or of merged ones.

    Quantiles, the standard deviation and the share of the top hundredth come from bins and sums here; `measure` has
    the exact ones of a single part. A quantile is at most one bin, 1/8 of its value, off.
    """
    found = _Named(accumulated)
    scalars: dict[str, Scalar] = {name: found.counts[name] for name in _COUNTS}
    scalars["length_mean"] = _ratio(found.counts["n_tokens"], found.counts["n_sequences"])
    scalars |= {name: found.mean(name) for name in _MEANS}
    scalars |= found.distribution("log_ratio", ("log_ratio", *SIDES))
    for side, suffix in SUFFIX_OF_SIDE.items():
        scalars |= found.distribution("log_ratio", ("log_ratio", side), suffix)
    scalars |= found.distribution("mismatch", ("mismatch_log_ratio", *SIDES))
    n = found.counts["log_ratio"]
    first, second = (sum(found.sums[f"log_ratio_{s}_{order}"] for s in SIDES) for order in (1, 2))
    n_sided = sum(found.counts[f"log_ratio_{s}"] for s in SIDES)
    variance = second / n_sided - (first / n_sided) ** 2 if n_sided else None
    mean = _ratio(found.sums["log_ratio"], n)
    scalars |= {
        "log_ratio_std": None if variance is None else math.sqrt(max(variance, 0.0)),
        "ess_fraction": math.exp(2 * found.log_sums["ratio"] - found.log_sums["ratio_squared"]) / n if n else None,
        "kl_old_new_k1": None if mean is None else -mean,
        "kl_old_new_k3": _ratio(found.sums["kl_old_new_k3"], n),
        "kl_rollout_old_k3": _ratio(found.sums.get("kl_rollout_old_k3", 0.0), found.counts.get("mismatch", 0)),
        "logit_grad_norm_max": found.extreme("logit_grad_norm", found.maxima),
        "logit_grad_norm_top1_share": found.top_share(),
    }
    return scalars


def histograms_of(accumulated: Accumulators) -> list[Histogram]:
    """The histograms that hold at least one token."""
    count, weight = accumulated.bin_count.numpy(), accumulated.bin_weight.numpy()
    advantage = accumulated.bin_advantage.numpy() * ADVANTAGE_UNIT
    return [
        Histogram(name, side, count[q, s], weight[q, s], advantage[s] if name == "log_ratio" else None)
        for q, name in enumerate(accumulated.names.quantities)
        for s, side in enumerate(SIDES)
        if count[q, s].any()
    ]


class _Named:
    """The accumulated vectors by name, as Python numbers."""

    def __init__(self, accumulated: Accumulators) -> None:
        names = accumulated.names
        self.counts: dict[str, int] = dict(zip(names.counts, accumulated.counts.tolist(), strict=True))
        self.sums: dict[str, float] = dict(zip(names.sums, accumulated.sums.tolist(), strict=True))
        self.log_sums: dict[str, float] = dict(zip(names.log_sums, accumulated.log_sums.tolist(), strict=True))
        self.minima: dict[str, float] = dict(zip(names.extremes, accumulated.minima.tolist(), strict=True))
        self.maxima: dict[str, float] = dict(zip(names.extremes, accumulated.maxima.tolist(), strict=True))
        self.bins = dict(zip(names.quantities, accumulated.bin_count.numpy(), strict=True))

    def mean(self, name: str) -> float | None:
        """None where the quantity was not computed or has no finite value."""
        return _ratio(self.sums.get(name, 0.0), self.counts.get(name, 0))

    def extreme(self, name: str, values: dict[str, float]) -> float | None:
        return values[name] if self.counts.get(f"{name}_known", 0) else None

    def distribution(self, prefix: str, binned: tuple[str, ...], suffix: str = "") -> dict[str, Scalar]:
        quantity, *sides = binned
        name = prefix if not suffix else f"{prefix}_{sides[0]}"
        low, high = self.extreme(name, self.minima), self.extreme(name, self.maxima)
        total = self.sums.get(name if not suffix else f"{name}_1", 0.0)
        found: dict[str, Scalar] = {
            f"{prefix}_mean{suffix}": _ratio(total, self.counts.get(name, 0)),
            f"{prefix}_min{suffix}": low,
            f"{prefix}_max{suffix}": high,
        }
        counts = self.bins.get(quantity)
        values: list[float | None] = [None] * len(_LEVELS)
        if counts is not None and self.counts.get(name, 0):
            here = sum(counts[SIDES.index(side)] for side in sides)
            # ±Inf lies in the open end bins, and a quantile is over finite values
            above = self.counts[f"{name}_infinite"]
            below = self.counts[f"{name}_known"] - self.counts[name] - above
            here[0], here[-1] = max(here[0] - below, 0), max(here[-1] - above, 0)
            values = [None if math.isnan(v) else v for v in quantiles(here, _LEVELS, low, high).tolist()]
        return found | {f"{prefix}_{q}{suffix}": v for q, v in zip(QUANTILE_LEVELS, values, strict=True)}

    def top_share(self) -> float | None:
        """Share of the top hundredth, with every token at the middle of its bin."""
        counts = self.bins["logit_grad_norm"][: len(SIDES)].sum(axis=0)[::-1].astype(np.float64)
        edges = EDGES.copy()
        edges[-1], edges[0] = max(self.maxima["logit_grad_norm"], edges[-2]), edges[1]
        if not np.isfinite(edges[-1]):
            edges[-1] = edges[-2]
        middle = np.maximum((edges[:-1] + edges[1:]) / 2, 0.0)[::-1]
        total = float(counts @ middle)
        taken = np.diff(np.minimum(np.cumsum(counts), math.ceil(counts.sum() / 100)), prepend=0.0)
        return float(taken @ middle) / total if total > 0 else None


def _ratio(total: float, n: float) -> float | None:
    return total / n if n else None
