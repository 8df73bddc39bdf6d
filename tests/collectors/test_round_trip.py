"""What is recorded is what is read, to the last bit, in every table of the contract."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from collectors import Recorder, open_run
from mhpo_core import Sequences, TokenBatch, objectives
from mhpo_core.gradients import GradientNorms
from mhpo_core.histograms import EDGES
from mhpo_core.metrics import METRICS
from tests.collectors.support import column, rows, same, token_batch

# Copied from the contract, with the families of columns spelled out.
QUANTILES = "p0001 p001 p01 p05 p25 p50 p75 p95 p99 p999 p9999"
CONTRACT = {
    "steps": "step attempt wall_time n_tokens n_sequences loss lr reward_mean reward_std hazard_mean "
    "survival_weight_mean ess_fraction kl_old_new_k1 kl_old_new_k3 kl_rollout_old_k3 clip_fraction_low "
    "clip_fraction_high out_of_range_fraction entropy_mean grad_norm logit_grad_norm_top1_share zero_std_groups "
    "truncated_fraction nonfinite_count clamped_count dropped_tokens recorder_ms",
    "histograms": "step quantity side bin_low bin_high count weight advantage_weight",
    "tokens": "step sequence_id position token_id token logp_new logp_old logp_rollout logp_ref advantage entropy "
    "log_ratio hazard hazard_positive hazard_negative modulated_log_ratio survival_weight gradient_multiplier "
    "logit_grad_norm kept_because",
    "sequences": "step sequence_id group_id rank reward advantage length truncated policy_lag prompt completion extra",
    "gradients": "step rank parameter grad_norm weight_norm nonfinite",
    "metrics": "step name value",
    "events": "time kind detail",
}
FAMILIES = [
    f"{prefix}_{name}{suffix}"
    for prefix, suffix in (("log_ratio", ""), ("log_ratio", "_adv_pos"), ("log_ratio", "_adv_neg"), ("mismatch", ""))
    for name in f"mean min max {QUANTILES}".split()
]
BATCH_COLUMNS = ("logp_new", "logp_old", "logp_rollout", "logp_ref", "advantage", "entropy")


@pytest.fixture(scope="module", params=["all", "flight:1"])
def recorded(tmp_path_factory, request):
    """A run of few enough sequences that every policy keeps all their tokens."""
    path = tmp_path_factory.mktemp("runs") / "run"
    vocabulary = {i: f"t{i}" for i in range(40)}
    norms = GradientNorms(5.0, {"a.0.mlp": 3.0, "head": float("inf")}, {"a.0.mlp": 7.0}, {"head": 2})
    options = {"vocabulary": vocabulary, "config": {"seed": 7}, "tokens": request.param}
    with Recorder(path, objective="mhpo", fsync=False, **options) as recorder:
        recorder.event("note", "between")
        for step in (0, 1, 5):
            recorder.record(
                step, token_batch(step), loss=0.25 * step, gradient_norms=norms,
                metrics={"lr": 1e-6 * (step + 1), "extra/kl": float("nan")}, sequences=sequences_of(step),
            )  # fmt: skip
    with open_run(path) as run:
        yield run


def sequences_of(step: int) -> Sequences:
    return Sequences(
        reward=torch.tensor([1.0, 1.0, float(step), float("nan")]), sequence_id=[10 * step + i for i in range(4)],
        group_id=[0, 0, 1, 1], truncated=[False, True, False, False], policy_lag=torch.tensor([0, 1, 2, 3]),
        prompt=["p", "p", "q", "q"], completion=["one", "two", "three", ""],
    )  # fmt: skip


@pytest.mark.parametrize("table", CONTRACT)
def test_columns_of_the_contract_are_there(recorded, table):
    wanted = CONTRACT[table].split() + (FAMILIES if table == "steps" else [])
    present = recorded.sql(f"FROM {table}").columns
    assert not set(wanted) - set(present)
    assert (
        table not in ("tokens", "sequences", "histograms", "metrics", "events")
        or wanted == present
        or (set(wanted) == set(present))
    )


def test_tokens_are_the_trained_tokens_bit_for_bit(recorded):
    for step in (0, 1, 5):
        batch, mask = token_batch(step), token_batch(step).mask.numpy()
        found = recorded.sql(f"FROM tokens WHERE step = {step} ORDER BY sequence_id, position").fetchnumpy()
        row, position = np.nonzero(mask)
        assert found["position"].tolist() == position.tolist()
        assert found["sequence_id"].tolist() == (10 * step + row).tolist()
        assert found["token_id"].tolist() == batch.token_id.numpy()[mask].tolist()
        everything = recorded.manifest["store"]["tokens"] == "all"
        assert set(found["kept_because"]) == {"all" if everything else "sample"}
        for name in BATCH_COLUMNS:
            expected = getattr(batch, name).numpy()[mask]
            assert found[name].dtype == np.float32
            assert found[name].tobytes() == np.ascontiguousarray(expected).tobytes(), name
        texts = [None if i >= 40 else f"t{i}" for i in batch.token_id.numpy()[mask].tolist()]
        assert column(recorded, f"SELECT token FROM tokens WHERE step = {step} ORDER BY sequence_id, position") == texts


def test_mhpo_terms_in_tokens_are_those_of_the_objective(recorded):
    batch = token_batch(5)
    terms = objectives.create("mhpo").terms(batch)
    found = recorded.sql("FROM tokens WHERE step = 5 ORDER BY sequence_id, position").fetchnumpy()
    expected = {name: getattr(terms, name) for name in (
        "log_ratio", "hazard", "hazard_positive", "hazard_negative", "modulated_log_ratio", "survival_weight",
        "gradient_multiplier",
    )}  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.numpy()[batch.mask.numpy()], rtol=1e-6, atol=1e-7, err_msg=name)


def test_token_gradient_norm_equals_its_formula(recorded):
    batch = token_batch(1)
    p, total = np.exp(batch.logp_new.double().numpy()), batch.sum_p_squared.double().numpy()
    advantage = np.broadcast_to(batch.advantage.double().numpy(), p.shape)
    ratio = batch.logp_new.double().numpy() - batch.logp_old.double().numpy()
    psi = 1.5 * np.tanh(ratio / 1.5)
    zeta = np.logaddexp(0, psi) ** 1.5 + (np.logaddexp(0, -psi) / 0.8) ** 2
    weight = np.abs(advantage * np.exp(psi - zeta) / np.cosh(ratio / 1.5) ** 2)
    # atol: in float32 Σp² − p² of a token with p near 1 has an absolute error of 1e-7
    norm = weight * np.sqrt(1 - 2 * p + total)
    found = recorded.sql("FROM tokens WHERE step = 1 ORDER BY sequence_id, position").fetchnumpy()
    np.testing.assert_allclose(found["logit_grad_norm"], norm[batch.mask.numpy()], rtol=1e-5, atol=1e-6)


def test_sequences_are_what_the_trainer_said(recorded):
    for step in (0, 1, 5):
        batch = token_batch(step)
        mask, advantage = batch.mask.numpy(), batch.advantage.double().numpy()
        found = rows(recorded, "SELECT sequence_id, group_id, rank, reward, length, truncated, policy_lag, prompt, "
                     f"completion FROM sequences WHERE step = {step} ORDER BY sequence_id")  # fmt: skip
        text = zip(["p", "p", "q", "q"], ["one", "two", "three", ""], strict=True)
        expected = [
            (10 * step + i, [0, 0, 1, 1][i], 0, [1.0, 1.0, float(step), float("nan")][i], int(mask[i].sum()), i == 1, i,
             prompt, completion)
            for i, (prompt, completion) in enumerate(text)
        ]  # fmt: skip
        assert same(found, expected)
        mean = [float(advantage[i, mask[i]].mean()) if mask[i].any() else None for i in range(4)]
        assert column(recorded, f"SELECT advantage FROM sequences WHERE step = {step} ORDER BY sequence_id") == (
            pytest.approx(mean, rel=1e-12)
        )


def test_steps_gradients_metrics_and_events(recorded):
    steps = rows(recorded, "SELECT step, attempt, loss, lr, grad_norm, truncated_fraction, n_groups FROM steps")
    assert steps == [(s, 0, 0.25 * s, 1e-6 * (s + 1), 5.0, 0.25, 2) for s in (0, 1, 5)]
    assert same(rows(recorded, "SELECT reward_mean, zero_std_groups FROM steps WHERE step = 1"), [(float("nan"), 1)])
    gradients = rows(recorded, "FROM gradients WHERE step = 5")
    assert gradients == [(5, 0, "a.0.mlp", 3.0, 7.0, None), (5, 0, "head", float("inf"), None, 2)]
    expected = [(s, n, v) for s in (0, 1, 5) for n, v in (("extra/kl", float("nan")), ("lr", 1e-6 * (s + 1)))]
    assert same(rows(recorded, "FROM metrics ORDER BY step, name"), expected)
    assert column(recorded, "SELECT kind FROM events") == ["started", "note", "finished"]
    assert abs(column(recorded, "SELECT max(time) FROM events")[0] - time.time()) < 300


def test_step_scalars_equal_a_numpy_computation(recorded):
    batch = token_batch(5)
    mask = batch.mask.numpy()
    ratio = (batch.logp_new.numpy() - batch.logp_old.numpy())[mask].astype(np.float64)
    mismatch = (batch.logp_old.double() - batch.logp_rollout.double()).numpy()[mask]
    positive = np.broadcast_to(batch.advantage.numpy(), mask.shape)[mask] > 0
    expected = {
        "n_tokens": mask.sum(), "n_sequences": mask.any(axis=1).sum(),
        "entropy_mean": batch.entropy.numpy()[mask].mean(),
        "log_ratio_mean": ratio.mean(), "log_ratio_p05": np.quantile(ratio, 0.05), "log_ratio_max": ratio.max(),
        "log_ratio_p999_adv_pos": np.quantile(ratio[positive], 0.999), "log_ratio_min_adv_neg": ratio[~positive].min(),
        "mismatch_p50": np.quantile(mismatch, 0.5), "kl_old_new_k3": np.mean(np.exp(ratio) - 1 - ratio),
        "ess_fraction": np.exp(ratio).sum() ** 2 / np.exp(2 * ratio).sum() / len(ratio), "dropped_tokens": 0,
    }  # fmt: skip
    found = recorded.sql(f"SELECT {', '.join(expected)} FROM steps WHERE step = 5").fetchall()[0]
    assert found == pytest.approx([float(v) for v in expected.values()], rel=1e-6)


@pytest.mark.parametrize("quantity", ["log_ratio", "mismatch_log_ratio", "entropy"])
def test_histograms_equal_numpy_over_the_same_edges(recorded, quantity):
    batch = token_batch(0)
    mask = batch.mask.numpy()
    values = {
        "log_ratio": batch.logp_new - batch.logp_old,
        "mismatch_log_ratio": batch.logp_old.double() - batch.logp_rollout.double(),
        "entropy": batch.entropy,
    }[quantity].numpy()[mask]  # fmt: skip
    advantage = np.broadcast_to(batch.advantage.numpy(), mask.shape)[mask]
    multiplier = objectives.create("mhpo").terms(batch).gradient_multiplier.numpy()[mask]
    for side, chosen in (("positive", advantage > 0), ("negative", advantage < 0)):
        found = rows(recorded, "SELECT bin_low, bin_high, count, weight FROM histograms WHERE step = 0 AND "
                     f"quantity = '{quantity}' AND side = '{side}' ORDER BY bin_low")  # fmt: skip
        assert sum(count for _, _, count, _ in found) == chosen.sum() > 0
        for low, high, count, weight in found:
            inside = chosen & (values.astype(np.float32) >= low) & (values.astype(np.float32) < high)
            assert low in EDGES and high in EDGES and count == inside.sum()
            assert weight == pytest.approx(np.abs(advantage * multiplier)[inside].astype(float).sum(), rel=1e-5)


def test_tokens_of_the_ring_are_as_exact_as_those_that_stay(tmp_path):
    """All of the newest steps, wherever they lie; of older ones what is said to be kept."""
    run, n = tmp_path / "run", 64
    reasons = {"sample", "low tail", "high tail"}
    with Recorder(run, objective="mhpo", fsync=False, tokens="flight:2") as recorder:
        for step in range(4):
            recorder.record(step, token_batch(step, n), sequences=Sequences(sequence_id=range(n)))
    with open_run(run) as opened:
        for step in range(4):
            batch = token_batch(step, n)
            found = opened.sql(f"FROM tokens WHERE step = {step} ORDER BY sequence_id, position").fetchnumpy()
            assert opened.tokens_of(step).equals(
                opened.sql(f"FROM tokens WHERE step = {step} ORDER BY sequence_id, position").to_arrow_table()
            )
            place = (found["sequence_id"], found["position"])
            assert set(found["kept_because"]) == (reasons | {"ring"} if step >= 2 else reasons)
            assert batch.mask.numpy()[place].all()
            assert (len(place[0]) == int(batch.mask.sum())) == (step >= 2)
            assert len(np.unique(np.stack(place), axis=1).T) == len(place[0])
            for name in (*BATCH_COLUMNS, "token_id"):
                values = getattr(batch, name).numpy()[place].astype(found[name].dtype)
                assert found[name].tobytes() == values.tobytes(), name
        kept = "SELECT step, kept_tokens, kept_tokens + ring_tokens - n_tokens FROM raw_rollup ORDER BY step"
        counted = "SELECT step, count(*), 0 FROM tokens WHERE kept_because != 'ring' GROUP BY step ORDER BY step"
        assert rows(opened, kept) == rows(opened, counted)


def test_every_metric_is_a_column_and_the_manifest_says_what_the_run_is(recorded):
    assert set(METRICS) <= set(recorded.sql("FROM steps").columns)
    assert recorded.manifest["config"] == {"seed": 7} and recorded.manifest["run_id"] == "run"
    hyperparameters = {"c": 1.5, "k_pos": 1.5, "lambda_pos": 1.0, "k_neg": 2.0, "lambda_neg": 0.8}
    assert recorded.manifest["objective"] == {"name": "mhpo", "hyperparameters": hyperparameters}
    store = recorded.manifest["store"]
    assert store.pop("tokens") in ("all", "flight:1")
    assert store == {"columns": "full", "precision": "exact", "disk_limit": 4_000_000_000}


def test_the_example_of_the_contract(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objective = objectives.create("mhpo", c=1.5, k_pos=1.5, lambda_pos=1.0, k_neg=2.0, lambda_neg=0.8)
    old = torch.full((2, 3), -1.0)
    batch = TokenBatch(
        logp_new=old.clone().requires_grad_(), logp_old=old, advantage=torch.tensor([1.0, -1.0]),
        mask=torch.ones(2, 3), logp_rollout=None, logp_ref=None,
    )  # fmt: skip
    objective.loss(batch, aggregation="seq-mean-token-mean").backward()
    with Recorder("runs/my-run", objective=objective) as recorder:
        recorder.record(
            step=0, batch=batch, reward=torch.tensor([0.0, 1.0]), gradient_norms={"model.layers.0.mlp": 0.12},
            metrics={"lr": 1e-6},
        )  # fmt: skip
    run = open_run("runs/my-run")
    assert run.sql("SELECT step, n_tokens, reward_mean, lr, log_ratio_max FROM steps").fetchall() == [
        (0, 6, 0.5, 1e-6, 0.0)
    ]
    assert run.connection.sql("SELECT parameter, grad_norm FROM gradients").fetchall() == [("model.layers.0.mlp", 0.12)]
    run.close()


def test_a_script_that_changes_its_directory_keeps_its_run(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Recorder("run", objective="grpo", fsync=False) as recorder:
        monkeypatch.chdir(tmp_path / "elsewhere")
        recorder.record(0, token_batch(0))
    assert column(tmp_path / "run", "SELECT step FROM steps") == [0]
    assert not list((tmp_path / "elsewhere").iterdir())
