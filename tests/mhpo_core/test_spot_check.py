"""The slow second opinion: it agrees with a correct kernel and finds one wrong value among many."""

from __future__ import annotations

import math

import pytest
import torch

from mhpo_core import spot_check as module
from mhpo_core.logprobs import token_stats
from mhpo_core.spot_check import spot_check

B, T, H, V = 3, 40, 8, 50
INF, NAN = math.inf, math.nan


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return torch.randn(B, T, H), torch.randn(V, H), torch.randint(V, (B, T))


def logp(hidden, weight, token_id, **options):
    return token_stats(hidden @ weight.t(), token_id, **options).logp


@pytest.mark.parametrize("vocabulary_slice", [7, 50, 64])
def test_a_correct_kernel_passes(problem, vocabulary_slice, monkeypatch):
    monkeypatch.setattr(module, "_VOCABULARY_SLICE", vocabulary_slice)
    hidden, weight, token_id = problem
    bias = torch.randn(V)
    logits = 4.0 * torch.tanh((hidden @ weight.t() + bias) / 4.0)
    found = token_stats(logits, token_id, temperature=0.6).logp
    options = {"bias": bias, "temperature": 0.6, "softcap": 4.0}
    mask = torch.ones(B, T, dtype=torch.bool)
    # float32 logits of size up to 7 carry an error of about 7·2⁻²⁴ = 4e-7
    assert spot_check(hidden, weight, token_id, found, mask, **options) < 1e-5
    for name in options:
        wrong = {**options, name: {"bias": None, "temperature": 1.0, "softcap": None}[name]}
        assert spot_check(hidden, weight, token_id, found, mask, **wrong) > 0.1, name


@pytest.mark.parametrize("at", [(0, 2), (1, 0), (2, 38)])
@pytest.mark.parametrize("shift", [0.01, -0.01, INF, -INF, NAN])
def test_one_wrong_token_of_those_checked_is_found(problem, at, shift):
    found = logp(*problem)
    found[at] += shift
    mask = torch.zeros(B, T, dtype=torch.bool)
    # 60 of 120 tokens train: every one of them is checked
    mask[:, ::2] = True
    largest = spot_check(*problem, found, mask).item()
    assert math.isnan(largest) if math.isnan(shift) else largest == pytest.approx(abs(shift), abs=1e-5)


def test_the_first_and_the_last_trained_token_are_always_among_them(problem):
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 3:] = mask[1:] = True
    mask[2, 30:] = False
    for at in ((0, 3), (2, 29)):
        found = logp(*problem)
        found[at] += 1.0
        assert spot_check(*problem, found, mask, rows=5) == pytest.approx(1.0, abs=1e-5)


def test_masked_tokens_are_not_read(problem):
    found = logp(*problem)
    mask = torch.arange(T).expand(B, T) < 10
    found[~mask] = NAN
    assert spot_check(*problem, found, mask) < 1e-5
    assert spot_check(*problem, torch.full((B, T), NAN), torch.zeros(B, T)) == 0


def test_equal_infinities_and_nans_are_not_a_difference(problem):
    hidden, weight, token_id = problem
    hidden[0, 0] = NAN
    bias = torch.zeros(V).index_fill(0, token_id[1, 1:2], -INF)
    found = token_stats(hidden @ weight.t() + bias, token_id).logp
    assert found[0, 0].isnan() and found[1, 1] == -INF
    assert spot_check(hidden, weight, token_id, found, torch.ones(B, T), rows=B * T, bias=bias) < 1e-5
    finite = logp(hidden.nan_to_num(), weight, token_id)
    assert not spot_check(hidden.nan_to_num(), weight, token_id, finite, torch.ones(B, T), rows=B * T, bias=bias) < INF


def test_no_random_number_is_drawn(problem):
    before = torch.get_rng_state()
    spot_check(*problem, logp(*problem), torch.ones(B, T))
    assert torch.equal(before, torch.get_rng_state())
