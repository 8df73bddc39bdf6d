"""The fast rollup against `measure`: what it counts is equal, what it reads off its bins no further off than they."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhpo_core import TokenBatch, objectives
from mhpo_core.metrics import METRICS, QUANTILE_LEVELS
from mhpo_core.objectives import OBJECTIVES
from mhpo_core.telemetry import accumulate, measure, merge, panels
from mhpo_core.telemetry.binned import can_bin, measure_binned

BINNED = [name for name, cls in OBJECTIVES.items() if cls.follows_from_ratio]
BAD = (math.nan, math.inf, -math.inf)
# what is counted, summed or compared token by token
EXACT = {
    "n_tokens", "n_sequences", "length_mean", "nonfinite_count", "clamped_count", "impossible_count",
    "logit_grad_norm_exact_count", "log_ratio_std", "kl_old_new_k1", "entropy_mean", "mismatch_mean",
    *(f"log_ratio_{what}{side}" for what in ("mean", "min", "max") for side in ("", "_adv_pos", "_adv_neg")),
    "mismatch_min", "mismatch_max",
}  # fmt: skip
OF_TERM = {
    "hazard_mean": "hazard", "hazard_positive_mean": "hazard_positive", "hazard_negative_mean": "hazard_negative",
    "survival_weight_mean": "survival_weight", "modulated_log_ratio_mean": "modulated_log_ratio",
    "clip_fraction_low": "clipped_low", "clip_fraction_high": "clipped_high", "out_of_range_fraction": "out_of_range",
}  # fmt: skip
HALF_BIN = 2**-8


def spoiled(batch, seed) -> TokenBatch:
    """The batch with a tenth of its floats replaced by NaN, ±Inf and 0, trained ones too."""
    rng, changes = np.random.default_rng(seed), {}
    for field in fields(batch):
        values = getattr(batch, field.name)
        if values is not None and values.is_floating_point():
            hit = torch.as_tensor(rng.random(values.shape) < 0.1)
            other = torch.as_tensor(rng.choice([*BAD, 0.0], values.shape), dtype=values.dtype)
            changes[field.name] = torch.where(hit, other, values)
    return replace(batch, **changes)


def by_row(batch, seed, choices=(-1.7, -0.4, 0.0, 0.6, 2.1)) -> TokenBatch:
    """The batch with one advantage per sequence."""
    advantage = np.random.default_rng(seed).choice(choices, batch.n_sequences)
    return replace(batch, advantage=torch.as_tensor(advantage, dtype=batch.advantage.dtype))


class Tokens:
    """The trained tokens, their exact terms, and the fine bin of each: 128 per octave and side, found without bits."""

    def __init__(self, batch, exact):
        def flat(values):
            return None if values is None else values.double().numpy()[batch.mask.numpy()]

        self.advantage, self.norm = flat(batch.advantage), flat(exact.logit_grad_norm)
        with np.errstate(invalid="ignore"):
            self.log_ratio = flat(batch.logp_new) - flat(batch.logp_old)
            self.mismatch = flat(batch.logp_old) - flat(batch.logp_rollout)
        self.terms = {f.name: flat(getattr(exact.terms, f.name)) for f in fields(exact.terms)}
        self.terms["hazard"] = flat(exact.terms.hazard)
        with np.errstate(over="ignore"):
            x = self.log_ratio.astype(np.float32).astype(np.float64)
        mantissa, exponent = np.frexp(np.where(np.isfinite(x), x, 0.0))
        side = np.where(np.isnan(self.advantage), 2, np.sign(self.advantage))
        columns = np.stack([np.sign(x), exponent, np.floor(np.abs(mantissa) * 256), side, np.isfinite(x), np.isnan(x)])
        self.bins = np.unique(np.nan_to_num(columns), axis=1, return_inverse=True)[1].reshape(-1)

    def range(self, values) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest value in the bin of each token."""
        values, n = np.asarray(values, dtype=float), self.bins.max() + 1
        low, high = np.full(n, np.inf), np.full(n, -np.inf)
        with np.errstate(invalid="ignore"):
            np.minimum.at(low, self.bins, values)
            np.maximum.at(high, self.bins, values)
        return low[self.bins], high[self.bins]

    def mean_between(self, values, where=True):
        """Bounds of a mean over bins, whatever values of its own tokens each bin is given; None without a token."""
        here = np.isfinite(values) & where
        low, high = self.range(values)
        with np.errstate(over="ignore"):
            return (low[here].mean(), high[here].mean()) if here.any() else None


