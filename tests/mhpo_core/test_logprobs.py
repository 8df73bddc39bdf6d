"""Token statistics against a float64 softmax, one position at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhpo_core.logprobs import VIOLATIONS, TokenStats, token_stats

INF = math.inf


def softmax(logits) -> np.ndarray:
    weights = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return weights / weights.sum()


def test_by_hand():
    # p = (1/2, 1/4, 1/4): log p = −ln 2; H = ½·ln 2 + 2·¼·ln 4 = 1.5·ln 2; Σp² = ¼ + 2/16 = 0.375
    stats = token_stats(torch.tensor([[[2.0, 1.0, 1.0]]]).log(), torch.tensor([[0]]))
    found = [stats.logp.item(), stats.entropy.item(), stats.sum_p_squared.item()]
    assert found == pytest.approx([-math.log(2), 1.5 * math.log(2), 0.375], rel=1e-6)


@given(
    seed=st.integers(0, 10**6), temperature=st.sampled_from([0.3, 1.0, 1.7]), spread=st.sampled_from([0.0, 1.0, 8.0])
)
@settings(deadline=None, max_examples=30)
def test_against_float64(seed, temperature, spread):
    rng = np.random.default_rng(seed)
    logits = torch.as_tensor(spread * rng.standard_normal((2, 3, 7)), dtype=torch.float32)
    logits[0, 0, :3] = -INF
    token = torch.as_tensor(rng.integers(3, 7, (2, 3)))
    stats = token_stats(logits, token, temperature=temperature)
    for b, t in np.ndindex(2, 3):
        p = softmax(logits[b, t].double().numpy() / temperature)
        present = p[p > 0]
        # float32 logits of size up to 80 carry an error of 80·2⁻²⁴ = 5e-6 into log p, hence atol
        assert stats.logp[b, t].item() == pytest.approx(math.log(p[token[b, t]]), rel=1e-5, abs=1e-5)
        assert stats.entropy[b, t].item() == pytest.approx(-(present * np.log(present)).sum(), rel=1e-5, abs=1e-5)
        assert stats.sum_p_squared[b, t].item() == pytest.approx((p**2).sum(), rel=1e-5)


def test_logits_of_minus_infinity_take_no_share():
    logits = torch.tensor([[[0.0, 0.0, -INF, -INF], [5.0, -INF, -INF, -INF]]])
    stats = token_stats(logits, torch.tensor([[1, 0]]))
    assert stats.logp.tolist()[0] == pytest.approx([-math.log(2), 0.0], rel=1e-6)
    assert stats.entropy.tolist()[0] == pytest.approx([math.log(2), 0.0], rel=1e-6)
    assert stats.sum_p_squared.tolist()[0] == pytest.approx([0.5, 1.0], rel=1e-6)


def test_a_sampled_token_without_probability_is_kept_as_minus_infinity():
    stats = token_stats(torch.tensor([[[0.0, -INF]]]), torch.tensor([[1]]))
    assert stats.logp.item() == -INF


def test_only_logp_carries_the_graph_and_its_slope_is_one_hot_minus_p():
    logits = torch.tensor([[[1.0, 0.0, -1.0]]], requires_grad=True)
    stats = token_stats(logits, torch.tensor([[1]]), temperature=0.5)
    assert not stats.entropy.requires_grad and not stats.sum_p_squared.requires_grad
    stats.logp.sum().backward()
    # d log p_y / d z = (e_y − p) / temperature
    expected = (np.array([0.0, 1.0, 0.0]) - softmax([2.0, 0.0, -2.0])) / 0.5
    assert logits.grad[0, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_half_precision_logits_are_summed_in_float32():
    # 4096 equal logits: log p = −ln 4096 = −8.3178; bfloat16 alone would give −8.3125
    logits = torch.zeros(1, 1, 4096, dtype=torch.bfloat16)
    stats = token_stats(logits, torch.tensor([[7]]))
    assert stats.logp.item() == pytest.approx(-math.log(4096), rel=1e-6)
    assert stats.entropy.item() == pytest.approx(math.log(4096), rel=1e-5)
    assert stats.sum_p_squared.item() == pytest.approx(1 / 4096, rel=1e-5)


def test_float64_stays():
    stats = token_stats(torch.tensor([[[0.0, 1e-12]]], dtype=torch.float64), torch.tensor([[1]]))
    # ln(e^x / (1 + e^x)) = −ln 2 + x/2 + …
    assert stats.logp.item() == pytest.approx(-math.log(2) + 5e-13, rel=0, abs=1e-15)
    assert stats.entropy.dtype == stats.sum_p_squared.dtype == torch.float64


@pytest.mark.parametrize("size", [1, 2, 50, 200_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0])
def test_a_correct_kernel_violates_nothing(size, spread):
    logits = spread * torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    stats = token_stats(logits, torch.zeros(2, 3, dtype=torch.int64))
    assert stats.violations(torch.ones(2, 3)).tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "broken,expected",
    [
        ({"logp": 2e-4}, [1, 0, 0, 0, 0]),
        ({"logp": 0.5e-4}, [0, 0, 0, 0, 0]),
        ({"entropy": -2e-4}, [0, 1, 0, 0, 0]),
        ({"entropy": math.log(4) + 2e-3}, [0, 0, 1, 0, 0]),
        ({"sum_p_squared": 0.2497}, [0, 0, 0, 1, 0]),
        ({"sum_p_squared": 1.002}, [0, 0, 0, 1, 0]),
        ({"sum_p_squared": 0.2499}, [0, 0, 0, 0, 0]),
        ({"logp": math.nan}, [0, 0, 0, 0, 1]),
        ({"logp": -INF}, [0, 0, 0, 0, 1]),
        ({"entropy": math.nan}, [0, 0, 0, 0, 1]),
        ({"sum_p_squared": math.nan}, [0, 0, 0, 0, 1]),
        ({"logp": INF, "entropy": INF, "sum_p_squared": INF}, [1, 0, 1, 1, 1]),
    ],
)
def test_values_that_no_distribution_has_are_counted_where_the_mask_is_set(broken, expected):
    # uniform over V = 4: log p = −ln 4, H = ln 4, Σp² = 1/4
    values = {"logp": -math.log(4), "entropy": math.log(4), "sum_p_squared": 0.25}
    tensors = {name: torch.full((2, 3), value) for name, value in values.items()}
    for name, value in broken.items():
        tensors[name][:, 1] = value
    mask = torch.ones(2, 3, dtype=torch.int64)
    mask[1, 1] = 0
    counts = TokenStats(**tensors, vocabulary_size=4).violations(mask)
    assert counts.dtype == torch.int64 and counts.tolist() == expected and len(VIOLATIONS) == len(counts)
    assert (TokenStats(**tensors, vocabulary_size=4).violations(torch.ones(2, 3)) == 2 * counts).all()
