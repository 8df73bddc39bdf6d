"""Every scalar of a step against plain numpy over the trained tokens, and what non-finite tokens do to it."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mhpo_core import TokenBatch, objectives
from mhpo_core.metrics import METRICS, QUANTILE_LEVELS
from mhpo_core.objectives import OBJECTIVES
from mhpo_core.telemetry import measure

MEAN_OF_TERM = {
    "hazard_mean": "hazard", "hazard_positive_mean": "hazard_positive", "hazard_negative_mean": "hazard_negative",
    "survival_weight_mean": "survival_weight", "modulated_log_ratio_mean": "modulated_log_ratio",
    "clip_fraction_low": "clipped_low", "clip_fraction_high": "clipped_high", "out_of_range_fraction": "out_of_range",
}  # fmt: skip
BAD = (math.nan, math.inf, -math.inf)


def finite_mean(values):
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def distribution(prefix, values, suffix="") -> dict:
    known = values[~np.isnan(values)]
    finite = known[np.isfinite(known)]
    found = {f"{prefix}_mean{suffix}": finite_mean(values)}
    found[f"{prefix}_min{suffix}"] = known.min() if len(known) else None
    found[f"{prefix}_max{suffix}"] = known.max() if len(known) else None
    for name, level in QUANTILE_LEVELS.items():
        found[f"{prefix}_{name}{suffix}"] = np.quantile(finite, level) if len(finite) else None
    return found


def ratio_statistics(log_ratio) -> dict:
    finite = log_ratio[np.isfinite(log_ratio)]
    if not len(finite):
        return dict.fromkeys(("ess_fraction", "kl_old_new_k1", "kl_old_new_k3", "log_ratio_std"))
    ratio = np.exp(finite)
    return {
        "ess_fraction": ratio.sum() ** 2 / (ratio**2).sum() / len(ratio),
        "kl_old_new_k1": -finite.mean(),
        "kl_old_new_k3": (np.expm1(finite) - finite).mean(),
        "log_ratio_std": finite.std(),
    }


def gradient_statistics(norm, multiplier, advantage) -> dict:
    finite = np.sort(norm[np.isfinite(norm)])[::-1]
    total, top = finite.sum(), finite[: math.ceil(len(finite) / 100)]
    return {
        "logit_grad_norm_mean": finite_mean(norm),
        "logit_grad_norm_max": np.nanmax(norm) if not np.isnan(norm).all() else None,
        "logit_grad_norm_top1_share": top.sum() / total if total > 0 else None,
        "gradient_multiplier_mean": finite_mean(multiplier[advantage != 0]),
    }


def restoring_lost(log_ratio, advantage, multiplier, on_policy):
    pulled_back = advantage * log_ratio < 0
    return (multiplier[pulled_back] < 0.1 * on_policy).mean() if pulled_back.any() else None


def expected_scalars(batch, telemetry, on_policy) -> dict:
    """What numpy makes of the trained tokens, given the terms (tested elsewhere)."""
    mask = batch.mask.numpy()

    def flat(values):
        return values.double().numpy()[mask]

    logp_new, logp_old, rollout = flat(batch.logp_new), flat(batch.logp_old), flat(batch.logp_rollout)
    advantage, mismatch = flat(batch.advantage), logp_old - rollout
    log_ratio, lengths = logp_new - logp_old, mask.sum(axis=1)
    good = np.isfinite([logp_new, logp_old, rollout, advantage, flat(batch.logp_ref)]).all(axis=0)
    finite_mismatch = mismatch[np.isfinite(mismatch)]
    k3 = (np.expm1(finite_mismatch) - finite_mismatch).mean() if len(finite_mismatch) else None
    terms = {name: getattr(telemetry.terms, term) for name, term in MEAN_OF_TERM.items()}
    return {
        "n_tokens": mask.sum(),
        "n_sequences": (lengths > 0).sum(),
        "length_mean": lengths[lengths > 0].mean(),
        "nonfinite_count": (~good).sum(),
        "clamped_count": flat(telemetry.terms.clamped).sum(),
        "logit_grad_norm_exact_count": mask.sum(),
        "impossible_count": (
            (logp_new > 1e-4) | (flat(batch.entropy) < -1e-4) | (flat(batch.sum_p_squared) > 1 + 1e-4)
        ).sum(),
        "restoring_lost_fraction": restoring_lost(
            log_ratio, advantage, flat(telemetry.terms.gradient_multiplier), on_policy
        ),
        "entropy_mean": finite_mean(flat(batch.entropy)),
        "kl_rollout_old_k3": k3,
        **{name: None if v is None else finite_mean(flat(v)) for name, v in terms.items()},
        **ratio_statistics(log_ratio),
        **distribution("log_ratio", log_ratio),
        **distribution("log_ratio", log_ratio[advantage > 0], "_adv_pos"),
        **distribution("log_ratio", log_ratio[advantage < 0], "_adv_neg"),
        **distribution("mismatch", mismatch),
        **gradient_statistics(flat(telemetry.logit_grad_norm), flat(telemetry.terms.gradient_multiplier), advantage),
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-11, abs=1e-12, nan_ok=True), name


def spoiled(batch, seed) -> TokenBatch:
    """The batch with a tenth of its floats replaced by NaN and ±Inf, trained ones too."""
    rng = np.random.default_rng(seed)
    changes = {}
    for field in fields(batch):
        values = getattr(batch, field.name)
        if values.is_floating_point():
            hit = torch.as_tensor(rng.random(values.shape) < 0.1)
            changes[field.name] = torch.where(hit, torch.as_tensor(rng.choice(BAD, values.shape)), values)
    return replace(batch, **changes)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 30), width=st.integers(1, 12), spoil=st.booleans())
@example(seed=2, rows=25, width=9, spoil=True)  # two infinite ratios: the sum of is_pg's norms overflows, NaN share
@settings(deadline=None, max_examples=25)
def test_scalars_against_numpy(name, seed, rows, width, spoil, random_batch):
    batch = random_batch(seed, rows, width)
    batch = spoiled(batch, seed) if spoil else batch
    objective = objectives.create(name)
    telemetry = measure(batch, objective)
    with np.errstate(invalid="ignore", over="ignore"):
        assert_same(telemetry.scalars, expected_scalars(batch, telemetry, objective.on_policy_multiplier))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_garbage_order_and_padding_change_nothing(name, random_batch):
    batch, objective = random_batch(8), objectives.create(name)
    order = torch.tensor([3, 0, 4, 2, 1])

    def moved(values):
        if values.is_floating_point():
            values = values.masked_fill(~batch.mask, 0.5)
        return torch.cat([values[order], torch.zeros(5, 2, dtype=values.dtype)], dim=1)

    other = TokenBatch(**{f.name: moved(getattr(batch, f.name)) for f in fields(batch)})
    first, second = measure(batch, objective), measure(other, objective)
    assert_same(second.scalars, first.scalars)
    for a, b in zip(first.histograms, second.histograms, strict=True):
        assert (a.quantity, a.side) == (b.quantity, b.side) and (a.count == b.count).all()
        np.testing.assert_allclose(a.weight, b.weight, rtol=1e-12)


def tokens(log_ratio, advantage, **optional) -> TokenBatch:
    """One sequence whose tokens have these log-ratios and advantages."""
    new = torch.tensor([log_ratio], dtype=torch.float64)
    extra = {name: torch.tensor([values], dtype=torch.float64) for name, values in optional.items()}
    return TokenBatch(new, torch.zeros_like(new), torch.tensor([advantage]), torch.ones(1, len(log_ratio)), **extra)


def scalars_of(batch, name="ppo_clip", **hyperparameters) -> dict:
    return measure(batch, objectives.create(name, **hyperparameters)).scalars


def test_clip_fractions_are_not_the_share_out_of_range():
    # ratios 1.5, 1.5, 0.5, 0.5, 1 with A = +, −, +, −, +: the upper bound binds once, the lower once, four are outside
    found = scalars_of(tokens(np.log([1.5, 1.5, 0.5, 0.5, 1.0]).tolist(), [1.0, -1.0, 1.0, -1.0, 1.0]))
    assert found["clip_fraction_low"] == found["clip_fraction_high"] == pytest.approx(0.2)
    assert found["clip_fraction_low"] + found["clip_fraction_high"] == pytest.approx(0.4)
    assert found["out_of_range_fraction"] == pytest.approx(0.8)


def test_ratio_statistics_by_hand():
    # r = 1, 3: ESS = 16 / 10 = 1.6 of 2; k1 = −ln 3 / 2; k3 = (0 + 3 − 1 − ln 3) / 2; std = ln 3 / 2
    found, log3 = scalars_of(tokens([0.0, math.log(3)], [1.0, 1.0])), math.log(3)
    assert found["ess_fraction"] == pytest.approx(0.8, rel=1e-12)
    assert found["kl_old_new_k1"] == pytest.approx(-log3 / 2, rel=1e-12)
    assert found["kl_old_new_k3"] == pytest.approx((2 - log3) / 2, rel=1e-12)
    assert found["log_ratio_std"] == pytest.approx(log3 / 2, rel=1e-12)


def test_mismatch_is_old_minus_rollout():
    # logp_old = 0, rollout = −ln 3: d = ln 3, k3 = 3 − 1 − ln 3
    found = scalars_of(tokens([0.5], [1.0], logp_rollout=[-math.log(3)]))
    assert found["mismatch_mean"] == found["mismatch_max"] == pytest.approx(math.log(3), rel=1e-12)
    assert found["kl_rollout_old_k3"] == pytest.approx(2 - math.log(3), rel=1e-12)


def test_kl_k3_keeps_the_digits_of_a_small_shift():
    # k3 = x²/2 + x³/6 + …; exp(x) − 1 without expm1 has an error of 1e-16 on 5e-13
    found = scalars_of(tokens([1e-6], [1.0], logp_rollout=[-1e-6]))
    for name in ("kl_old_new_k3", "kl_rollout_old_k3"):
        assert found[name] == pytest.approx(5e-13 + 1e-18 / 6, rel=1e-9, abs=0)


@pytest.mark.parametrize("name", ["kl_old_new_k3", "kl_rollout_old_k3"])
def test_an_overflowing_kl_is_infinite_and_not_left_out(name):
    batch = tokens([0.1, 800.0], [1.0, 1.0], logp_rollout=[-0.1, -800.0])
    assert scalars_of(batch)[name] == math.inf


def test_effective_sample_size_survives_huge_ratios():
    assert scalars_of(tokens([700.0, 700.0, 0.0, 0.0], [1.0] * 4))["ess_fraction"] == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("shift", [-400.0, 400.0])
def test_effective_sample_size_of_ratios_whose_squares_no_float_holds(shift):
    # the larger one is all there is: ESS = 1 of 2; two equal ones: 2 of 2
    assert scalars_of(tokens([shift, shift - 100], [1.0, 1.0]))["ess_fraction"] == pytest.approx(0.5, rel=1e-12)
    assert scalars_of(tokens([shift, shift], [1.0, 1.0]))["ess_fraction"] == pytest.approx(1.0, rel=1e-12)


def test_smallest_and_largest_keep_infinity_and_the_mean_does_not():
    found = scalars_of(tokens([-math.inf, 0.25, 0.75, math.inf, math.nan], [1.0] * 5))
    assert (found["log_ratio_min"], found["log_ratio_max"]) == (-math.inf, math.inf)
    assert found["log_ratio_mean"] == found["log_ratio_p50"] == 0.5
    assert found["nonfinite_count"] == 3 and found["clamped_count"] == 1


def test_an_infinite_token_gradient_norm_is_the_largest():
    # r·A = e^709.7·1e10 overflows float64; the other token has A·M·(1 − p) = 2·1·½
    batch = tokens([math.log(0.5), 709.7], [2.0, 1e10])
    batch = replace(batch, logp_old=torch.tensor([[math.log(0.5), -711.0]], dtype=torch.float64))
    batch = replace(batch, logp_new=torch.tensor([[math.log(0.5), -1.3]], dtype=torch.float64))
    found = scalars_of(batch, "is_pg")
    assert found["logit_grad_norm_max"] == math.inf and found["logit_grad_norm_mean"] == pytest.approx(1.0)


def test_share_of_the_top_hundredth():
    # 199 tokens of norm 1·½ and 2 of norm 10·½: ⌈201/100⌉ = 3 largest hold 10 + 10 + 1 of 219
    batch = TokenBatch(*[torch.full((1, 201), math.log(0.5), dtype=torch.float64)] * 2,
                       torch.tensor([[1.0] * 199 + [-10.0] * 2]), torch.ones(1, 201))  # fmt: skip
    assert scalars_of(batch, "is_pg")["logit_grad_norm_top1_share"] == pytest.approx(21 / 219, rel=1e-12)


@pytest.mark.parametrize("name", ["logp_new", "logp_old", "advantage", "logp_rollout", "logp_ref"])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_trained_token_counts_once(name, bad, random_batch):
    batch = random_batch(2)
    values = getattr(batch, name).clone()
    values[0, 0] = bad
    assert scalars_of(batch)["nonfinite_count"] == 0
    assert scalars_of(replace(batch, **{name: values}))["nonfinite_count"] == 1


def test_what_has_no_input_is_none(random_batch):
    batch = replace(random_batch(0), logp_rollout=None, entropy=None, logp_ref=None, sum_p_squared=None)
    found = scalars_of(batch)
    none = {name for name, value in found.items() if value is None}
    assert found["logit_grad_norm_exact_count"] == 0
    mismatch = {name for name in METRICS if name.startswith("mismatch_")}
    assert none == mismatch | {n for n in METRICS if n.startswith(("hazard", "survival", "modulated"))} | {
        "kl_rollout_old_k3", "entropy_mean",
    }  # fmt: skip
    assert {n for n, v in scalars_of(batch, "mhpo").items() if v is None} == mismatch | {
        "kl_rollout_old_k3", "entropy_mean", "clip_fraction_low", "clip_fraction_high", "out_of_range_fraction",
    }  # fmt: skip


def test_a_step_of_only_bad_tokens_has_no_means():
    found = scalars_of(tokens([math.nan, math.nan], [1.0, -1.0]), "mhpo")
    counted = {
        name: found[name] for name in (
            "n_tokens", "n_sequences", "length_mean", "nonfinite_count", "clamped_count", "impossible_count",
            "logit_grad_norm_exact_count",
        )
    }  # fmt: skip
    assert counted == {
        "n_tokens": 2, "n_sequences": 1, "length_mean": 2.0, "nonfinite_count": 2, "clamped_count": 0,
        "impossible_count": 0, "logit_grad_norm_exact_count": 0,
    }  # fmt: skip
    assert all(value is None for name, value in found.items() if name not in counted)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_measuring_leaves_no_graph(name, random_batch):
    batch = replace(random_batch(0), logp_new=random_batch(0).logp_new.requires_grad_())
    telemetry = measure(batch, objectives.create(name))
    assert not telemetry.logit_grad_norm.requires_grad and not telemetry.terms.surrogate.requires_grad
