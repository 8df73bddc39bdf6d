"""Every golden vector that this code has an implementation for; tolerances are those of the vectors' README."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mhpo_core import TokenBatch, group_advantages, objectives
from mhpo_core.advantages import leave_one_out_advantages
from mhpo_core.objectives import AGGREGATIONS, OBJECTIVES, aggregate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "objectives.json").read_text())

TOKEN_LEVEL = list(GOLDEN["objectives"])
# the same objective under another aggregation or other bounds
SEQUENCE_NAMES = {"gspo_token_mean": "gspo", "gspo_wide": "gspo"}
SEQUENCE = [(SEQUENCE_NAMES.get(r["objective"], r["objective"]), r) for r in GOLDEN["sequence"]]
EXTREME = sorted({r["objective"] for r in GOLDEN["extreme_token"]})
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


def parsed(value):
    """A golden hyperparameter: decimal strings are numbers, lists tuples, flags and None stay."""
    if isinstance(value, list):
        return tuple(float(v) for v in value)
    return float(value) if isinstance(value, str) else value


def parameters(row) -> dict[str, object]:
    return {k: parsed(v) for k, v in row["params"].items() if k != "agg"}


def batch_of(rows, dtype) -> TokenBatch:
    """Every row a sequence of one token."""

    def line(name):
        return torch.tensor(column(rows, name)[:, None], dtype=dtype)

    logp_new = line("logp_new").requires_grad_()
    return TokenBatch(logp_new, line("logp_old"), line("advantage"), torch.ones(len(rows), 1, dtype=torch.bool))


def golden_batch(name, garbage=None, dtype=torch.float64) -> TokenBatch:
    """A batch of several sequences, its masked positions overwritten with garbage."""
    golden = GOLDEN["batches"][name]
    mask = torch.tensor(golden["mask"], dtype=torch.bool)
    logp = {name: torch.tensor(numbers(golden[name]), dtype=dtype) for name in ("logp_new", "logp_old")}
    if garbage is not None:
        logp = {name: values.masked_fill(~mask, garbage) for name, values in logp.items()}
    logp["logp_new"].requires_grad_()
    return TokenBatch(**logp, advantage=torch.tensor(numbers(golden["advantages"]), dtype=dtype), mask=mask)


def gradient(objective, batch) -> np.ndarray:
    objective.loss(batch, aggregation="token-sum").backward()
    return -batch.logp_new.grad[:, 0].double().numpy()


def test_every_golden_objective_is_there():
    assert set(TOKEN_LEVEL) | {name for name, _ in SEQUENCE} | {"mhpo_sa", "decoupled"} == set(OBJECTIVES)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_defaults_are_the_golden_ones(name):
    golden = GOLDEN["objectives"][name]
    assert objectives.create(name).hyperparameters() == parameters(golden)
    assert OBJECTIVES[name].canonical_aggregation == golden["canonical_aggregation"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_tokens(name, dtype):
    rows = [r for r in GOLDEN["token"] if r["objective"] == name]
    assert len(rows) >= 85
    objective, batch = objectives.create(name), batch_of(rows, dtype)
    terms = objective.terms(batch)
    assert_golden(terms.surrogate[:, 0], column(rows, "surrogate"), dtype)
    assert_golden(gradient(objective, batch), column(rows, "grad_logp"), dtype)
    defined = column(rows, "advantage") != 0
    multiplier, expected = (
        terms.gradient_multiplier[:, 0].double().numpy()[defined],
        column(rows, "multiplier")[defined],
    )
    if dtype == torch.float64:
        # relative, far into the tails: the multiplier is computed in the log domain
        np.testing.assert_allclose(multiplier, expected, rtol=1e-12, atol=0)
    assert_golden(multiplier, expected, dtype)


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_ratios_in_float64(name):
    rows = [r for r in GOLDEN["extreme_token"] if r["objective"] == name]
    assert len(rows) == 33
    objective, batch = objectives.create(name), batch_of(rows, torch.float64)
    terms = objective.terms(batch)
    assert_golden(terms.surrogate[:, 0], column(rows, "surrogate"))
    assert_golden(gradient(objective, batch), column(rows, "grad_logp"))
    assert not terms.clamped.any()


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_ratios_in_float32_are_right_where_they_fit_and_finite_where_they_do_not(name):
    rows = [r for r in GOLDEN["extreme_token"] if r["objective"] == name]
    objective, batch = objectives.create(name), batch_of(rows, torch.float32)
    terms, slope = objective.terms(batch), gradient(objective, batch)
    fits = np.array([r["fp32_finite"] for r in rows])
    surrogate = terms.surrogate[:, 0].double().numpy()
    assert_golden(surrogate[fits], column(rows, "surrogate")[fits], torch.float32)
    assert_golden(slope[fits], column(rows, "grad_logp")[fits], torch.float32)
    assert np.isfinite(surrogate).all() and np.isfinite(slope).all()
    overflows = column(rows, "log_ratio") > math.log(np.finfo(np.float32).max)
    assert terms.clamped[:, 0].tolist() == overflows.tolist()


GARBAGE = pytest.mark.parametrize("garbage", [None, math.nan, math.inf, -math.inf], ids=str)


@GARBAGE
@pytest.mark.parametrize("row", GOLDEN["recipes"], ids=lambda r: f"{r['batch']}-{r['recipe']}")
def test_recipes(row, garbage):
    batch = golden_batch(row["batch"], garbage)
    recipe = objectives.recipe(row["recipe"], **parameters(row))
    loss = recipe.loss(batch, row.get("loss_scale") and float(row["loss_scale"]))
    assert (recipe.objective.name, recipe.aggregation) == (row["objective"], row["aggregation"])
    loss.backward()
    assert_golden(loss.item(), float(row["loss"]))
    assert_golden(batch.logp_new.grad, numbers(row["grad_loss_logp"]))


@GARBAGE
@pytest.mark.parametrize(("name", "row"), SEQUENCE, ids=lambda v: v if isinstance(v, str) else v["batch"])
def test_sequences(name, row, garbage):
    objective, batch = objectives.create(name, **parameters(row)), golden_batch(row["batch"], garbage)
    aggregation = row["params"].get("agg")
    if row["objective"] in OBJECTIVES and aggregation is not None:
        assert objective.canonical_aggregation == aggregation
    loss = objective.loss(batch, aggregation)
    loss.backward()
    assert_golden(loss.item(), float(row["loss"]))
    assert_golden(batch.logp_new.grad, numbers(row["grad_loss_logp"]))


@pytest.mark.parametrize(("name", "row"), SEQUENCE, ids=lambda v: v if isinstance(v, str) else v["batch"])
def test_sequences_in_float32(name, row):
    # the inputs are rounded to float32 first: a log W of 100 then carries an error of 6e-6
    objective, batch = objectives.create(name, **parameters(row)), golden_batch(row["batch"], dtype=torch.float32)
    loss = objective.loss(batch, row["params"].get("agg"))
    loss.backward()
    expected = numbers(row["grad_loss_logp"])
    assert_golden(batch.logp_new.grad, expected, torch.float32)
    assert abs(loss.item() - float(row["loss"])) <= 3e-5 * max(1.0, abs(float(row["loss"])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_decoupled(dtype):
    for row in GOLDEN["decoupled"]:
        bounds = {k: float(row[k]) for k in ("clip_max", "clip_min", "eps_low", "eps_high") if row[k] is not None}
        objective = objectives.create("decoupled", mode=row["mode"], **bounds)
        log_ratio, log_mismatch = float(row["log_ratio"]), float(row["log_mismatch"])
        new = torch.tensor([[-40.0 + log_ratio]], dtype=dtype, requires_grad=True)
        old = torch.tensor([[-40.0]], dtype=dtype)
        # relative to 0 instead of −40, so that float32 keeps the ratio's digits
        batch = TokenBatch(new + 40, old + 40, torch.tensor([float(row["advantage"])], dtype=dtype), old < 0)
        batch = replace(batch, logp_rollout=torch.tensor([[-log_mismatch]], dtype=dtype))
        leaf = batch.logp_new.detach().requires_grad_()
        loss = objective.loss(replace(batch, logp_new=leaf))
        loss.backward()
        tolerance = torch.float32 if dtype == torch.float32 else torch.float64
        assert_golden(-loss.item(), float(row["surrogate"]), tolerance)
        assert_golden(-leaf.grad, [[float(row["grad_logp"])]], tolerance)


@pytest.mark.parametrize("row", SINGLE_PASS, ids=lambda r: f"{r['case']}-{r['mode']}")
def test_aggregation(row):
    mask = torch.tensor(row["mask"], dtype=torch.bool)
    values = torch.tensor(numbers(row["values"])).masked_fill(~mask, math.nan).requires_grad_()
    result = aggregate(values, mask, row["mode"], row["loss_scale"])
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
        ("trl_batch(std_all+1e-4)", {"std_over": "batch"}),
        ("rloo", None),
    ],
)
def test_group_advantages(mode, settings):
    row = next(r for r in GOLDEN["advantage"] if r["mode"] == mode)
    reward = torch.tensor(numbers(row["groups"]))
    if settings is None:
        found = leave_one_out_advantages(reward.flatten(), reward.shape[1])
    else:
        found = group_advantages(reward.flatten(), reward.shape[1], ddof=row["std_ddof"], **settings)
    assert_golden(found.view_as(reward), numbers(row["advantages"]))
