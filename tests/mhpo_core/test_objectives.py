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
from torch.nn.functional import softplus

from mhpo_core import MhpoError, TokenBatch, objectives
from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives import AGGREGATIONS, ALIASES, OBJECTIVES, Objective
from mhpo_core.objectives.base import Terms

LOSS_SCALE = 8.0


def naive_clip(ratio, advantage, eps_low, eps_high):
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)


def naive_mhpo(ratio, advantage, c, k_pos, lambda_pos, k_neg, lambda_neg):
    modulated = c * torch.tanh(ratio.log() / c)
    shift = modulated.detach()
    hazard = (softplus(shift) / lambda_pos) ** k_pos + (softplus(-shift) / lambda_neg) ** k_neg
    return torch.exp(modulated - hazard) * advantage


CLIP_SPACE = {"eps_low": st.floats(0, 0.95), "eps_high": st.floats(0, 3)}
MHPO_SPACE = {name: st.floats(0.3, 3) for name in ("c", "k_pos", "lambda_pos", "k_neg", "lambda_neg")}
# name → (surrogate as the paper writes it, legal hyperparameters)
TWINS = {
    "mhpo": (naive_mhpo, MHPO_SPACE),
    "ppo_clip": (naive_clip, CLIP_SPACE),
    "dapo_clip": (naive_clip, CLIP_SPACE),
    "is_pg": (lambda ratio, advantage: ratio * advantage, {}),
}


def test_every_objective_has_a_twin():
    assert set(TWINS) == set(OBJECTIVES)
    for name, (_, space) in TWINS.items():
        assert set(space) == {f.name for f in fields(OBJECTIVES[name])}


def with_gradient(batch) -> TokenBatch:
    return replace(batch, logp_new=batch.logp_new.detach().clone().requires_grad_())


