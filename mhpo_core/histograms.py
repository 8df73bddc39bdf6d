"""One set of fixed log-linear bins for every recorded distribution, so that histograms merge by addition.

Bins are cut from the bits of a float32: 8 per octave from 2⁻¹⁴ to 2⁴ on each side of zero, one around zero, one open
bin at each end. Relative width is at most 1/8. Source of the idea: HDR histograms; of the range: measured log-ratios.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SMALLEST_EXPONENT, _LARGEST_EXPONENT, _MANTISSA_BITS = -14, 4, 3
_PER_SIDE = (_LARGEST_EXPONENT - _SMALLEST_EXPONENT) << _MANTISSA_BITS
_FIRST_CODE = (127 + _SMALLEST_EXPONENT) << _MANTISSA_BITS

ZERO_BIN = _PER_SIDE + 1
N_BINS = 2 * ZERO_BIN + 1


def _positive_edges() -> NDArray[np.float64]:
    mantissa = 1 + np.arange(1 << _MANTISSA_BITS) / (1 << _MANTISSA_BITS)
    octaves = 2.0 ** np.arange(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    return np.append((octaves[:, None] * mantissa).ravel(), 2.0**_LARGEST_EXPONENT)


_POSITIVE = _positive_edges()
EDGES: NDArray[np.float64] = np.concatenate([[-np.inf], -_POSITIVE[::-1], _POSITIVE, [np.inf]])
"""Edges of the bins, N_BINS + 1 of them; bin i holds EDGES[i] ≤ x < EDGES[i+1] for x > 0, mirrored for x < 0."""


def bin_index(values: Tensor) -> Tensor:
    """Bin of each value, int64 in [0, N_BINS); values must not be NaN.

    Args:
        values: any shape, evaluated as float32.
    """
    bits = values.float().contiguous().view(torch.int32)
    code = ((bits & 0x7FFFFFFF) >> (23 - _MANTISSA_BITS)) - _FIRST_CODE
    distance = (code + 1).clamp(0, _PER_SIDE + 1).long()
    return torch.where(bits < 0, ZERO_BIN - distance, ZERO_BIN + distance)


def quantiles(
    counts: NDArray[np.integer], levels: NDArray[np.float64], low: float | None = None, high: float | None = None
) -> NDArray[np.float64]:
    """Quantiles of binned values, with values spread evenly inside a bin.

    Each lies in the bin of the value at rank ⌈level·n⌉, so it is at most one bin width from that value. Nothing is
    interpolated across empty bins.

    Args:
        counts: (..., N_BINS).
        levels: (Q,), in [0, 1].
        low, high: smallest and largest value where known; open end bins then end there.

    Returns:
        (..., Q); NaN where a histogram is empty.
    """
    edges = EDGES.copy()
    edges[0] = min(low, -_POSITIVE[-1]) if low is not None and np.isfinite(low) else -_POSITIVE[-1]
    edges[-1] = max(high, _POSITIVE[-1]) if high is not None and np.isfinite(high) else _POSITIVE[-1]
    flat = np.asarray(counts, dtype=np.float64).reshape(-1, counts.shape[-1])
    cumulative = np.cumsum(flat, axis=1)
    total = cumulative[:, -1]
    filled, rows = flat > 0, np.arange(len(flat))
    first, last = filled.argmax(axis=1), flat.shape[1] - 1 - filled[:, ::-1].argmax(axis=1)
    result = np.full((len(flat), len(levels)), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        for column, level in enumerate(levels):
            target = level * total
            index = np.clip((cumulative < target[:, None]).sum(axis=1), first, last)
            share = np.clip((target - cumulative[rows, index]) / flat[rows, index] + 1, 0, 1)
            result[:, column] = edges[index] + share * (edges[index + 1] - edges[index])
    result[total == 0] = np.nan
    if low is not None or high is not None:
        result = np.clip(result, low if low is not None else -np.inf, high if high is not None else np.inf)
    return result.reshape(*counts.shape[:-1], len(levels))
