"""Every objective against a naive autograd twin, and what all of them promise about masks, graphs and bad input.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhpo_core import TokenBatch, objectives
from mhpo_core.objectives import AGGREGATIONS, OBJECTIVES, Terms, aggregate
from tests.mhpo_core.twins import DECOUPLED_MODES, TWINS, Naive

LOSS_SCALE = 8.0


# J depends on the whole sequence: the slope of one token comes from the loss, not from its own J
SEQUENCE_LEVEL = ("gspo", "luspo", "gmpo")
# log r = −Inf leaves these a weight above 0, and J = w·A·(−Inf)
UNBOUNDED_BELOW = ("reinforce", "cispo_verl")


def test_every_objective_has_a_twin():
    assert set(TWINS) == set(OBJECTIVES)
    for name, (_, space) in TWINS.items():
        assert set(space) == {f.name for f in fields(OBJECTIVES[name])} - {"base"}


def with_gradient(batch) -> TokenBatch:
    return replace(batch, logp_new=batch.logp_new.detach().clone().requires_grad_())


@pytest.mark.parametrize("name", OBJECTIVES)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_value_and_gradient_are_those_of_the_twin(name, data, random_batch):
    twin, space = TWINS[name]
    chosen = {key: data.draw(values, key) for key, values in space.items()}
    batch = with_gradient(random_batch(data.draw(st.integers(0, 10**6)), spread=data.draw(st.sampled_from([0.1, 1.0]))))
    if name in SEQUENCE_LEVEL:
        batch = replace(batch, advantage=torch.where(batch.mask, batch.advantage, -1e9).amax(dim=1))
    objective = objectives.create(name, **chosen)
    naive = Naive.of(batch)
    mode = objective.canonical_aggregation if name in SEQUENCE_LEVEL else "token-sum"
    base = {"base": objective.base} if hasattr(objective, "base") else {}
    value = twin(naive, **chosen, **base)
    (-aggregate(value, batch.mask, mode)).backward()
    objective.loss(batch, mode).backward()
    terms, picked = objective.terms(batch), batch.mask
    torch.testing.assert_close(terms.surrogate[picked], value.detach()[picked], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(batch.logp_new.grad[picked], naive.logp.grad[picked], rtol=1e-11, atol=1e-11)
    product = -(batch.advantage * terms.gradient_multiplier)[picked]
    if name not in SEQUENCE_LEVEL:
        torch.testing.assert_close(product, naive.logp.grad[picked], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", DECOUPLED_MODES)
@pytest.mark.parametrize("base", ["gspo", "luspo", "gmpo", "vespo", "opsm_ppo", "mhpo"])
def test_a_mismatch_weight_around_any_objective_has_the_slope_of_its_loss(base, mode, random_batch):
    batch = with_gradient(random_batch(7, spread=0.05))
    batch = replace(batch, advantage=torch.where(batch.mask, batch.advantage, -1e9).amax(dim=1))
    objective = objectives.create("decoupled", base=base, mode=mode)
    assert objective.canonical_aggregation == objective.base.canonical_aggregation
    naive = Naive.of(batch)
    value = TWINS["decoupled"][0](naive, **{f.name: getattr(objective, f.name) for f in fields(objective)})
    (-aggregate(value, batch.mask, objective.canonical_aggregation)).backward()
    loss = objective.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(
        -aggregate(value, batch.mask, objective.canonical_aggregation).item(), rel=1e-12
    )
    torch.testing.assert_close(batch.logp_new.grad, naive.logp.grad * batch.mask, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_the_aggregated_surrogate_and_its_gradient_that_of_the_weights(name, mode, random_batch):
    batch, objective = with_gradient(random_batch(3)), objectives.create(name)
    loss = objective.loss(batch, mode, LOSS_SCALE)
    loss.backward()
    terms, lengths = objective.terms(batch), batch.mask.sum(dim=1).tolist()
    n_tokens, n_rows = sum(lengths), sum(n > 0 for n in lengths)
    expected, slope = 0.0, torch.zeros_like(terms.surrogate)
    for b, t in batch.mask.nonzero().tolist():
        weight = {
            "token-mean": 1 / n_tokens,
            "token-sum": 1.0,
            "seq-mean-token-mean": 1 / (n_rows * lengths[b]),
            "seq-mean-token-sum": 1 / n_rows,
            "seq-mean-token-sum-norm": 1 / (n_rows * LOSS_SCALE),
            "trl-grpo": 1 / (len(lengths) * lengths[b]),
            "trl-dr_grpo": 1 / (len(lengths) * LOSS_SCALE),
        }[mode]
        expected -= weight * terms.surrogate[b, t].item()
        slope[b, t] = -weight * batch.advantage[b, t] * terms.gradient_multiplier[b, t]
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(batch.logp_new.grad, slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_default_aggregation_is_the_canonical_one(name, random_batch):
    objective, batch = objectives.create(name), random_batch(5, spread=0.05)
    values = {mode: objective.loss(batch, mode, LOSS_SCALE).item() for mode in AGGREGATIONS}
    assert len(set(values.values())) == len(AGGREGATIONS)
    assert objective.loss(batch, loss_scale=LOSS_SCALE).item() == values[objective.canonical_aggregation]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_masked_garbage_reaches_neither_value_nor_gradient(name, garbage, random_batch):
    batch, objective = random_batch(1), objectives.create(name)

    def filled(value):
        floats = {
            f.name: getattr(batch, f.name).masked_fill(~batch.mask, value)
            for f in fields(batch)
            if getattr(batch, f.name).is_floating_point()
        }
        return with_gradient(replace(batch, **floats))

    clean, dirty = filled(0.0), filled(garbage)
    losses = [objective.loss(b, loss_scale=LOSS_SCALE) for b in (clean, dirty)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    assert torch.equal(clean.logp_new.grad, dirty.logp_new.grad)
    assert not dirty.logp_new.grad[~batch.mask].any()
    for field in fields(Terms):
        found = getattr(objective.terms(dirty), field.name)
        if found is not None:
            assert torch.equal(found, getattr(objective.terms(clean), field.name))
            assert not found[~batch.mask].any()


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 4))
@settings(deadline=None, max_examples=15)
def test_order_of_sequences_and_padding_change_nothing(name, seed, extra, random_batch):
    batch, objective = random_batch(seed), objectives.create(name)
    order = torch.as_tensor(np.random.default_rng(seed).permutation(batch.n_sequences))

    def moved(values):
        padding = torch.full((batch.n_sequences, extra), False if values.dtype == torch.bool else 7)
        return torch.cat([padding.to(values.dtype), values[order], padding.to(values.dtype)], dim=1)

    other = TokenBatch(**{f.name: moved(getattr(batch, f.name)) for f in fields(batch)})
    for mode in AGGREGATIONS:
        found, expected = (objective.loss(b, mode, LOSS_SCALE).item() for b in (other, batch))
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-13)
    # not bit for bit: torch's log1p rounds differently in its vectorised body and in its scalar tail
    expected = moved(objective.terms(batch).gradient_multiplier) * other.mask
    torch.testing.assert_close(objective.terms(other).gradient_multiplier, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_have_no_graph_and_loss_has_one(name, random_batch):
    batch, objective = with_gradient(random_batch(2)), objectives.create(name)
    terms = objective.terms(batch)
    tensors = [v for v in (getattr(terms, f.name) for f in fields(terms)) if v is not None]
    assert tensors and not any(t.requires_grad for t in tensors)
    assert objective.loss(batch, loss_scale=LOSS_SCALE).requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_logp_new_receives_a_gradient(name, random_batch):
    batch = with_gradient(random_batch(2))
    others = {n: getattr(batch, n).clone().requires_grad_() for n in ("logp_old", "advantage", "logp_rollout")}
    objectives.create(name).loss(replace(batch, **others), loss_scale=LOSS_SCALE).backward()
    assert batch.logp_new.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in others.values())


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in UNBOUNDED_BELOW])
def test_an_infinite_log_probability_is_data_not_a_nan_loss(name):
    # log r = −Inf is the limit r → 0: is_pg and the clip family give J = 0·A there, MHPO its lower limit
    new = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    advantage = torch.tensor([-1.0 if name == "topr" else 1.0])  # A > 0 has weight 1 whatever the ratio
    old = torch.tensor([[-1.0, -1.0]])
    batch = TokenBatch(new, old, advantage, torch.ones(1, 2), logp_rollout=old)
    objective = objectives.create(name)
    loss = objective.loss(batch, "token-sum")
    loss.backward()
    near = replace(batch, logp_new=torch.tensor([[-81.0, -1.0]]))
    assert loss.item() == pytest.approx(objective.loss(near, "token-sum").item(), rel=1e-6, abs=1e-12)
    assert new.grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_nan_at_a_trained_token_shows_in_the_loss(name, random_batch):
    batch = random_batch(0)
    # A < 0: a positive advantage lets TOPR ignore the ratio
    side = "logp_new" if name == "reinforce" else "logp_old"
    nan = {side: getattr(batch, side).masked_fill(batch.mask, math.nan)}
    poisoned = replace(batch, advantage=-batch.mask.double(), **nan)
    assert math.isnan(objectives.create(name).loss(poisoned, loss_scale=LOSS_SCALE).item())


@pytest.mark.parametrize(
    ("logp_dtype", "computed"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_is_computed_in_float32(name, logp_dtype, computed, random_batch):
    batch = random_batch(4, dtype=getattr(torch, logp_dtype))
    exact = TokenBatch(
        batch.logp_new.double(), batch.logp_old.double(), batch.advantage.double(), batch.mask,
        logp_rollout=batch.logp_rollout.double(),
    )  # fmt: skip
    objective = objectives.create(name)
    terms = objective.terms(batch)
    assert terms.surrogate.dtype == getattr(torch, computed)
    # 3e-5: the golden vectors' float32 tolerance; bfloat16's own rounding (4e-3) is in both
    torch.testing.assert_close(terms.surrogate.double(), objective.terms(exact).surrogate, rtol=3e-5, atol=1e-36)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_zero_advantages_give_a_zero_loss_and_no_gradient(name, random_batch):
    # as for a group whose rewards are all equal; ratios beyond the range of exp too
    batch = random_batch(0)
    old = batch.logp_old.clone()
    old[0, 0] = -1e4
    batch = with_gradient(replace(batch, advantage=torch.zeros(batch.n_sequences), logp_old=old))
    loss = objectives.create(name).loss(batch, loss_scale=LOSS_SCALE)
    loss.backward()
    assert loss.item() == 0 and not batch.logp_new.grad.any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sequence_without_a_trained_token_changes_no_other(name, random_batch):
    batch = with_gradient(random_batch(4, 4, 6))
    masked = replace(batch, mask=torch.cat([batch.mask[:2], torch.zeros_like(batch.mask[2:])]))
    alone = TokenBatch(**{f.name: getattr(batch, f.name)[:2] for f in fields(batch)})
    objective = objectives.create(name)
    found, expected = (objective.loss(b, "token-mean") for b in (masked, alone))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-15)
    assert not objective.terms(masked).gradient_multiplier[2:].any()


def one_token(log_ratio, advantage, dtype=torch.float32, mismatch=0.0) -> TokenBatch:
    """One token with logp_old = 0, as float32 holds its log-ratio exactly."""
    cell = torch.tensor([[float(log_ratio)]], dtype=dtype, requires_grad=True)
    rollout = torch.tensor([[-float(mismatch)]], dtype=dtype)
    advantages = torch.tensor([[float(advantage)]], dtype=dtype)
    return TokenBatch(cell, torch.zeros_like(cell), advantages, torch.ones(1, 1), logp_rollout=rollout)


def slope_of(objective, batch) -> float:
    objective.loss(batch, "token-sum").backward()
    return -batch.logp_new.grad.item()


@pytest.mark.parametrize(
    ("name", "given", "log_ratio"),
    [
        ("mhpo_dhp_only", {"k_pos": 0.5, "lambda_pos": 5.0}, 100.0),
        ("mhpo_lfm_only", {"c": 100.0}, 200.0),
        ("mhpo_sa", {"c": 100.0, "k_pos": 0.5, "lambda_pos": 5.0}, 200.0),
        ("mhpo_no_stopgrad", {"c": 110.0, "k_pos": 0.5, "k_neg": 0.5, "lambda_neg": 5.0}, -700.0),
        ("decoupled", {}, 95.0),
        ("decoupled", {"base": "is_pg"}, 720.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_multiplier_beyond_the_range_is_no_nan(name, given, log_ratio, dtype):
    objective = objectives.create(name, **given)
    for advantage in (0.0, 1.0, -2.0):
        batch = one_token(log_ratio, advantage, dtype, mismatch=0.5)
        assert math.isfinite(slope_of(objective, batch))
        assert advantage != 0 or (batch.logp_new.grad.item() == 0 and objective.loss(batch).item() == 0)


@pytest.mark.parametrize(("log_ratio", "advantage"), [(89.0, 0.5), (89.25, -0.5), (92.0, 2.0**-9)])
def test_a_ratio_beyond_float32_whose_product_with_the_advantage_is_inside(log_ratio, advantage):
    batch = one_token(log_ratio, advantage)
    expected = math.exp(log_ratio) * advantage
    objective = objectives.create("is_pg")
    assert slope_of(objective, batch) == pytest.approx(expected, rel=1e-6)
    assert objective.terms(batch).surrogate.item() == pytest.approx(expected, rel=1e-6)
    assert objective.loss(batch).item() == pytest.approx(-expected, rel=1e-6)
    assert objective.terms(batch).clamped.item()


def test_a_mean_of_float32_values_that_their_sum_would_leave():
    x = torch.full((1, 4), 88.5)
    batch = TokenBatch(x, torch.zeros_like(x), torch.ones(1), torch.ones(1, 4))
    assert objectives.create("is_pg").loss(batch).item() == pytest.approx(-math.exp(88.5), rel=1e-6)


def test_a_tiny_mismatch_weight_times_a_huge_ratio():
    objective = objectives.create("decoupled", base="is_pg")
    batch = one_token(80.0, -1.0, mismatch=-100.0)
    assert slope_of(objective, batch) == pytest.approx(-math.exp(-20), rel=1e-6)


@pytest.mark.parametrize("name", ["mhpo", "mhpo_dhp_only", "mhpo_no_stopgrad", "mhpo_sa"])
@pytest.mark.parametrize("given", [{}, {"c": 20.0, "k_pos": 7.0, "k_neg": 7.0, "lambda_pos": 5.0, "lambda_neg": 5.0}])
def test_float32_is_float64_rounded_once(name, given):
    x = torch.linspace(-12, 12, 4001)[None]
    objective = objectives.create(name, **given)
    batch = TokenBatch(x, torch.zeros_like(x), torch.ones(1), torch.ones_like(x))
    exact = replace(batch, logp_new=x.double(), logp_old=torch.zeros_like(x).double())
    for term in ("surrogate", "gradient_multiplier"):
        found, expected = getattr(objective.terms(batch), term), getattr(objective.terms(exact), term)
        torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=1e-37)


@pytest.mark.parametrize("name", ["mis", "icepop"])
def test_a_band_of_one_ratio_masks_all_others(name):
    x = torch.tensor([[1.0, -1.0, 0.0]])
    batch = TokenBatch(x, torch.zeros_like(x), torch.ones(1), torch.ones_like(x))
    found = objectives.create(name, ratio_min=1.0, ratio_max=1.0).terms(batch).gradient_multiplier
    assert found.tolist() == [[0.0, 0.0, 1.0]]


def test_clip_flags_tell_binding_from_out_of_range():
    # ratio 1.5, 1.5, 0.5, 0.5, 1 with A = +, −, +, −, + and bounds 0.8 … 1.2
    ratio, advantage = [1.5, 1.5, 0.5, 0.5, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0]
    terms = objectives.create("grpo").terms(
        TokenBatch(torch.tensor([ratio]).log(), torch.zeros(1, 5), torch.tensor([advantage]), torch.ones(1, 5))
    )
    assert terms.clipped_high.tolist() == [[True, False, False, False, False]]
    assert terms.clipped_low.tolist() == [[False, False, False, True, False]]
    assert terms.out_of_range.tolist() == [[True, True, True, True, False]]
    # binding: 1.2·1 and 0.8·(−1) with slope 0; else r·A with slope r
    torch.testing.assert_close(terms.surrogate, torch.tensor([[1.2, -1.5, 0.5, -0.8, 1.0]]))
    torch.testing.assert_close(terms.gradient_multiplier, torch.tensor([[0.0, 1.5, 0.5, 0.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_ratio_exactly_on_a_bound_is_inside(dtype):
    bounds = [math.log1p(-0.2), math.log1p(0.28)]
    batch = TokenBatch(
        torch.tensor([bounds], dtype=dtype),
        torch.zeros(1, 2, dtype=dtype),
        torch.tensor([[-1.0, 1.0]]),
        torch.ones(1, 2),
    )
    assert not objectives.create("dapo").terms(batch).out_of_range.any()
    outside = replace(batch, logp_new=batch.logp_new * 1.0001)
    terms = objectives.create("dapo").terms(outside)
    assert terms.clipped_low.tolist() == [[True, False]] and terms.clipped_high.tolist() == [[False, True]]


def test_hazard_is_the_sum_of_its_parts_where_there_is_one(random_batch):
    batch = random_batch(6)
    terms = objectives.create("mhpo").terms(batch)
    assert torch.equal(terms.hazard, terms.hazard_positive + terms.hazard_negative)
    torch.testing.assert_close(terms.survival_weight[batch.mask], torch.exp(-terms.hazard[batch.mask]))
    assert objectives.create("grpo").terms(batch).hazard is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_terms_are_those_of_ratio_one(name):
    found = objectives.create(name).on_policy_terms()
    assert found["log_ratio"] == 0 and not found["clamped"]
    weighs_by_the_ratio_alone = not name.startswith("mhpo") or name == "mhpo_lfm_only"
    if weighs_by_the_ratio_alone:
        assert found["gradient_multiplier"] == pytest.approx(1, rel=1e-12)
    assert ("hazard" in found) == (name.startswith("mhpo") and name != "mhpo_lfm_only")
