"""Aggregation modes: hand cases, bad input, and that only trained positions count."""

from __future__ import annotations

import math

import pytest
import torch

from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives import AGGREGATIONS, aggregate

# rows: 1 + 2 = 3 over 2 tokens; 10 over 1 token; none
VALUES = torch.tensor([[1.0, 2.0, math.nan], [10.0, math.inf, -math.inf], [math.nan] * 3], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
BY_HAND = {
    "token-mean": 13 / 3,
    "token-sum": 13.0,
    "seq-mean-token-mean": (1.5 + 10) / 2,
    "seq-mean-token-sum": 13 / 2,
    "seq-mean-token-sum-norm": 13 / 2 / 4,
    "trl-grpo": (1.5 + 10) / 3,
    "trl-dr_grpo": 13 / 3 / 4,
}


def test_every_mode_has_a_hand_case():
    assert set(BY_HAND) == set(AGGREGATIONS)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_by_hand(mode):
    assert aggregate(VALUES, MASK, mode, 4.0).item() == pytest.approx(BY_HAND[mode], rel=1e-15)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_masked_garbage_gets_no_gradient(mode):
    values = VALUES.clone().requires_grad_()
    aggregate(values, MASK, mode, 4.0).backward()
    assert not values.grad[~MASK].any() and (values.grad[MASK] > 0).all()


def test_an_unknown_mode_lists_the_known_ones():
    with pytest.raises(ObjectiveError, match="unknown mode 'mean'") as error:
        aggregate(VALUES, MASK, "mean")
    assert all(mode in str(error.value) for mode in AGGREGATIONS)


@pytest.mark.parametrize("mode", ["seq-mean-token-sum-norm", "trl-dr_grpo"])
@pytest.mark.parametrize("scale", [None, 0.0, -8.0, math.nan, math.inf])
def test_loss_scale_must_be_a_length(scale, mode):
    with pytest.raises(ObjectiveError, match=rf"loss_scale = {scale}, {mode} needs .* length > 0"):
        aggregate(VALUES, MASK, mode, scale)
