"""The token gradient norm against autograd of the surrogate with respect to real logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhpo_core import TokenBatch, objectives
from mhpo_core.objectives import OBJECTIVES
from mhpo_core.telemetry import logit_gradient_norm


def batch_from(logits, seed, *, with_sum=True) -> TokenBatch:
    rng = np.random.default_rng(seed)
    shape = logits.shape[:2]
    log_p = torch.log_softmax(logits, dim=-1)
    token = torch.as_tensor(rng.integers(0, logits.shape[2], shape))
    logp = log_p.gather(-1, token[..., None])[..., 0]
    mask = rng.random(shape) < 0.8
    mask[0, 0] = True
    logp_old = logp.detach() + 0.5 * torch.as_tensor(rng.standard_normal(shape))
    return TokenBatch(
        logp_new=logp,
        logp_old=logp_old,
        logp_rollout=logp_old + 0.1 * torch.as_tensor(rng.standard_normal(shape)),
        advantage=torch.as_tensor(rng.choice([-1.5, 0.0, 0.5, 2.0], shape)),
        mask=torch.as_tensor(mask),
        sum_p_squared=log_p.detach().exp().square().sum(-1) if with_sum else None,
    )


def norm_of(batch, objective=None) -> torch.Tensor:
    return logit_gradient_norm(batch, (objective or objectives.create("is_pg")).terms(batch))


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 1.0, 6.0]))
@settings(deadline=None, max_examples=15)
def test_it_is_the_norm_of_the_gradient_at_the_logits(name, seed, spread):
    logits = spread * torch.randn(3, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logits.requires_grad_()
    batch, objective = batch_from(logits, seed), objectives.create(name)
    objective.loss(batch, "token-sum").backward()
    found = norm_of(batch.detach(), objective)
    exact = logits.grad.norm(dim=-1)
    # squared, because Σp² comes rounded to 2⁻⁵³: near p = 1 that is all there is to know of Σp² − p²
    rounding = 1e-15 * (batch.advantage * objective.terms(batch).gradient_multiplier).square()
    assert ((found.square() - exact.square()).abs() <= 1e-11 * exact.square() + rounding).all()
    assert not found[~batch.mask].any()


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_without_the_collision_probability_it_is_at_most_sqrt_two_too_small(seed):
    logits = 2 * torch.randn(3, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exact, estimate = norm_of(batch_from(logits, seed)), norm_of(batch_from(logits, seed, with_sum=False))
    assert (estimate <= exact * (1 + 1e-12)).all() and (estimate * math.sqrt(2) >= exact * (1 - 1e-12)).all()


def one_token(logp, advantage, sum_p_squared=None, dtype=torch.float64) -> TokenBatch:
    def cell(value):
        return None if value is None else torch.tensor([[value]], dtype=dtype)

    return TokenBatch(cell(logp), cell(logp), cell(advantage), torch.ones(1, 1), sum_p_squared=cell(sum_p_squared))


def test_by_hand():
    # p = 1/2, rest (1/4, 1/4): ‖e − p‖² = ¼ + 2/16 = 0.375 = 1 − 2·½ + 0.375; |A·M| = 3·1
    assert norm_of(one_token(math.log(0.5), -3.0, 0.375)).item() == pytest.approx(3 * math.sqrt(0.375), rel=1e-12)
    assert norm_of(one_token(math.log(0.5), -3.0)).item() == pytest.approx(1.5, rel=1e-12)


def test_a_certain_token_has_no_gradient():
    assert norm_of(one_token(0.0, 2.0, 1.0)).item() == 0 and norm_of(one_token(0.0, 2.0)).item() == 0


@pytest.mark.parametrize("sum_p_squared", [None, 1.0])
def test_a_log_probability_above_zero_by_rounding_gives_no_negative_norm(sum_p_squared):
    assert norm_of(one_token(1e-6, 2.0, sum_p_squared, torch.float32)).item() == 0


@pytest.mark.parametrize("miss", [1e-3, 1e-5, 1e-6, 3e-7])
def test_a_nearly_certain_token_keeps_its_digits_in_float32(miss):
    # p = 1 − miss, the rest on one other token: norm = √2·miss, where 1 − 2p + Σp² cancels to 0 in float32
    logp, exact = math.log1p(-miss), (1 - miss) ** 2 + miss**2
    found = norm_of(one_token(logp, 1.0, exact, torch.float32)).item()
    # whatever rounding does to Σp² (6e-8, whose root is 2e-4), the norm stays in [1 − p, √2·(1 − p)]
    assert miss * (1 - 1e-5) <= found <= math.sqrt(2) * miss * (1 + 1e-5)
    assert norm_of(one_token(logp, 1.0, None, torch.float32)).item() == pytest.approx(miss, rel=1e-5)


def test_a_token_without_weight_has_norm_zero_whatever_its_distribution():
    assert norm_of(one_token(-1.0, 0.0, math.nan)).item() == 0
    assert math.isnan(norm_of(one_token(-1.0, 1.0, math.nan)).item())


def test_zero_advantage_hides_an_infinite_ratio():
    batch = TokenBatch(
        torch.tensor([[-1.0, -1.0]]), torch.tensor([[-math.inf, -math.nan]]), torch.tensor([0.0]), torch.ones(1, 2)
    )
    found = norm_of(batch)
    assert found[0, 0].item() == 0 and math.isnan(found[0, 1])
