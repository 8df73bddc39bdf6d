"""Down-sampling keeps every spike, every value that is not finite and both extremes, and merges exactly."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.bin_tables import ROLLUP_TEXTS, bins_from_table, bins_of_steps, bins_to_table
from collectors.bins import Bins, coarsen, concatenate, count_bins, drop_to
from mhpo_core.histograms import N_BINS
from mhpo_core.metrics import METRICS, SIDES
from tests.collectors.rollups import assert_same_bins, random_rows, rollup_rows

HUGE = st.sampled_from([1.7e308, -1.7e308, 5e-324, -0.0])
VALUES = st.none() | st.floats(width=64) | st.sampled_from([math.nan, math.inf, -math.inf]) | HUGE
INTEGERS = st.none() | st.integers(0, 2**50)
GAPS = st.integers(1, 3) | st.integers(1, 2**40)


@st.composite
def tables(draw) -> pa.Table:
    """Rows of `rollup` whose steps rise, with gaps of any size."""
    gaps = draw(st.lists(GAPS, min_size=1, max_size=40))
    n = len(gaps)
    cell = st.tuples(st.sampled_from(list(SIDES)), st.integers(0, N_BINS - 1), st.integers(1, 2**40))

    def column(values: st.SearchStrategy) -> list:
        return draw(st.lists(values, min_size=n, max_size=n))

    return rollup_rows(
        (np.cumsum(gaps) - 1).tolist(),
        {"loss": column(VALUES), "grad_norm": column(VALUES), "n_tokens": column(INTEGERS)},
        gradients=column(st.dictionaries(st.sampled_from("abc"), st.floats(width=64), max_size=3)),
        cells=column(st.lists(cell, max_size=3, unique_by=lambda c: c[:2])),
    )


NAMES = ["loss", "grad_norm", "n_tokens", "lr"]


@settings(max_examples=80, deadline=None)
@given(tables(), st.integers(1, 12))
def test_down_sampling_keeps_every_spike_and_every_value_that_is_not_finite(table, max_points):
    steps = bins_of_steps(table, NAMES)
    found = drop_to(steps, max_points)
    assert 1 <= found.size <= max_points and found.n_steps.sum() == table.num_rows
    place = np.searchsorted(found.last, table["step"].to_numpy())
    assert (found.first[place] <= table["step"].to_numpy()).all()
    mean = found.metrics.mean()
    for column, name in enumerate(NAMES):
        values = table[name].to_pylist()
        for row, value in enumerate(values):
            if value is not None and math.isfinite(value):
                assert found.metrics.low[place[row], column] <= value <= found.metrics.high[place[row], column]
                assert math.isfinite(mean[place[row], column])
        finite = [v for v in values if v is not None and math.isfinite(v)]
        assert found.metrics.low[:, column].min() == min(finite, default=math.inf)
        assert found.metrics.high[:, column].max() == max(finite, default=-math.inf)
        seen = found.metrics
        counts = [c[:, column].sum() for c in (seen.finite, seen.nan, seen.above, seen.below)]
        known = [v for v in values if v is not None]
        nans = sum(v != v for v in known)
        assert counts == [len(finite), nans, known.count(math.inf), known.count(-math.inf)]
        assert found.n_steps.sum() - sum(counts) == values.count(None)


@settings(max_examples=50, deadline=None)
@given(tables(), st.integers(1, 5), st.integers(1, 3))
def test_merging_twice_is_merging_once(table, once, again):
    steps = bins_of_steps(table, NAMES)
    assert_same_bins(coarsen(coarsen(steps, 2**once), 2 ** (once + again)), coarsen(steps, 2 ** (once + again)))


@settings(max_examples=50, deadline=None)
@given(tables(), st.data(), st.sampled_from([1, 3, 8]))
def test_parts_merge_to_the_whole(table, data, width):
    cuts = sorted(data.draw(st.lists(st.integers(0, table.num_rows), max_size=3)))
    pieces = [table.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, table.num_rows], strict=True)]
    parts = [coarsen(bins_of_steps(piece, NAMES), width) for piece in pieces]
    assert_same_bins(concatenate(parts), coarsen(bins_of_steps(table, NAMES), width))


@settings(max_examples=50, deadline=None)
@given(tables(), st.sampled_from([8, 64]))
def test_bins_survive_the_way_through_a_file(table, width):
    bins = coarsen(bins_of_steps(table, NAMES), width)
    sink = pa.BufferOutputStream()
    pq.write_table(bins_to_table(bins), sink, store_schema=False)
    back = bins_from_table(pq.read_table(pa.BufferReader(sink.getvalue())))
    assert_same_bins(back, bins)
    assert back.metrics.names == bins.metrics.names and back.gradients.names == bins.gradients.names
    np.testing.assert_array_equal(back.metrics.total, bins.metrics.total)


@settings(max_examples=50, deadline=None)
@given(tables(), st.sampled_from([2, 8, 512]))
def test_how_many_bins_of_half_the_width_there_would_be(table, width):
    bins = coarsen(bins_of_steps(table, []), width)
    halves = len(set((table["step"].to_numpy() // (width // 2)).tolist()))
    assert count_bins(bins.first, bins.last, width // 2) == halves


@settings(max_examples=50, deadline=None)
@given(tables(), st.integers(1, 12))
def test_the_width_is_no_larger_than_it_must_be(table, max_points):
    found = drop_to(bins_of_steps(table, []), max_points)
    assert found.width & (found.width - 1) == 0
    if found.width > 1:
        assert len(set((table["step"].to_numpy() // (found.width // 2)).tolist())) > max_points


def test_every_column_of_a_step_is_in_its_bin():
    table = random_rows(40)
    bins = bins_of_steps(table, list(METRICS))
    for column, name in enumerate(METRICS):
        np.testing.assert_array_equal(bins.metrics.mean()[:, column], table[name].to_numpy())
    for row, cells in enumerate(table["histograms"].to_pylist()):
        wanted = np.zeros((len(SIDES), N_BINS), np.int64)
        for cell in cells:
            if cell["quantity"] == "log_ratio":
                wanted[list(SIDES).index(cell["side"]), cell["bin"]] += cell["count"]
        np.testing.assert_array_equal(bins.log_ratio[row], wanted)
    for row, groups in enumerate(table["gradients"].to_pylist()):
        assert dict(zip(bins.gradients.names, bins.gradients.total[row], strict=True)) == {
            g["parameter"]: g["grad_norm"] for g in groups
        }


def test_texts_may_be_dictionaries():
    table = random_rows(5)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, store_schema=False)
    encoded = pq.ParquetFile(pa.BufferReader(sink.getvalue()), read_dictionary=ROLLUP_TEXTS).read()
    assert pa.types.is_dictionary(encoded.schema.field("histograms").type.value_type.field("side").type)
    assert_same_bins(bins_of_steps(encoded, ["loss"]), bins_of_steps(table, ["loss"]))
    assert_same_bins(bins_of_steps(encoded.slice(2, 2), ["loss"]), bins_of_steps(table.slice(2, 2), ["loss"]))


def test_no_steps_are_no_bins():
    bins = bins_of_steps(rollup_rows([]), NAMES)
    assert bins.size == 0 and bins.metrics.names == NAMES
    assert drop_to(bins, 5).size == coarsen(bins, 8).size == 0 and coarsen(bins, 8).width == 8
    assert concatenate([bins, bins]).size == 0


def test_a_group_without_a_norm_is_none():
    table = rollup_rows([0, 1], gradients=[{"a": 1.0}, {"a": None, "b": None}])  # type: ignore[dict-item]
    assert bins_of_steps(table, []).gradients.names == ["a"]
    assert bins_of_steps(table.slice(1), []).gradients.names == []


def test_a_mean_of_huge_values_is_finite_and_between_them():
    huge = np.finfo(np.float64).max
    table = rollup_rows([0, 1, 2, 3], {"loss": [huge, huge, -huge, -huge], "lr": [huge, huge, huge, 1.0]})
    bins = drop_to(bins_of_steps(table, ["loss", "lr", "grad_norm"]), 1)
    (loss, lr, missing), *_ = bins.metrics.mean()
    assert -huge <= loss <= huge and 0 < lr <= huge and math.isnan(missing)


@pytest.mark.parametrize("size", [0, 3])
def test_empty_bins_have_room_for_their_size(size):
    bins = Bins.empty(size, 4, ["loss"])
    assert (bins.size, bins.width, bins.log_ratio.shape) == (size, 4, (size, len(SIDES), N_BINS))
