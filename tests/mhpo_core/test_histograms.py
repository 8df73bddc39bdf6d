"""Fixed bins: every value in its bin, symmetric, additive; quantiles in the bin of the right value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhpo_core.histograms import EDGES, N_BINS, ZERO_BIN, bin_index, quantiles

FLOATS = st.floats(width=32, allow_nan=False)
SMALL = st.floats(-20, 20, width=32)
LEVELS = np.array([0.0, 0.0001, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0])


def bins(values) -> np.ndarray:
    return bin_index(torch.tensor(values, dtype=torch.float32)).numpy()


def counts(values) -> np.ndarray:
    return np.bincount(bins(values), minlength=N_BINS)


def test_the_edges_by_hand():
    # 8 per octave over the 18 octaves 2⁻¹⁴ … 2⁴, both sides; the zero bin and two open ends
    assert len(EDGES) == N_BINS + 1 == 2 * (18 * 8 + 1) + 2
    assert EDGES[ZERO_BIN] == -(2.0**-14) and EDGES[ZERO_BIN + 1] == 2.0**-14
    assert EDGES[1] == -16 and EDGES[-2] == 16 and EDGES[0] == -math.inf and EDGES[-1] == math.inf
    one = int(bins([1.0])[0])
    assert EDGES[one : one + 9].tolist() == [1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2]


def test_the_edges_rise_mirror_and_are_narrow():
    assert (np.diff(EDGES) > 0).all() and (-EDGES[::-1] == EDGES).all()
    positive = EDGES[ZERO_BIN + 1 : -1]
    assert (np.diff(positive) / positive[:-1]).max() <= 1 / 8


@given(st.lists(FLOATS | SMALL, min_size=1, max_size=50))
@settings(deadline=None, max_examples=200)
def test_every_value_lies_in_its_bin(values):
    for value, index in zip(values, bins(values), strict=True):
        low, high = EDGES[index], EDGES[index + 1]
        if index == ZERO_BIN:
            assert low < value < high
        else:
            assert (
                low <= value < high or value == high == math.inf if value > 0 else low < value <= high or value == low
            )
        assert bins([-value])[0] == N_BINS - 1 - index


@pytest.mark.parametrize("side", [1, -1])
def test_an_edge_belongs_to_the_bin_further_out(side):
    edges = EDGES[ZERO_BIN + 1 : -1]
    assert bins(side * edges).tolist() == (ZERO_BIN + side * np.arange(1, len(edges) + 1)).tolist()


def test_special_values():
    found = bins([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, 3e38, -3e38])
    assert found.tolist() == [ZERO_BIN] * 4 + [N_BINS - 1, 0] * 2


def test_doubles_and_slices_are_evaluated_as_float32():
    values = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert torch.equal(bin_index(values[::2]), bin_index(values.float()[::2].contiguous()))
    assert bin_index(torch.tensor([1e300], dtype=torch.float64)).item() == N_BINS - 1


@given(st.lists(SMALL, min_size=1, max_size=80), st.lists(SMALL, min_size=1, max_size=80))
@settings(deadline=None, max_examples=50)
def test_merging_is_addition(left, right):
    merged, whole = counts(left) + counts(right), counts(left + right)
    assert (merged == whole).all() and whole.sum() == len(left) + len(right)
    np.testing.assert_array_equal(quantiles(merged, LEVELS), quantiles(whole, LEVELS))


@given(st.lists(st.floats(-15.875, 15.875, width=32), min_size=1, max_size=120))
@settings(deadline=None, max_examples=200)
def test_a_quantile_lies_in_the_bin_of_the_right_value(values):
    found = quantiles(counts(values), LEVELS)
    right = np.quantile(np.array(values), LEVELS, method="inverted_cdf")
    index = bins(right)
    assert (EDGES[index] <= found).all() and (found <= EDGES[index + 1]).all()
    assert (np.diff(found) >= 0).all()


def test_on_dense_values_a_quantile_is_within_a_bin_of_the_interpolated_one():
    values = np.random.default_rng(0).normal(0.0, 0.5, 20_000).astype(np.float32)
    levels = np.linspace(0.001, 0.999, 57)
    exact = np.quantile(values.astype(np.float64), levels)
    index = bins(exact)
    assert (np.abs(quantiles(counts(values), levels) - exact) <= (EDGES[index + 1] - EDGES[index])).all()


def test_values_are_spread_evenly_inside_a_bin():
    # four values in the bin 1 … 1.125: the quarter-quantiles are a quarter of 0.125 apart
    found = quantiles(counts([1.0, 1.01, 1.02, 1.03]), np.array([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert found.tolist() == pytest.approx([1.0, 1.03125, 1.0625, 1.09375, 1.125], rel=1e-15)


def test_open_bins_end_at_the_known_extremes():
    binned, ends = counts([-40.0, 0.0, 100.0]), np.array([0.0, 1.0])
    assert quantiles(binned, ends, low=-40.0, high=100.0).tolist() == [-40.0, 100.0]
    assert quantiles(binned, ends).tolist() == [-16.0, 16.0]
    assert quantiles(binned, ends, low=-math.inf, high=math.inf).tolist() == [-16.0, 16.0]


def test_known_extremes_also_bound_closed_bins():
    found = quantiles(counts([1.01, 1.02]), np.array([0.0, 0.5, 1.0]), low=1.01, high=1.02)
    # the bin 1 … 1.125 has its middle at 1.0625; nothing lies above 1.02
    assert found.tolist() == [1.01, 1.02, 1.02]


def test_many_histograms_at_once_and_empty_ones():
    samples = [[0.5, 0.6, -2.0], [], [3.0] * 5]
    stacked = np.stack([counts(v) for v in samples]).reshape(3, 1, N_BINS)
    found = quantiles(stacked, LEVELS)
    for row, values in zip(found[:, 0], samples, strict=True):
        expected = quantiles(counts(values), LEVELS) if values else np.full(len(LEVELS), math.nan)
        np.testing.assert_array_equal(row, expected)