def assert_between(found, bounds, what):
    if bounds is None:
        assert found is None, what
    elif not np.isfinite(bounds).all():
        assert found == bounds[1], what
    else:
        rounding = 1e-6 * max(map(abs, bounds)) + 1e-12
        assert bounds[0] - rounding <= found <= bounds[1] + rounding, what


def assert_quantiles(found, values, prefix, suffix=""):
    finite = np.sort(values[np.isfinite(values)])
    for name, level in QUANTILE_LEVELS.items():
        key, place = f"{prefix}_{name}{suffix}", level * (len(finite) - 1)
        if not len(finite):
            assert found[key] is None, key
            continue
        two = finite[[math.floor(place), math.ceil(place)]]
        # each of the two is at most half a bin off
        slack = HALF_BIN * np.abs(two).max() * 1.01 + 1e-12
        assert found[key] == pytest.approx(np.quantile(finite, level), rel=0, abs=slack), key


def assert_telemetry(found, batch, objective, rel=1e-9):
    exact = measure(batch, objective)
    tokens, scalars = Tokens(batch, exact), found.scalars
    assert set(scalars) == set(exact.scalars) <= set(METRICS)
    for name in EXACT:
        expected = exact.scalars[name]
        close = None if expected is None else pytest.approx(expected, rel=rel, abs=rel, nan_ok=True)
        assert scalars[name] == close, name
    for name, term in OF_TERM.items():
        values = tokens.terms[term]
        assert_between(scalars[name], None if values is None else tokens.mean_between(values), name)
    multiplier, x, advantage = tokens.terms["gradient_multiplier"], tokens.log_ratio, tokens.advantage
    assert_between(
        scalars["gradient_multiplier_mean"], tokens.mean_between(multiplier, advantage != 0), "gradient_multiplier_mean"
    )
    with np.errstate(over="ignore", invalid="ignore"):
        lost = np.where(advantage * x < 0, multiplier < 0.1 * objective.on_policy_multiplier, np.nan)
        for name, value in (("kl_old_new_k3", x), ("kl_rollout_old_k3", tokens.mismatch)):
            expected = exact.scalars[name]
            # an exponential of x is half a bin of x off
            slack = 3 * HALF_BIN * (1 + np.abs(value[np.isfinite(value)]).max(initial=0))
            assert scalars[name] == (None if expected is None else pytest.approx(expected, rel=slack)), name
    assert_between(scalars["restoring_lost_fraction"], tokens.mean_between(lost), "restoring_lost_fraction")
    assert_quantiles(scalars, x, "log_ratio")
    assert_quantiles(scalars, x[advantage > 0], "log_ratio", "_adv_pos")
    assert_quantiles(scalars, x[advantage < 0], "log_ratio", "_adv_neg")
    assert_quantiles(scalars, tokens.mismatch, "mismatch")
    assert_norm(scalars, exact.scalars, tokens)
    assert_histograms(found.histograms, exact.histograms, tokens)


def assert_norm(found, exact, tokens):
    """A token gradient norm is off by |A| · the spread of M in its bin, at most √2 as much, and by float32."""
    multiplier = tokens.terms["gradient_multiplier"]
    low, high = tokens.range(multiplier)
    with np.errstate(invalid="ignore", over="ignore"):
        # 1 − 2p + Σp² has the rounding errors of p, and p is at most 0.98 here
        slack = np.abs(tokens.advantage) * (math.sqrt(2) * (high - low) + 1e-5 * np.abs(multiplier))
    slack = np.nan_to_num(slack, posinf=0.0)
    finite = np.isfinite(tokens.norm)
    if (tokens.norm[finite] > 1e38).any():
        return  # no float32
    off = {"logit_grad_norm_mean": slack[finite].sum() / max(finite.sum(), 1), "logit_grad_norm_max": slack.max()}
    for name, value in off.items():
        close = None if exact[name] is None else pytest.approx(exact[name], rel=1e-5, abs=value)
        assert found[name] == close, name


