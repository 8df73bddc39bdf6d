"""The numbers that follow from MHPO's hyperparameters: golden ones, closed forms, and what they say of the curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mhpo_core import TokenBatch, objectives

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "objectives.json").read_text())["mhpo_facts"]
FACTS = {k: float(v) for k, v in GOLDEN.items() if k != "params"}


def terms(log_ratio, name="mhpo", **hyperparameters):
    new = torch.tensor(np.atleast_2d(log_ratio), dtype=torch.float64)
    one = torch.ones_like(new)
    return objectives.create(name, **hyperparameters).terms(TokenBatch(new, 0 * new, one, one.bool()))


def multiplier(log_ratio, name="mhpo", **hyperparameters):
    return terms(log_ratio, name, **hyperparameters).gradient_multiplier[0].numpy()


def test_golden_facts():
    facts, lfm = objectives.create("mhpo").explain(), objectives.create("mhpo_lfm_only").explain()
    assert facts.multiplier_on_policy == pytest.approx(FACTS["M_at_ratio_1"], rel=1e-13)
    assert facts.learning_rate_factor == facts.multiplier_on_policy
    assert facts.hazard_on_policy == pytest.approx(FACTS["zeta_at_ratio_1"], rel=1e-13)
    assert facts.largest_multiplier == pytest.approx(FACTS["sup_M"], rel=1e-13)
    assert facts.largest_at == pytest.approx(FACTS["argmax_log_ratio"], abs=1e-11)
    assert facts.paper_bound == pytest.approx(FACTS["paper_bound_exp_c"], rel=1e-13)
    assert facts.sign_flip == pytest.approx(FACTS["no_stopgrad_sign_flip_log_ratio"], abs=1e-12)
    assert lfm.largest_multiplier == pytest.approx(FACTS["lfm_only_sup_M"], rel=1e-13)
    assert lfm.largest_at == pytest.approx(FACTS["lfm_only_argmax_log_ratio"], abs=1e-11)
    assert lfm.hazard_on_policy is None and lfm.sign_flip is None


@pytest.mark.parametrize("c", [0.01, 0.3, 1.5, 5.0, 100.0])
def test_largest_multiplier_without_hazard_has_a_closed_form(c):
    # t = tanh(log r / c) solves 1 − 2t/c − t² = 0
    t = (math.sqrt(1 + c * c) - 1) / c
    facts = objectives.create("mhpo_lfm_only", c=c).explain()
    assert facts.largest_multiplier == pytest.approx(math.exp(c * t) * (1 - t * t), rel=1e-9)
    assert facts.largest_at == pytest.approx(c * math.atanh(t), rel=1e-6)


@pytest.mark.parametrize("name", ["mhpo", "mhpo_lfm_only", "mhpo_dhp_only", "mhpo_no_stopgrad"])
@pytest.mark.parametrize("c", [0.3, 1.5, 4.0])
def test_what_the_facts_say_is_true_of_the_curve(name, c):
    facts = objectives.create(name, c=c).explain()
    curve = multiplier(np.linspace(-30, 30, 60_001), name, c=c)
    assert curve.max() <= facts.largest_multiplier * (1 + 1e-12)
    assert multiplier([facts.largest_at], name, c=c)[0] == facts.largest_multiplier
    low, high = facts.half_width
    assert low < facts.largest_at < high
    np.testing.assert_allclose(multiplier([low, high], name, c=c), facts.largest_multiplier / 2, rtol=1e-9)


def test_a_multiplier_that_never_comes_down_is_infinite():
    facts = objectives.create("mhpo_dhp_only", k_pos=0.5).explain()
    assert facts.largest_multiplier == math.inf and facts.largest_at == math.inf


def test_without_the_modulator_the_largest_multiplier_may_lie_far_out():
    facts = objectives.create(
        "mhpo_dhp_only", c=0.5, k_pos=1.5, lambda_pos=5.0, k_neg=2.0, lambda_neg=0.3
    ).explain()  # c has no effect here, so it says nothing of where to search
    # dζ₊/dx = 1.5/5·sqrt(x/5) = 1 at x = 5/0.3² = 55.56, up to the softplus
    assert facts.sign_flip == pytest.approx(5 / 0.3**2, rel=1e-12)
    assert facts.largest_at == pytest.approx(facts.sign_flip, rel=1e-9)
    assert facts.largest_multiplier == pytest.approx(1.10e8, rel=0.01)


def test_a_bound_too_large_for_a_float_is_infinite():
    assert objectives.create("mhpo", c=1000.0).explain().paper_bound == math.inf


def test_at_the_sign_flip_the_gradient_without_stop_gradient_is_zero():
    flip = objectives.create("mhpo").explain().sign_flip
    around = multiplier([flip - 1e-6, flip + 1e-6], "mhpo_no_stopgrad")
    assert around[0] > 0 > around[1]
    assert multiplier([flip])[0] > 0.1


def test_limits_of_the_weight():
    low, high = terms([-700.0, 700.0]).surrogate[0].tolist()
    assert low == pytest.approx(FACTS["weight_limit_ratio_to_0"], rel=1e-12)
    assert high == pytest.approx(FACTS["weight_limit_ratio_to_inf"], rel=1e-12)


def test_sign_aware_keeps_a_restoring_force_and_damps_what_pushes_out():
    x = torch.tensor([[-4.0, 4.0, -4.0, 4.0, 0.0]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
    batch = TokenBatch(x, 0 * x, advantage, torch.ones_like(x))
    plain, aware = (objectives.create(n).terms(batch).gradient_multiplier[0] for n in ("mhpo", "mhpo_sa"))
    on_policy = float(plain[4])
    assert (plain[:2] < 0.1 * on_policy).all() and (aware[:2] > 0.1 * on_policy).all()
    assert torch.equal(plain[2:], aware[2:])
    near = torch.tensor([[-1e-9, 1e-9]], dtype=torch.float64)
    for side in (1.0, -1.0):
        both = TokenBatch(near, 0 * near, torch.tensor([side]).double(), torch.ones_like(near))
        torch.testing.assert_close(
            objectives.create("mhpo_sa").terms(both).gradient_multiplier,
            torch.full_like(near, on_policy),
            rtol=1e-8,
            atol=0,
        )
