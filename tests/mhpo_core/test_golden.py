"""Every golden vector that this code has an implementation for; tolerances are those of the vectors' README."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mhpo_core import TokenBatch, group_advantages, objectives
from mhpo_core.objectives import AGGREGATIONS, OBJECTIVES, aggregate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "objectives.json").read_text())

# TRL divides by all B sequences, this code by the n that train: the same mode up to n / B
TRL_MODES = {"trl-grpo": "seq-mean-token-mean", "trl-dr_grpo": "seq-mean-token-sum-norm"}
RECIPES = [r for r in GOLDEN["recipes"] if r["objective"] in OBJECTIVES]
SINGLE_PASS = [r for r in GOLDEN["aggregation"] if r["case"] != "accumulate_2x"]


def numbers(nested) -> np.ndarray:
    return np.array(nested, dtype=np.float64)


def column(rows, name) -> np.ndarray:
    return np.array([math.nan if r.get(name) is None else float(r[name]) for r in rows])


def assert_golden(actual, expected, dtype=torch.float64):
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if dtype == torch.float64:
        tolerance = 1e-11 * np.maximum(1, np.abs(expected))
    else:
        # 3e-5: one float32 rounding of a log-ratio near 89 moves the ratio by 4e-6; below 1e-36 float32 is subnormal
        tolerance = np.maximum(3e-5 * np.abs(expected), 1e-36)
    error = np.abs(actual - expected)
    assert (error <= tolerance).all(), f"worst error {np.nanmax(error)}, NaN: {np.isnan(actual).sum()}"


def batch_of(rows, dtype) -> TokenBatch:
    def line(name):
        return torch.tensor(column(rows, name)[None], dtype=dtype)

    logp_new = line("logp_new").requires_grad_()
    return TokenBatch(logp_new, line("logp_old"), line("advantage"), torch.ones(1, len(rows), dtype=torch.bool))


def gradient(objective, batch) -> np.ndarray:
    objective.loss(batch, aggregation="token-sum").backward()
    return -batch.logp_new.grad[0].double().numpy()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_defaults_are_the_golden_ones(name):
    golden = GOLDEN["objectives"][name]
    assert objectives.create(name).hyperparameters() == {k: float(v) for k, v in golden["params"].items()}
    assert OBJECTIVES[name].canonical_aggregation == golden["canonical_aggregation"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_tokens(name, dtype):
    rows = [r for r in GOLDEN["token"] if r["objective"] == name]
    assert len(rows) == 85
    objective, batch = objectives.create(name), batch_of(rows, dtype)
    terms = objective.terms(batch)
    assert_golden(terms.surrogate[0], column(rows, "surrogate"), dtype)
    assert_golden(gradient(objective, batch), column(rows, "grad_logp"), dtype)
    defined = column(rows, "advantage") != 0
    multiplier, expected = terms.gradient_multiplier[0].double().numpy()[defined], column(rows, "multiplier")[defined]
    if dtype == torch.float64:
        # relative, far into the tails: the multiplier is computed in the log domain
        np.testing.assert_allclose(multiplier, expected, rtol=1e-12, atol=0)
    assert_golden(multiplier, expected, dtype)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_ratios_in_float64(name):
    rows = [r for r in GOLDEN["extreme_token"] if r["objective"] == name]
    assert len(rows) == 33
    objective, batch = objectives.create(name), batch_of(rows, torch.float64)
    terms = objective.terms(batch)
    assert_golden(terms.surrogate[0], column(rows, "surrogate"))
    assert_golden(gradient(objective, batch), column(rows, "grad_logp"))
    assert not terms.clamped.any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_ratios_in_float32_are_right_where_they_fit_and_finite_where_they_do_not(name):
    rows = [r for r in GOLDEN["extreme_token"] if r["objective"] == name]
    objective, batch = objectives.create(name), batch_of(rows, torch.float32)
    terms, slope = objective.terms(batch), gradient(objective, batch)
    fits = np.array([r["fp32_finite"] for r in rows])
    surrogate = terms.surrogate[0].double().numpy()
    assert_golden(surrogate[fits], column(rows, "surrogate")[fits], torch.float32)
    assert_golden(slope[fits], column(rows, "grad_logp")[fits], torch.float32)
    assert np.isfinite(surrogate).all() and np.isfinite(slope).all()
    overflows = column(rows, "log_ratio") > math.log(np.finfo(np.float32).max)
    assert terms.clamped[0].tolist() == overflows.tolist()


@pytest.mark.parametrize("garbage", [None, math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("row", RECIPES, ids=lambda r: f"{r['batch']}-{r['recipe']}")
def test_recipes(row, garbage):
    golden = GOLDEN["batches"][row["batch"]]
    mask = torch.tensor(golden["mask"], dtype=torch.bool)
    logp = {name: torch.tensor(numbers(golden[name])) for name in ("logp_new", "logp_old")}
    if garbage is not None:
        logp = {name: values.masked_fill(~mask, garbage) for name, values in logp.items()}
    logp["logp_new"].requires_grad_()
    batch = TokenBatch(**logp, advantage=torch.tensor(numbers(golden["advantages"])), mask=mask)
    objective = objectives.create(row["objective"], **{k: float(v) for k, v in row["params"].items()})
    mode = TRL_MODES.get(row["aggregation"], row["aggregation"])
    loss = objective.loss(batch, mode, row.get("loss_scale"))
    if row["aggregation"] in TRL_MODES:
        loss = loss * mask.any(dim=1).sum() / len(mask)
    loss.backward()
    assert_golden(loss.item(), float(row["loss"]))
    assert_golden(batch.logp_new.grad, numbers(row["grad_loss_logp"]))


@pytest.mark.parametrize("row", SINGLE_PASS, ids=lambda r: f"{r['case']}-{r['mode']}")
def test_aggregation(row):
    mask = torch.tensor(row["mask"], dtype=torch.bool)
    values = torch.tensor(numbers(row["values"])).masked_fill(~mask, math.nan).requires_grad_()
    mode = TRL_MODES.get(row["mode"], row["mode"])
    result = aggregate(values, mask, mode, row["loss_scale"])
    if row["mode"] in TRL_MODES:
        result = result * mask.any(dim=1).sum() / len(mask)
    result.backward()
    assert_golden(result.item(), float(row["result"]))
    assert_golden(values.grad, numbers(row["weights"]))


def test_every_aggregation_has_golden_rows():
    assert set(AGGREGATIONS) <= {r["mode"] for r in SINGLE_PASS}


@pytest.mark.parametrize(
    "row", [r for r in GOLDEN["aggregation"] if r["case"] == "accumulate_2x"], ids=lambda r: r["mode"]
)
def test_a_token_mean_is_global_only_if_its_denominator_is(row):
    values, mask = torch.tensor(numbers(row["values"])), torch.tensor(row["mask"], dtype=torch.bool)
    pieces = list(zip(values.split(row["micro_sizes"]), mask.split(row["micro_sizes"]), strict=True))
    if row["mode"] == "dapo-global-token-mean":
        found = sum(aggregate(v, m, "token-sum") for v, m in pieces) / mask.sum()
    else:
        found = sum(aggregate(v, m, "token-mean") for v, m in pieces) / len(pieces)
    assert_golden(found.item(), float(row["result"]))


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("grpo_trl(std+1e-4)", {}),
        ("grpo_verl(std+1e-6)", {"epsilon": 1e-6}),
        ("dr_grpo(no std)", {"normalize_std": False}),
    ],
)
def test_group_advantages(mode, settings):
    row = next(r for r in GOLDEN["advantage"] if r["mode"] == mode)
    reward = torch.tensor(numbers(row["groups"]))
    found = group_advantages(reward.flatten(), reward.shape[1], ddof=row["std_ddof"], **settings)
    assert_golden(found.view_as(reward), numbers(row["advantages"]))


class TestMhpoFacts:
    facts = {k: float(v) for k, v in GOLDEN["mhpo_facts"].items() if k != "params"}

    @staticmethod
    def terms(log_ratio, **hyperparameters):
        new = torch.tensor(np.atleast_2d(log_ratio))
        one = torch.ones_like(new)
        return objectives.create("mhpo", **hyperparameters).terms(TokenBatch(new, 0 * new, one, one.bool()))

    def test_ratio_one(self):
        found = objectives.create("mhpo").on_policy_terms()
        assert_golden(found["gradient_multiplier"], self.facts["M_at_ratio_1"])
        assert_golden(found["hazard"], self.facts["zeta_at_ratio_1"])
        assert_golden(found["survival_weight"], math.exp(-self.facts["zeta_at_ratio_1"]))

    @pytest.mark.parametrize(
        ("prefix", "settings"),
        # with λ = 1e18 the hazard is 1e-18: only the modulator is left
        [("", {}), ("lfm_only_", {"lambda_pos": 1e18, "lambda_neg": 1e18, "k_pos": 1.0, "k_neg": 1.0})],
    )
    def test_largest_multiplier(self, prefix, settings):
        place, largest = self.facts[f"{prefix}argmax_log_ratio"], self.facts[f"{prefix}sup_M"]
        grid = self.terms(np.append(np.linspace(-50, 50, 100_001), place), **settings).gradient_multiplier[0]
        assert_golden(grid[-1], largest)
        assert float(grid.max()) <= largest * (1 + 1e-15)
        assert largest < self.facts["paper_bound_exp_c"] and math.exp(1.5) == pytest.approx(
            self.facts["paper_bound_exp_c"], rel=1e-14
        )

    def test_without_stop_gradient_the_slope_would_change_sign(self):
        flip = self.facts["no_stopgrad_sign_flip_log_ratio"]
        step = 1e-4
        value = self.terms([flip - step, flip, flip + step]).surrogate[0].tolist()
        assert value[1] > value[0] and value[1] > value[2]
        # central difference: the error of a true zero slope is of order step²
        assert abs(value[2] - value[0]) / (2 * step) < 1e-7
        assert float(self.terms([flip]).gradient_multiplier) > 0.1

    def test_limits_of_the_weight(self):
        low, high = self.terms([-700.0, 700.0]).surrogate[0].tolist()
        assert_golden(low, self.facts["weight_limit_ratio_to_0"])
        assert_golden(high, self.facts["weight_limit_ratio_to_inf"])
