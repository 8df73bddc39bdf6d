"""k̂ against samples of known shape and against the fit to the raw ratios."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mhpo_core.alarms.tail import pareto_k
from mhpo_core.histograms import EDGES, N_BINS, bin_index


def histogram(log_ratio: np.ndarray) -> np.ndarray:
    return np.bincount(bin_index(torch.from_numpy(log_ratio)).numpy(), minlength=N_BINS).astype(np.float64)


def k_of(log_ratio: np.ndarray) -> float | None:
    return pareto_k(EDGES[:-1], EDGES[1:], histogram(log_ratio))


def raw_k(ratio: np.ndarray) -> float:
    """Zhang and Stephens' fit to the raw ratios, written as arviz and loo do."""
    ratio = np.sort(ratio)
    size = int(min(len(ratio) / 5, 3 * math.sqrt(len(ratio))))
    y = ratio[-size:] - ratio[-size - 1]
    n, m = len(y), 30 + int(math.sqrt(len(y)))
    b = 1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))
    b = b / (3 * y[int(n / 4 + 0.5) - 1]) + 1 / y[-1]
    k = np.log1p(-b[:, None] * y).mean(axis=1)
    length = n * (np.log(-b / k) - k - 1)
    with np.errstate(over="ignore"):
        w = 1 / np.exp(length - length[:, None]).sum(axis=1)
    best = (b * w).sum() / w.sum()
    return (n * np.log1p(-best * y).mean() + 5) / (n + 10)


@pytest.mark.parametrize("k", [0.2, 0.7, 1.2])
def test_a_pareto_tail_has_its_shape(k: float) -> None:
    draw = np.random.default_rng(0).random(200_000)
    ratio = 1 + (draw**-k - 1) / k
    found = k_of(np.log(ratio))
    assert found == pytest.approx(raw_k(ratio), abs=0.11)  # bins are an eighth of the log-ratio wide
    assert found == pytest.approx(k, abs=0.15)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0])
def test_log_normal_ratios_as_the_fit_to_the_raw_ones(sigma: float) -> None:
    x = sigma * np.random.default_rng(1).standard_normal(50_000)
    assert k_of(x) == pytest.approx(raw_k(np.exp(x)), abs=0.12)


def test_where_there_is_no_tail_there_is_no_shape() -> None:
    assert k_of(np.zeros(10_000)) is None
    assert k_of(np.random.default_rng(2).standard_normal(80)) is None
    assert pareto_k(EDGES[:-1], EDGES[1:], np.zeros(N_BINS)) is None


def test_outliers_in_a_few_tokens_make_it_heavy() -> None:
    draw = np.random.default_rng(3)
    x = 0.05 * draw.standard_normal(20_000)
    calm = k_of(x)
    x[:400] += 5 * draw.standard_normal(400)
    assert calm is not None and calm < 0.5 and (k_of(x) or 0) > 1
