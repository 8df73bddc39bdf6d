"""What is kept of a step's tokens when only sums, counts, extremes and histograms may be kept: all of it merges.

Counts, histograms and extremes of the parts of any split merge to exactly those of the whole, in any order; sums of
floating-point numbers to within their rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mhpo_core.errors import BatchError

OUTLIERS = 32
ADVANTAGE_UNIT = 2.0**-20
"""One unit of the fixed-point weights |A|; |A| is capped at 2¹⁸, so 1e8 tokens cannot overflow 64 bits in practice."""

OUTLIER_FIELDS = ("log_ratio", "logp_new", "logp_old", "advantage", "gradient_multiplier", "logit_grad_norm")


@dataclass(frozen=True)
class Accumulators:
    """Mergeable statistics of the tokens of a part of a step, on the device they were computed on.

    Letters: C counts, S sums, L log-sums, E extremes, Q binned quantities, K outliers, 4 sides (A > 0, A < 0, A = 0,
    A is NaN).

    Args:
        names: names of the counts, sums, extremes and binned quantities, the same for every part of a run.
        counts: (C,) int64.
        sums: (S,) float64.
        log_sums: (L,) float64, log Σ exp.
        minima, maxima: (E,) float64, ±Inf kept, NaN ignored; +Inf and −Inf where there was nothing.
        bin_count: (Q, 4, N_BINS) int64.
        bin_weight: (Q, 4, N_BINS) float64, Σ|A·M| of the bin's tokens.
        bin_advantage: (4, N_BINS) int64, Σ|A| of the bins of log_ratio in units of ADVANTAGE_UNIT.
        outliers: (2, K, F) float64, the largest |log r| for A > 0 and A < 0, largest first, columns OUTLIER_FIELDS;
            NaN where there are fewer.
        outlier_place: (2, K, 2) int64, row and position of each, −1 where there are fewer.
        n_rows: rows of the part; the rows of a merged part are counted on from those before it.
    """

    names: AccumulatorNames
    counts: Tensor
    sums: Tensor
    log_sums: Tensor
    minima: Tensor
    maxima: Tensor
    bin_count: Tensor
    bin_weight: Tensor
    bin_advantage: Tensor
    outliers: Tensor
    outlier_place: Tensor
    n_rows: int

    def cpu(self) -> Accumulators:
        """The same on the CPU, in two transfers."""
        moved: dict[str, Any] = {}
        tensors = {f.name: getattr(self, f.name) for f in fields(self)[1:-1]}
        for dtype in (torch.int64, torch.float64):
            here = {name: t for name, t in tensors.items() if t.dtype == dtype}
            joined = torch.cat([t.reshape(-1) for t in here.values()]).cpu()
            pieces = torch.split(joined, [t.numel() for t in here.values()])
            moved |= {name: piece.view(t.shape) for (name, t), piece in zip(here.items(), pieces, strict=True)}
        return replace(self, **moved)


@dataclass(frozen=True)
class AccumulatorNames:
    """What each entry of the vectors of Accumulators is."""

    counts: tuple[str, ...]
    sums: tuple[str, ...]
    log_sums: tuple[str, ...]
    extremes: tuple[str, ...]
    quantities: tuple[str, ...]


def merge(parts: Sequence[Accumulators]) -> Accumulators:
    """The statistics of all parts together (micro-batches, ranks).

    Raises:
        BatchError: there is no part, or the parts have different optional inputs or objectives of different kinds.
    """
    if not parts:
        raise BatchError("merge: got no part, at least one is needed. Skip the step.")
    first = parts[0]
    if any(p.names != first.names for p in parts):
        raise BatchError(
            "merge: the parts hold different quantities, allowed are parts with the same optional inputs and the same "
            "objective. Pass logp_rollout, logp_ref and entropy in all of them or in none."
        )

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(p, name) for p in parts])

    place, rows = [], 0
    for part in parts:
        offset = torch.tensor([rows, 0], device=part.outlier_place.device)
        place.append(torch.where(part.outlier_place >= 0, part.outlier_place + offset, -1))
        rows += part.n_rows
    outliers, places = torch.cat([p.outliers for p in parts], dim=1), torch.cat(place, dim=1)
    best = outliers[..., 0].abs().nan_to_num(nan=-1.0, posinf=torch.inf).topk(OUTLIERS, dim=1).indices[..., None]
    return Accumulators(
        names=first.names,
        counts=stacked("counts").sum(0),
        sums=stacked("sums").sum(0),
        log_sums=stacked("log_sums").logsumexp(0),
        minima=stacked("minima").amin(0),
        maxima=stacked("maxima").amax(0),
        bin_count=stacked("bin_count").sum(0),
        bin_weight=stacked("bin_weight").sum(0),
        bin_advantage=stacked("bin_advantage").sum(0),
        outliers=outliers.gather(1, best.expand(-1, -1, outliers.shape[2])),
        outlier_place=places.gather(1, best.expand(-1, -1, 2)),
        n_rows=rows,
    )