def assert_histograms(found, exact, tokens):
    assert [(h.quantity, h.side) for h in found] == [(h.quantity, h.side) for h in exact]
    for mine, theirs in zip(found, exact, strict=True):
        if mine.quantity != "logit_grad_norm":
            assert (mine.count == theirs.count).all(), (mine.quantity, mine.side)
        assert mine.count.sum() == theirs.count.sum()
        if theirs.advantage_weight is not None:
            np.testing.assert_allclose(mine.advantage_weight, theirs.advantage_weight, rtol=0, atol=2**-19)


@pytest.mark.parametrize("name", BINNED)
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 30), width=st.integers(1, 12), spoil=st.booleans(),
    layout=st.sampled_from(["tokens", "rows"]),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_against_measure(name, seed, rows, width, spoil, layout, random_batch):
    batch = random_batch(seed, rows, width)
    if layout == "rows":
        batch = by_row(batch, seed)
    batch = spoiled(batch, seed) if spoil else batch
    objective = objectives.create(name)
    with pytest.MonkeyPatch.context() as patched:
        # several chunks, several blocks in each, and rows that are not laid end to end
        for constant, value in (("SHORT_ROW", 3), ("BLOCK", 20), ("CHUNK", 90)):
            patched.setattr(panels, constant, value)
        assert_telemetry(measure_binned(batch, objective), batch, objective)
    assert_telemetry(measure_binned(batch, objective), batch, objective)


