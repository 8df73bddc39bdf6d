"""The distribution of an objective's terms over a recorded step, from its histogram of log-ratios alone.

ψ, ζ, survival weight and multiplier of a token depend on its ratio and the sign of its advantage, so one histogram
answers for any such objective and any hyperparameters, also ones the run did not train with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mhpo_core.batch import TokenBatch
from mhpo_core.errors import ObjectiveError
from mhpo_core.histograms import EDGES, N_BINS
from mhpo_core.objectives import Objective
from mhpo_core.telemetry.summary import Histogram

_SIGNS = {"positive": 1.0, "negative": -1.0, "zero": 0.0}


@dataclass(frozen=True)
class TermDistribution:
    """Values of a term with how often they occur; one entry per filled bin and side.

    Args:
        side: positive, negative or zero: the sign of the advantage.
        value: the term at the middle of the bin; off by at most the term's change over half a bin, which is 1/16 of
            the log-ratio wide.
        count: tokens.
        advantage_weight: Σ|A| of these tokens.
    """

    side: NDArray[np.str_]
    value: NDArray[np.float64]
    count: NDArray[np.int64]
    advantage_weight: NDArray[np.float64]

    @property
    def mean(self) -> float | None:
        """Mean over tokens with a finite value; None if there is none."""
        finite = np.isfinite(self.value) & (self.count > 0)
        return float(np.average(self.value[finite], weights=self.count[finite])) if finite.any() else None


def term_distribution(objective: Objective, histograms: Sequence[Histogram], term: str) -> TermDistribution:
    """What `term` of the objective is over the tokens of these histograms.

    Args:
        histograms: of any quantities; those of log_ratio are read.
        term: a field of `Terms` that the objective has, such as gradient_multiplier or survival_weight.

    Raises:
        ObjectiveError: the terms need more than a token's own ratio (sequence level, DPPO, a wrapper), or the
            objective has no such term.
    """
    if not objective.follows_from_ratio:
        raise ObjectiveError(
            f"term_distribution: the terms of {objective.name} need more than a token's own ratio, allowed are "
            "token-level objectives of the ratio. Evaluate it on the recorded tokens."
        )
    parts = [
        (np.full(len(bins), h.side), _at_middle(objective, h.side, term)[bins], h.count[bins], h.advantage_weight[bins])
        for h in histograms
        if h.quantity == "log_ratio" and h.advantage_weight is not None
        for bins in [np.flatnonzero(h.count)]
    ]
    if not parts:
        return TermDistribution(np.empty(0, str), np.empty(0), np.empty(0, np.int64), np.empty(0))
    return TermDistribution(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _at_middle(objective: Objective, side: str, term: str) -> NDArray[np.float64]:
    middle = (EDGES[:-1] + EDGES[1:]) / 2  # ±Inf for the open end bins, which is where the ratio tends to
    new = torch.from_numpy(middle)[:, None]
    advantage = torch.full((N_BINS,), _SIGNS[side], dtype=torch.float64)
    terms = objective.terms(TokenBatch(new, torch.zeros_like(new), advantage, torch.ones_like(new)))
    values = getattr(terms, term, None)
    if term == "surrogate" or not isinstance(values, torch.Tensor):
        raise ObjectiveError(
            f"term_distribution: {objective.name} has no term {term!r} that follows from the ratio. "
            "Ask for gradient_multiplier, which every objective has."
        )
    return values[:, 0].double().numpy()
