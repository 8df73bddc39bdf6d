"""A window of merged steps says what a direct computation over all its steps says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.bins import Bins, Stats, concatenate
from collectors.window import StepSummary, Window
from mhpo_core.histograms import N_BINS
from tests.collectors.rollups import assert_same_bins

NAMES = ["loss", "lr"]
VALUES = st.none() | st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@st.composite
def histories(draw) -> list[StepSummary]:
    gaps = draw(st.lists(st.integers(1, 3) | st.integers(1, 2**40), min_size=1, max_size=60))
    summaries = []
    for step in np.cumsum(gaps) - 1:
        counts = np.zeros((3, N_BINS), np.int64)
        counts[draw(st.integers(0, 2)), draw(st.integers(0, N_BINS - 1))] = draw(st.integers(0, 1000))
        gradients = {g: draw(VALUES) for g in sorted(draw(st.sets(st.sampled_from("abc"))))}
        gradients = {g: v for g, v in gradients.items() if v is not None}
        summaries.append(StepSummary(int(step), float(step), {n: draw(VALUES) for n in NAMES}, gradients, counts))
    return summaries


def fill(history: list[StepSummary], capacity: int, width: int, forget: bool) -> Window:
    window = Window(capacity, NAMES, width=width, forget=forget)
    for summary in history:
        window.add(summary)
        assert 1 <= window.size <= capacity
        assert window.last[window.size - 1] == summary.step
    return window


def check_stats(found: Stats, bin_: int, size: int, name: str, values: list[float | None]) -> None:
    column = found.names.index(name)
    known = [v for v in values if v is not None]
    finite = [v for v in known if math.isfinite(v)]
    counts = [found.nan, found.above, found.below, found.nonfinite]
    nans = sum(math.isnan(v) for v in known)
    assert [count[bin_, column] for count in counts] == [
        nans, known.count(math.inf), known.count(-math.inf), len(known) - len(finite),
    ]  # fmt: skip
    assert found.low[bin_, column] == min(finite, default=math.inf)
    assert found.high[bin_, column] == max(finite, default=-math.inf)
    mean = found.mean(size)[bin_, column]
    if finite:
        assert mean == pytest.approx(math.fsum(finite) / len(finite), rel=1e-9, abs=1e-6)
    else:
        assert math.isnan(mean)


def check_bins(window: Window, history: list[StepSummary]) -> int:
    """Compare every bin with its steps; returns how many steps are in the window."""
    covered = 0
    for bin_ in range(window.size):
        inside = [s for s in history if window.first[bin_] <= s.step <= window.last[bin_]]
        covered += len(inside)
        assert (inside[0].step, inside[-1].step) == (window.first[bin_], window.last[bin_])
        assert window.bins.n_steps[bin_] == len(inside) and window.bins.wall_time[bin_] == inside[-1].wall_time
        assert len({s.step // window.width for s in inside}) == 1
        assert (window.log_ratio[bin_] == sum(s.log_ratio for s in inside)).all()
        for name in NAMES:
            check_stats(window.metrics, bin_, window.size, name, [s.metrics[name] for s in inside])
        for name in window.gradients.names:
            check_stats(window.gradients, bin_, window.size, name, [s.gradients.get(name) for s in inside])
    return covered


@settings(max_examples=50, deadline=None)
@given(histories(), st.integers(2, 9), st.integers(1, 5))
def test_a_window_of_all_steps_loses_none(history, capacity, width):
    window = fill(history, capacity, width, forget=False)
    assert check_bins(window, history) == len(history)
    assert window.first[0] == history[0].step
    assert set(window.gradients.names) == {g for s in history for g in s.gradients}
    if window.width > width:
        assert len({s.step // (window.width // 2) for s in history}) > capacity, "no wider than it must be"


@settings(max_examples=50, deadline=None)
@given(histories(), st.integers(1, 9), st.integers(1, 5))
def test_a_forgetting_window_keeps_the_newest(history, capacity, width):
    window = fill(history, capacity, width, forget=True)
    kept = check_bins(window, history)
    assert window.width == width
    assert [s.step for s in history[-kept:]][0] == window.first[0]
    assert window.size == min(len({s.step // width for s in history}), capacity)


@settings(max_examples=30, deadline=None)
@given(histories())
def test_a_window_with_room_is_exact(history):
    window = fill(history, 64, 1, forget=False)
    assert window.first[: window.size].tolist() == [s.step for s in history] and window.width == 1


@settings(max_examples=50, deadline=None)
@given(histories(), st.integers(1, 9), st.integers(1, 3), st.booleans(), st.data())
def test_it_does_not_matter_how_many_steps_come_at_once(history, capacity, width, forget, data):
    window, left = Window(capacity, NAMES, width=width, forget=forget), list(history)
    while left:
        size = data.draw(st.integers(1, len(left)))
        window.add(concatenate([Bins.empty(0, 1, NAMES), *(s.bins() for s in left[:size])]))
        del left[:size]
    assert_same_bins(window.bins, fill(history, capacity, width, forget).bins)


@settings(max_examples=50, deadline=None)
@given(histories())
def test_a_step_survives_the_way_through_a_bin(history):
    for summary in history:
        back = StepSummary.of(summary.bins(), 0)
        assert (back.step, back.wall_time, repr(back.metrics)) == (
            summary.step,
            summary.wall_time,
            repr(summary.metrics),
        )
        assert repr(back.gradients) == repr(summary.gradients) and (back.log_ratio == summary.log_ratio).all()


def test_a_late_group_starts_empty_and_merges():
    history = [
        StepSummary(s, 0.0, {}, {"a": 1.0} if s < 6 else {"b": float(s)}, np.zeros((3, N_BINS), np.int64))
        for s in range(8)
    ]
    window = fill(history, 4, 1, forget=False)
    # full at step 4: width 2, then the bins are [0 1], [2 3], [4 5], [6 7]
    assert window.width == 2 and window.first[: window.size].tolist() == [0, 2, 4, 6]
    assert window.gradients.names == ["a", "b"]
    nan = np.nan
    np.testing.assert_array_equal(window.gradients.mean(4), [[1.0, nan], [1.0, nan], [1.0, nan], [nan, 6.5]])
