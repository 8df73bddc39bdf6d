"""Group-relative advantages: hand case, loop twin, groups without spread, bad input."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhpo_core import group_advantages
from mhpo_core.advantages import leave_one_out_advantages
from mhpo_core.errors import BatchError


def test_by_hand():
    # group (1, 0, 0, 1): mean 1/2, variance 4·(1/4)/3 = 1/3; group (2, 2, 2, 2): no spread
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    size = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert group_advantages(reward, 4).tolist() == pytest.approx([size, -size, -size, size, 0, 0, 0, 0], rel=1e-14)


@given(
    size=st.integers(2, 6),
    n_groups=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    ddof=st.sampled_from([0, 1]),
    normalize=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_against_a_loop(size, n_groups, seed, ddof, normalize):
    reward = torch.randn(n_groups * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = []
    for start in range(0, len(reward), size):
        group = reward[start : start + size].tolist()
        spread = (statistics.stdev if ddof else statistics.pstdev)(group) + 1e-4 if normalize else 1.0
        expected += [(r - statistics.fmean(group)) / spread for r in group]
    found = group_advantages(reward, size, ddof=ddof, normalize_std=normalize)
    assert found.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-6])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, -1.0])
@pytest.mark.parametrize("size", [1, 3, 6, 7, 16])
def test_equal_rewards_train_nothing(size, value, epsilon):
    # in float32 the mean of seven 0.7 misses 0.7 by 6e-8, which a standard deviation of 6e-8 would make 0.056
    assert group_advantages(torch.full((2 * size,), value), size, epsilon=epsilon).tolist() == [0.0] * (2 * size)


def test_a_nan_reward_poisons_its_own_group_only():
    found = group_advantages(torch.tensor([1.0, math.nan, 0.0, 1.0]), 2)
    assert found[:2].isnan().all() and found[2:].isfinite().all()


@pytest.mark.parametrize(
    ("reward", "size", "message"),
    [
        (torch.zeros(5), 2, r"shape \(5,\) for groups of 2, allowed is \(B,\) with B a multiple"),
        (torch.zeros(2, 2), 2, r"shape \(2, 2\) for groups of 2"),
        (torch.zeros(4), 0, r"shape \(4,\) for groups of 0"),
        (torch.zeros(4), -2, r"groups of -2"),
        (torch.zeros(4, dtype=torch.int64), 2, r"dtype torch.int64, allowed are floating-point dtypes"),
        (torch.zeros(4, dtype=torch.bool), 2, r"dtype torch.bool"),
    ],
)
def test_bad_input(reward, size, message):
    with pytest.raises(BatchError, match=message):
        group_advantages(reward, size)


def test_the_batchs_spread_by_hand():
    # groups (0, 2) and (4, 4): centred −1, 1, 0, 0; all four have variance (6.25 + 0.25 + 2·2.25) / 3 = 11/3
    found = group_advantages(torch.tensor([0.0, 2.0, 4.0, 4.0], dtype=torch.float64), 2, std_over="batch")
    size = 1 / (math.sqrt(11 / 3) + 1e-4)
    assert found.tolist() == pytest.approx([-size, size, 0, 0], rel=1e-14)


def test_leave_one_out_by_hand():
    # the others of 3 are 0 and 1.5, mean 0.75
    found = leave_one_out_advantages(torch.tensor([3.0, 0.0, 1.5], dtype=torch.float64), 3)
    assert found.tolist() == pytest.approx([2.25, -2.25, 0.0], rel=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: group_advantages(r, 2, std_over="all"), r"std_over = 'all', allowed are group, batch"),
        (lambda r: leave_one_out_advantages(r, 1), r"group_size = 1, at least 2 are needed"),
        (lambda r: leave_one_out_advantages(r, 3), r"shape \(4,\) for groups of 3"),
    ],
)
def test_what_they_cannot_do(call, message):
    with pytest.raises(BatchError, match=message):
        call(torch.zeros(4))
