"""Histograms of a step: every finite token in one bin, with its weight, on its side; merged by addition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhpo_core import TokenBatch, concatenate, objectives
from mhpo_core.histograms import EDGES, N_BINS, ZERO_BIN
from mhpo_core.metrics import SIDES
from mhpo_core.objectives import OBJECTIVES
from mhpo_core.telemetry import measure


def histograms_of(batch, name) -> dict:
    found = measure(batch, objectives.create(name)).histograms
    assert len({(h.quantity, h.side) for h in found}) == len(found)
    return {(h.quantity, h.side): h for h in found}


def slow_bin(value) -> int:
    with np.errstate(over="ignore"):
        value = float(np.float32(value))
    index = int(np.searchsorted(EDGES[ZERO_BIN + 1 : -1], abs(value), side="right"))
    return ZERO_BIN + (index if value > 0 else -index)


def slow_histograms(batch, telemetry) -> dict:
    """(quantity, side) → counts and weights, one token at a time."""
    quantities = {
        "log_ratio": telemetry.terms.log_ratio,
        "mismatch_log_ratio": batch.logp_old - batch.logp_rollout,
        "entropy": batch.entropy,
        "logit_grad_norm": telemetry.logit_grad_norm,
    }
    found: dict = {}
    for quantity, values in quantities.items():
        for b, t in batch.mask.nonzero().tolist():
            value, advantage = values[b, t].item(), batch.advantage[b, t].item()
            if math.isnan(value) or math.isnan(advantage):
                continue
            side = "positive" if advantage > 0 else "negative" if advantage < 0 else "zero"
            count, weight = found.setdefault((quantity, side), (np.zeros(N_BINS, int), np.zeros(N_BINS)))
            count[slow_bin(value)] += 1
            added = abs(advantage * telemetry.terms.gradient_multiplier[b, t].item())
            with np.errstate(over="ignore"):  # two ratios clamped at e^709
                weight[slow_bin(value)] += added if math.isfinite(added) else 0
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("field", ["logp_old", "advantage", "entropy", "logp_rollout"])
@given(seed=st.integers(0, 10**6), bad=st.sampled_from([0.0, math.nan, math.inf, -math.inf]))
@settings(deadline=None, max_examples=10)
def test_against_a_loop(name, field, seed, bad, random_batch):
    batch = random_batch(seed)
    values = getattr(batch, field).clone()
    values[0, 0] = bad
    batch = replace(batch, **{field: values})
    found, expected = histograms_of(batch, name), slow_histograms(batch, measure(batch, objectives.create(name)))
    assert set(found) == set(expected)
    for key, (count, weight) in expected.items():
        assert (found[key].count == count).all()
        np.testing.assert_allclose(found[key].weight, weight, rtol=1e-12, atol=0)


def test_counts_and_weights_add_up(random_batch):
    batch = random_batch(3, 20, 30)
    telemetry = measure(batch, objectives.create("mhpo"))
    product = (batch.advantage * telemetry.terms.gradient_multiplier)[batch.mask].abs()
    for quantity in {h.quantity for h in telemetry.histograms}:
        parts = [h for h in telemetry.histograms if h.quantity == quantity]
        assert {h.side for h in parts} == set(SIDES)
        assert sum(h.count.sum() for h in parts) == telemetry.scalars["n_tokens"]
        assert sum(h.weight.sum() for h in parts) == pytest.approx(product.sum().item(), rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=15)
def test_parts_add_up_to_the_histogram_of_the_whole(name, seed, random_batch):
    parts = [random_batch(seed, 4, 6), random_batch(seed + 1, 3, 9), random_batch(seed + 2, 1, 2)]
    whole = histograms_of(concatenate(parts), name)
    pieces = [histograms_of(part, name) for part in parts]
    assert set(whole) == set().union(*pieces)
    for key, merged in whole.items():
        own = [piece[key] for piece in pieces if key in piece]
        assert (sum(h.count for h in own) == merged.count).all()
        np.testing.assert_allclose(sum(h.weight for h in own), merged.weight, rtol=1e-12, atol=0)


def test_by_hand():
    # log r = 0 with A = 2 and log r = ln 3 = 1.0986 with A = 2: bins 0 and 1 … 1.125, weights 2·1 and 2·3
    new = torch.tensor([[0.0, math.log(3), math.nan]], dtype=torch.float64)
    batch = TokenBatch(new, torch.zeros_like(new), torch.tensor([2.0]), torch.ones(1, 3))
    found = histograms_of(batch, "is_pg")[("log_ratio", "positive")]
    above = int(np.flatnonzero(EDGES == 1.0)[0])
    assert {i: int(found.count[i]) for i in found.count.nonzero()[0]} == {ZERO_BIN: 1, above: 1}
    assert found.weight[ZERO_BIN] == pytest.approx(2, rel=1e-12) and found.weight[above] == pytest.approx(6, rel=1e-12)


def test_missing_inputs_have_no_histogram(random_batch):
    bare = replace(random_batch(0), logp_rollout=None, entropy=None)
    assert {quantity for quantity, _ in histograms_of(bare, "mhpo")} == {"log_ratio", "logit_grad_norm"}