def large_batch(seed=0, rows=100, width=1000, dtype=torch.float32) -> TokenBatch:
    """Enough tokens that bins keep their middles: normal shifts, a few far out, on a padded batch."""
    rng = np.random.default_rng(seed)
    shape = (rows, width)
    new = np.log(rng.uniform(0.001, 0.999, shape))
    old = new - 0.2 * rng.standard_normal(shape)
    old[rng.random(shape) < 3e-4] -= 8
    fields = {
        "logp_new": new, "logp_old": old, "logp_rollout": old - 0.1 * rng.standard_t(3, shape),
        "entropy": rng.exponential(1.0, shape), "sum_p_squared": np.exp(2 * new) + 0.1 * (1 - np.exp(new)) ** 2,
    }  # fmt: skip
    mask = np.arange(width) < rng.integers(width // 2, width + 1, rows)[:, None]
    tensors = {name: torch.as_tensor(np.where(mask, v, np.nan), dtype=dtype) for name, v in fields.items()}
    advantage = torch.as_tensor(rng.standard_normal(rows), dtype=dtype)
    return TokenBatch(**tensors, mask=torch.as_tensor(mask), advantage=advantage)


# relative errors that the docstring of measure_binned states; where a mean is near 0, or a share, absolute ones
RELATIVE = {
    "hazard_mean": 1e-5, "hazard_positive_mean": 1e-5, "hazard_negative_mean": 1e-5, "survival_weight_mean": 1e-5,
    "kl_old_new_k3": 2e-4, "kl_rollout_old_k3": 2e-4, "ess_fraction": 1e-3, "gradient_multiplier_mean": 5e-4,
    "logit_grad_norm_mean": 3e-3, "logit_grad_norm_max": 3e-2, "logit_grad_norm_top1_share": 5e-3,
}  # fmt: skip
ABSOLUTE = {
    "modulated_log_ratio_mean": 1e-6, "clip_fraction_low": 1e-3, "clip_fraction_high": 1e-3,
    "out_of_range_fraction": 1e-3, "restoring_lost_fraction": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("name", BINNED)
def test_large_batch_to_the_accuracy_that_is_stated(name):
    batch, objective = large_batch(), objectives.create(name)
    found, exact = measure_binned(batch, objective).scalars, measure(batch, objective).scalars
    for metric, value in exact.items():
        if metric in EXACT:
            close = pytest.approx(value, rel=1e-6)
        elif metric in RELATIVE or metric in ABSOLUTE:
            close = pytest.approx(value, rel=RELATIVE.get(metric, 0), abs=ABSOLUTE.get(metric, 0)) if value else value
        else:
            # a quantile; the goal is 0.5 % with a floor of 1e-3
            close = pytest.approx(value, rel=0, abs=5e-3 * max(abs(value), 1e-3))
        assert found[metric] == close, metric


@pytest.mark.parametrize("name", BINNED)
def test_large_batch_has_the_histograms_of_measure(name):
    batch, objective = large_batch(1), objectives.create(name)
    mine, theirs = measure_binned(batch, objective).histograms, measure(batch, objective).histograms
    assert_histograms(mine, theirs, None)
    for found, exact in zip(mine, theirs, strict=True):
        if found.quantity != "logit_grad_norm":
            # one bin of histograms can lose or win the tokens of a fine bin to a jump of M
            np.testing.assert_allclose(found.weight, exact.weight, rtol=1e-3, atol=2e-3 * exact.weight.sum())
        assert found.weight.sum() == pytest.approx(exact.weight.sum(), rel=3e-3)


def test_a_bin_full_of_equal_tokens_keeps_count_and_weight():
    # on policy: every token in the one bin of 0, whose weight is 300,000 · 0.3
    zero = torch.zeros(300, 1000)
    batch = TokenBatch(zero - 1, zero - 1, torch.full((300,), 0.3), torch.ones_like(zero), entropy=zero + 0.7)
    found = measure_binned(batch, objectives.create("is_pg"))
    assert {h.quantity: h.count.max() for h in found.histograms} == dict.fromkeys(
        ("log_ratio", "entropy", "logit_grad_norm"), 300_000
    )
    for histogram in found.histograms:
        assert histogram.weight.max() == pytest.approx(300_000 * 0.3, rel=1e-4)
    assert found.scalars["log_ratio_p50"] == found.scalars["log_ratio_max"] == 0


def test_few_tokens_far_out_are_met_exactly():
    # k3 and ESS are those of the tokens at 20.05, where half a bin is a factor of e^0.03
    new = torch.full((100, 1000), -30.0)
    new[0, :3] = -9.95
    batch = TokenBatch(new, torch.full_like(new, -30.0), torch.ones(100), torch.ones_like(new))
    found, exact = (f(batch, objectives.create("is_pg")).scalars for f in (measure_binned, measure))
    for name in ("kl_old_new_k3", "ess_fraction", "gradient_multiplier_mean", "logit_grad_norm_max"):
        assert found[name] == pytest.approx(exact[name], rel=1e-5), name


def test_a_quantile_is_half_a_bin_off_at_most():
    # nine tokens at the lower end of the bin 1 … 1.0078 and one at its upper end: their mean is too far from that one
    new = torch.tensor([[1.0] * 9 + [1.0077]])
    batch = TokenBatch(new, torch.zeros_like(new), torch.ones(1), torch.ones_like(new))
    found = measure_binned(batch, objectives.create("mhpo")).scalars
    assert found["log_ratio_p9999"] == pytest.approx(1.0077, rel=HALF_BIN)
    assert found["log_ratio_mean"] == pytest.approx(1.00077, rel=1e-6)


@pytest.mark.parametrize(("field", "value"), [("logp_new", 0.01), ("entropy", -0.01), ("sum_p_squared", 1.01)])
def test_impossible_tokens_are_counted(field, value):
    batch = large_batch(10, 20, 300)
    getattr(batch, field)[3, :2] = value
    assert measure_binned(batch, objectives.create("mhpo")).scalars["impossible_count"] == 2


def test_the_advantage_of_a_sequence_without_tokens_is_garbage():
    batch = large_batch(11, 20, 300)
    rows, mask = batch.advantage[:, 0].clone(), batch.mask.clone()
    rows[3], mask[3] = 1e30, False
    batch, objective = replace(batch, advantage=rows, mask=mask), objectives.create("mhpo")
    found, exact = measure_binned(batch, objective), measure(batch, objective)
    for mine, theirs in zip(found.histograms, exact.histograms, strict=True):
        assert mine.weight.sum() == pytest.approx(theirs.weight.sum(), rel=1e-3)


@pytest.mark.parametrize("spoil", [False, True])
def test_masked_garbage_order_and_padding_change_nothing(spoil):
    batch = by_row(large_batch(2, 20, 400, torch.float64), 2, (-1.7, 0.0, 0.6, math.nan))
    batch = replace(spoiled(batch, 3) if spoil else batch, mask=batch.mask)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))

    def moved(values):
        if values.is_floating_point() and values.dim() == 2:
            values = values.masked_fill(~batch.mask, 0.5)
        return torch.cat([values[order], torch.zeros(20, 2, dtype=values.dtype)], dim=1)

    given = {f.name: getattr(batch, f.name) for f in fields(batch) if getattr(batch, f.name) is not None}
    other = TokenBatch(**{name: moved(value) for name, value in given.items()})
    objective = objectives.create("mhpo")
    first, second = measure_binned(batch, objective), measure_binned(other, objective)
    for name, value in first.scalars.items():
        assert second.scalars[name] == (None if value is None else pytest.approx(value, rel=1e-6, nan_ok=True)), name
    for a, b in zip(first.histograms, second.histograms, strict=True):
        assert (a.quantity, a.side) == (b.quantity, b.side) and (a.count == b.count).all()
        np.testing.assert_allclose(a.weight, b.weight, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_float32(dtype):
    batch, objective = large_batch(4, 20, 300, dtype), objectives.create("mhpo")
    single = replace(
        batch,
        **{
            f.name: v.float()
            for f in fields(batch)
            if (v := getattr(batch, f.name)) is not None and v.is_floating_point()
        },
    )
    assert measure_binned(batch, objective).scalars == measure_binned(single, objective).scalars
    assert (
        measure_binned(batch, objective).scalars["log_ratio_max"] == measure(single, objective).scalars["log_ratio_max"]
    )


@pytest.mark.parametrize("advantage", [math.inf, -math.inf, math.nan, 1e9, 1e30])
def test_absurd_advantages(advantage):
    batch = large_batch(5, 20, 300, torch.float64)
    rows = batch.advantage[:, 0].clone()
    rows[3] = advantage
    batch, objective = replace(batch, advantage=rows), objectives.create("mhpo")
    found, exact = measure_binned(batch, objective), measure(batch, objective)
    assert_histograms(found.histograms, exact.histograms, None)
    total = sum(h.weight.sum() for h in exact.histograms if h.quantity == "log_ratio")
    for mine, theirs in zip(found.histograms, exact.histograms, strict=True):
        assert mine.weight.sum() == pytest.approx(theirs.weight.sum(), rel=1e-3, abs=1e-6 * total)
    assert found.scalars["nonfinite_count"] == exact.scalars["nonfinite_count"]


def test_weights_that_do_not_fit_beside_the_counts_lose_their_last_digits():
    # 80,000 tokens · 2e5 in units of 2⁻²⁰ are 54 bits, and the count takes 17 more
    batch, objective = replace(large_batch(6), advantage=torch.full((100,), 2e5)), objectives.create("mhpo")
    batch = replace(batch, logp_old=batch.logp_new)  # all in one bin
    found, exact = measure_binned(batch, objective).histograms, measure(batch, objective).histograms
    for mine, theirs in zip(found, exact, strict=True):
        if mine.advantage_weight is not None:
            assert (mine.count == theirs.count).all()
            np.testing.assert_allclose(mine.advantage_weight, theirs.advantage_weight, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - set(BINNED)))