@pytest.mark.parametrize("name", OBJECTIVES)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_value_and_gradient_are_those_of_the_twin(name, data, random_batch):
    twin, space = TWINS[name]
    chosen = {key: data.draw(values, key) for key, values in space.items()}
    batch = with_gradient(random_batch(data.draw(st.integers(0, 10**6)), spread=1.0))
    objective = objectives.create(name, **chosen)
    objective.loss(batch, "token-sum").backward()
    picked = batch.mask
    logp = batch.logp_new.detach()[picked].requires_grad_()
    value = twin((logp - batch.logp_old[picked]).exp(), batch.advantage[picked], **chosen)
    value.sum().backward()
    terms = objective.terms(batch)
    torch.testing.assert_close(terms.surrogate[picked], value.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(-batch.logp_new.grad[picked], logp.grad, rtol=1e-11, atol=1e-11)
    product = (batch.advantage * terms.gradient_multiplier)[picked]
    torch.testing.assert_close(product, logp.grad, rtol=1e-11, atol=1e-11)


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
        }[mode]
        expected -= weight * terms.surrogate[b, t].item()
        slope[b, t] = -weight * batch.advantage[b, t] * terms.gradient_multiplier[b, t]
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(batch.logp_new.grad, slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_default_aggregation_is_the_canonical_one(name, random_batch):
    objective, batch = objectives.create(name), random_batch(5)
    values = {mode: objective.loss(batch, mode, LOSS_SCALE).item() for mode in AGGREGATIONS}
    assert len(set(values.values())) == len(AGGREGATIONS)
    assert objective.loss(batch).item() == values[objective.canonical_aggregation]


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
    losses = [objective.loss(b) for b in (clean, dirty)]
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
    assert objective.loss(batch).requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_logp_new_receives_a_gradient(name, random_batch):
    batch = with_gradient(random_batch(2))
    others = {n: getattr(batch, n).clone().requires_grad_() for n in ("logp_old", "advantage", "logp_rollout")}
    objectives.create(name).loss(replace(batch, **others)).backward()
    assert batch.logp_new.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in others.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_infinite_log_probability_is_data_not_a_nan_loss(name):
    # log r = −Inf is the limit r → 0: is_pg and the clip family give J = 0·A there, MHPO its lower limit
    new = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    batch = TokenBatch(new, torch.tensor([[-1.0, -1.0]]), torch.tensor([1.0]), torch.ones(1, 2))
    objective = objectives.create(name)
    loss = objective.loss(batch, "token-sum")
    loss.backward()
    near = replace(batch, logp_new=torch.tensor([[-81.0, -1.0]]))
    assert loss.item() == pytest.approx(objective.loss(near, "token-sum").item(), rel=1e-6)
    assert new.grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_nan_at_a_trained_token_shows_in_the_loss(name, random_batch):
    batch = random_batch(0)
    poisoned = replace(batch, logp_old=batch.logp_old.masked_fill(batch.mask, math.nan), advantage=batch.mask.double())
    assert math.isnan(objectives.create(name).loss(poisoned).item())


@pytest.mark.parametrize(
    ("logp_dtype", "computed"), [("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2]
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_is_computed_in_float32(name, logp_dtype, computed, random_batch):
    batch = random_batch(4, dtype=getattr(torch, logp_dtype))
    exact = TokenBatch(batch.logp_new.double(), batch.logp_old.double(), batch.advantage.double(), batch.mask)
    objective = objectives.create(name)
    terms = objective.terms(batch)
    assert terms.surrogate.dtype == getattr(torch, computed)
    # 3e-5: the golden vectors' float32 tolerance; bfloat16's own rounding (4e-3) is in both
    torch.testing.assert_close(terms.surrogate.double(), objective.terms(exact).surrogate, rtol=3e-5, atol=1e-36)


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
    twin, _ = TWINS[name]
    one = torch.ones((), dtype=torch.float64)
    value = twin(one, one, **objectives.create(name).hyperparameters())
    assert found["log_ratio"] == 0 and found["surrogate"] == pytest.approx(value.item(), rel=1e-12)
    assert ("hazard" in found) == (name == "mhpo")


class TestCreate:
    @pytest.mark.parametrize("name", [*OBJECTIVES, *ALIASES])
    def test_by_name_and_alias(self, name):
        created = objectives.create(name)
        assert isinstance(created, Objective) and created.name == ALIASES.get(name, name)
        assert objectives.create(name, **created.hyperparameters()) == created

    @pytest.mark.parametrize("name", ["", "gppo", None, "MHPO2"])
    def test_unknown_name(self, name):
        with pytest.raises(ObjectiveError) as error:
            objectives.create(name)
        assert repr(name) in str(error.value)
        assert all(valid in str(error.value) for valid in [*OBJECTIVES, *ALIASES])

    def test_a_close_name_is_suggested(self):
        with pytest.raises(ObjectiveError, match=r"Did you mean 'mhpo'\?"):
            objectives.create("mhop")

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_unknown_hyperparameter(self, name):
        with pytest.raises(ObjectiveError, match=f"{name} has no hyperparameter epsilon, valid are ") as error:
            objectives.create(name, epsilon=0.1)
        assert all(f.name in str(error.value) for f in fields(OBJECTIVES[name]))

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.2", None, True])
    @pytest.mark.parametrize(("name", "key"), [(n, f.name) for n, cls in OBJECTIVES.items() for f in fields(cls)])
    def test_hyperparameter_out_of_range(self, name, key, value):
        with pytest.raises(ObjectiveError) as error:
            objectives.create(name, **{key: value})
        message = str(error.value)
        assert message.startswith(f"{name}: ") and f"{key} = {value!r}" in message and "allowed are" in message
        assert isinstance(error.value, MhpoError) and isinstance(error.value, ValueError)

    def test_edges_of_the_ranges(self):
        assert objectives.create("grpo", eps_low=0, eps_high=0).hyperparameters() == {"eps_low": 0, "eps_high": 0}
        for name, key, value in [("grpo", "eps_low", 1.0), ("mhpo", "c", 0.0), ("mhpo", "k_neg", 0)]:
            with pytest.raises(ObjectiveError, match=f"{key} = {value}"):
                objectives.create(name, **{key: value})
