"""Histograms of log-ratios over time as an image: asinh scale, logarithmic colour.

Shape letters: K columns of steps, Y rows of the image.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mhpo_core.histograms import EDGES

ROWS = 96
# Linear within ± this many nats, logarithmic beyond: a healthy spread stays round and a tail of 10 nats is still there.
LINEAR_WITHIN = 0.1
LIMITS = (0.3, 1.0, 3.0, 10.0, 30.0)
TICKS = (0.0, 0.05, 0.2, 1.0, 3.0, 10.0)
# Shares of tokens below this get the faintest colour; a single token of a step stays visible.
FAINTEST_SHARE = 1e-5
_FIRST_SHADE = 0.14

Floats = NDArray[np.float64]


def to_axis(log_ratio: NDArray[np.floating] | float) -> Floats:
    """Position on the axis of a log-ratio."""
    return np.asarray(np.arcsinh(np.asarray(log_ratio, dtype=np.float64) / LINEAR_WITHIN))


def axis_limit(extremes: NDArray[np.floating]) -> float:
    """Smallest of LIMITS that holds every finite extreme; steps, so that the axis does not breathe."""
    finite = np.abs(extremes[np.isfinite(extremes)])
    largest = float(finite.max()) if finite.size else 0.0
    return next((limit for limit in LIMITS if largest <= limit), LIMITS[-1])


def image(counts: NDArray[np.integer], limit: float) -> tuple[Floats, NDArray[np.uint8]]:
    """Density image of histograms.

    Args:
        counts: (K, N_BINS) tokens per bin.
        limit: half-height of the axis, nats; what lies outside is drawn in the outermost row.

    Returns:
        (Y,) row centres on the axis, and (Y, K) shades: 0 = no token, then logarithmic in the share of tokens.
    """
    centres, weights = _rebinning(limit)
    spread = counts.astype(np.float32) @ weights
    total = spread.sum(axis=1, keepdims=True)
    share = np.divide(spread, total, out=np.zeros_like(spread), where=total > 0)
    depth = 1 + np.log10(np.maximum(share, FAINTEST_SHARE)) / -np.log10(FAINTEST_SHARE)
    shade = np.where(share > 0, _FIRST_SHADE + (1 - _FIRST_SHADE) * depth, 0.0)
    return centres, np.round(255 * shade).astype(np.uint8).T.copy()


@lru_cache(maxsize=len(LIMITS))
def _rebinning(limit: float) -> tuple[Floats, NDArray[np.float32]]:
    top = float(to_axis(limit))
    rows = np.linspace(-top, top, ROWS + 1)
    edges = np.clip(to_axis(np.clip(EDGES, -1e9, 1e9)), -top, top)
    low, high = edges[:-1, None], edges[1:, None]
    overlap = np.clip(np.minimum(high, rows[None, 1:]) - np.maximum(low, rows[None, :-1]), 0, None)
    # bins outside the axis have no height left; their tokens belong to the outermost row
    outside = np.flatnonzero((high - low)[:, 0] <= 0)
    overlap[outside] = 0
    overlap[outside, np.where(outside < len(EDGES) // 2, 0, ROWS - 1)] = 1
    weights = overlap / overlap.sum(axis=1, keepdims=True)
    return (rows[:-1] + rows[1:]) / 2, weights.astype(np.float32)
