"""How heavy the upper tail of the importance ratios is: the shape k̂ of a generalised Pareto distribution.

k̂ < 0.5: the variance exists; up to 0.7 the mean of the batch is still of use; above 1 not even the mean exists.
Source: Vehtari et al., Pareto smoothed importance sampling, arXiv 1507.02646; fit by Zhang and Stephens 2009.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_PRIOR, _PRIOR_COUNT = 3, 10
_AT_LEAST = 20  # ratios in the tail
_LARGEST = 300.0  # nats: exp of it squared is still a float64


def pareto_k(low: NDArray[np.float64], high: NDArray[np.float64], count: NDArray[np.float64]) -> float | None:
    """k̂ of the ratios exp(x) of a histogram of log-ratios x, from the min(n/5, 3√n) largest of its n ratios.

    Args:
        low, high: edges of the bins, nats; ±Inf at an open end.
        count: of each bin.

    Returns:
        None where the tail has fewer than 20 ratios, or all of them are in one bin.
    """
    n = float(count.sum())
    wanted = min(n / 5, 3 * math.sqrt(n))
    if wanted < _AT_LEAST:
        return None
    order = np.argsort(-low)
    order = order[count[order] > 0]
    cut = int(np.searchsorted(np.cumsum(count[order]), wanted))
    if cut == 0:
        return None
    edges = np.stack([low[order], high[order]])
    edges = np.where(np.isfinite(edges), edges, edges[::-1])
    middle = np.exp(np.clip(edges.mean(axis=0), -_LARGEST, _LARGEST))
    # what lies in the bin of the cut is below it; the tail are the bins above
    above, weight = middle[:cut] - float(np.exp(min(edges[1, cut], _LARGEST))), count[order][:cut]
    return _fit(np.maximum(above[::-1], 1e-12), weight[::-1])


def _fit(above: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """Shape of the excesses, ascending, each as often as its weight; weakly drawn towards 1/2."""
    n = float(weight.sum())
    quartile = above[np.searchsorted(np.cumsum(weight), n / 4)]
    m = 30 + int(math.sqrt(n))
    grid = 1 / above[-1] + (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (_PRIOR * quartile)
    grid = grid[np.abs(grid) > 1e-30]
    shape = np.log1p(-np.clip(grid[:, None] * above, None, 1 - 1e-12)) @ weight / n
    likelihood = n * (np.log(np.maximum(-grid / shape, 1e-300)) - shape - 1)
    posterior = np.exp(likelihood - likelihood.max())
    best = float(grid @ posterior / posterior.sum())
    k = float(np.log1p(-np.clip(best * above, None, 1 - 1e-12)) @ weight / n)
    return (n * k + _PRIOR_COUNT * 0.5) / (n + _PRIOR_COUNT)
