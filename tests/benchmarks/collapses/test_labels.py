"""The rule on made-up runs whose onset can be read off."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.collapses.labels import COLLAPSED, HEALTHY, SURVIVED, label


def judged(reward, dead_from=None, updates=2, faulty=True):
    taken = np.ones(len(reward) * updates, dtype=bool)
    if dead_from is not None:
        taken[dead_from:] = False
    return label(np.asarray(reward, dtype=float), taken, faulty)


def test_a_run_that_keeps_its_reward_is_healthy_or_survived():
    assert judged([0.5] * 40, faulty=False).label == HEALTHY
    assert judged([0.5] * 40, faulty=True).label == SURVIVED


def test_the_onset_is_where_the_mean_of_ten_falls_below_half_of_its_peak():
    # reward 1 for 20 iterations, then 0: the mean that ends with iteration 20 + k is (9 − k)/10, below 1/2 from k = 5
    found = judged([1.0] * 20 + [0.0] * 20)
    assert (found.label, found.onset_step) == (COLLAPSED, 2 * 25)
    assert (found.peak, found.end) == pytest.approx((1.0, 0.0))


def test_a_dip_that_recovers_is_no_collapse_and_the_last_fall_counts():
    dip = [1.0] * 20 + [0.0] * 15 + [0.8] * 30
    assert judged(dip).label == SURVIVED
    # from 0.8 to 0 at iteration 65: the mean that ends with 65 + k is 0.08·(9 − k), below 1/2 from k = 3
    assert judged(dip + [0.0] * 20).onset_step == 2 * 68


def test_a_peak_that_is_still_to_come_does_not_count():
    assert judged([0.2] * 20 + [1.0] * 30).label == SURVIVED


@pytest.mark.parametrize(("dead_from", "onset"), [(50, 50), (61, None), (60, 60)])
def test_a_run_is_dead_if_no_step_of_the_last_ten_iterations_was_taken(dead_from, onset):
    # 40 iterations of 2 steps: the last ten begin with step 60
    found = judged([0.5] * 40, dead_from)
    assert found.onset_step == onset
    assert found.label == (SURVIVED if onset is None else COLLAPSED)


def test_the_earlier_of_two_ends_is_the_onset():
    fall = [1.0] * 20 + [0.0] * 20
    assert judged(fall, dead_from=44).onset_step == 44
    assert judged(fall, dead_from=56).onset_step == 50


def test_a_twin_that_collapses_is_labelled_so():
    assert judged([1.0] * 20 + [0.0] * 20, faulty=False).label == COLLAPSED