def test_what_does_not_follow_from_the_ratio_is_measured_token_by_token(name, random_batch):
    batch, objective = random_batch(6), objectives.create(name)
    assert not can_bin(objective)
    assert measure_binned(batch, objective).scalars == measure(batch, objective).scalars


@pytest.mark.parametrize("name", BINNED)
def test_statistics_merge_with_those_of_accumulate(name):
    first, second = large_batch(7, 20, 300), large_batch(8, 10, 300)
    objective = objectives.create(name)
    mine, theirs = measure_binned(first, objective).accumulated, accumulate(second, objective)
    assert mine.names == theirs.names
    whole, both = merge([accumulate(first, objective), theirs]), merge([mine, theirs])
    assert (both.n_rows, both.counts.tolist()) == (30, whole.counts.tolist())
    assert (both.bin_count[:3] == whole.bin_count[:3]).all() and (both.bin_advantage == whole.bin_advantage).all()
    torch.testing.assert_close(both.maxima, whole.maxima, rtol=0.01, atol=0)


def test_log_ratio_alone():
    batch, objective = large_batch(9), objectives.create("mhpo")
    some, every = (measure_binned(batch, objective, *args) for args in (((),), ()))
    assert {h.quantity for h in some.histograms} == {"log_ratio"}
    assert set(some.scalars) == set(every.scalars)
    of_others = {n for n in every.scalars if n.startswith(("mismatch", "logit_grad_norm"))} | {"kl_rollout_old_k3"}
    for name, value in every.scalars.items():
        if name in of_others | {"entropy_mean"}:
            assert not some.scalars[name], name
        else:
            assert some.scalars[name] == value, name
