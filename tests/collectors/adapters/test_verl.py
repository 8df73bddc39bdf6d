"""The verl adapter on real verl: losses and training stay the same to the bit, and every step is recorded once."""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import subprocess
import sys
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from collectors import Recorder, open_run
from collectors.adapters import verl as adapter
from collectors.adapters import verl_gradients
from collectors.adapters import worker as workers
from collectors.adapters.verl_settings import objective_of
from collectors.adapters.worker import Worker, options_of, version_of
from mhpo_core.batch import TokenBatch
from mhpo_core.errors import ConfigError
from tests.collectors.support import column, rows

pytest.importorskip("verl", reason="verl is not installed; `make test-verl` installs it into an environment of its own")

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.config import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from tests.collectors.adapters.tiny_verl import actor_config, full_weights, rollouts, save_model, tu, worker

pytestmark = pytest.mark.filterwarnings("ignore")
LOSSES = [name for name in POLICY_LOSS_REGISTRY if not name.startswith("mhpo_")]
B, T = 4, 7


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MHPO_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("MHPO_OPTIONS", '{"tokens": "all", "fsync": false}')
    monkeypatch.setattr(adapter, "_HERE", Worker("verl"))
    yield tmp_path / "run"
    adapter.close()


@pytest.fixture(scope="module")
def job():
    """A job of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo")
        yield
        torch.distributed.destroy_process_group()


def config_of(name: str = "vanilla", **settings):
    policy_loss = PolicyLossConfig(loss_mode=name, dro_beta=0.1)
    made = actor_config(**{"policy_loss": policy_loss, "clip_ratio_low": 0.1, "clip_ratio_high": 0.15} | settings)
    made.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    return made


def call(name: str, seed: int, config=None, leaf: torch.Tensor | None = None, **changes):
    """Loss, gradient and metrics of a policy loss, and what it was given."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(B, T, generator=generator) - 0.01
    new = (old + 0.3 * torch.randn(B, T, generator=generator)).clamp(max=-1e-3)
    leaf = new.requires_grad_() if leaf is None else leaf
    mask = torch.rand(B, T, generator=generator) > 0.3
    mask[0, 0] = True
    given = {
        "old_log_prob": old, "log_prob": leaf, "advantages": torch.randn(B, 1, generator=generator).expand(B, T),
        "response_mask": mask, "loss_agg_mode": "token-mean", "config": config or config_of(name), "rollout_is_weights":
        None if name == "bypass_mode" else torch.rand(B, T, generator=generator) + 0.5,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    np.random.seed(seed)
    loss, metrics = get_policy_loss_fn(name)(**given)
    leaf.grad = None
    loss.backward()
    return loss.detach(), leaf.grad.clone(), metrics, given


def stepped(seed: int = 0) -> torch.optim.Optimizer:
    """An Adam that has just stepped."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.25)
    step(optimizer)
    return optimizer


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    optimizer.step()


def test_every_loss_of_verl_is_registered_again():
    assert len(LOSSES) >= 12 and {f"mhpo_{name}" for name in LOSSES} <= set(POLICY_LOSS_REGISTRY)
    before = dict(POLICY_LOSS_REGISTRY)
    assert adapter.register() == [f"mhpo_{name}" for name in LOSSES]
    assert before == POLICY_LOSS_REGISTRY, "a second time changes nothing"


@pytest.mark.parametrize("name", LOSSES)
def test_a_recording_loss_is_the_loss_to_the_bit(run, name):
    loss, gradient, metrics, given = call(name, seed=3)
    same_loss, same_gradient, more, _ = call(f"mhpo_{name}", seed=3, config=given["config"])
    assert torch.equal(loss, same_loss) and torch.equal(gradient, same_gradient) and loss != 0
    assert gradient.abs().sum() > 0
    n_tokens = int(given["response_mask"].sum())
    assert more == metrics | {"mhpo/recorded_tokens": n_tokens}
    stepped()
    assert adapter.active() == f"policy loss mhpo_{name}"
    adapter.close()
    mask = given["response_mask"].numpy()
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_tokens, lr FROM steps") == [(1, n_tokens, 0.25)]
        assert column(opened, "SELECT loss FROM steps") == [float(loss)]
        got = opened.sql("SELECT logp_new, logp_old, advantage FROM tokens ORDER BY sequence_id, position").fetchnumpy()
        for field, argument in (("logp_new", "log_prob"), ("logp_old", "old_log_prob"), ("advantage", "advantages")):
            assert np.array_equal(got[field], given[argument].detach().numpy()[mask])
        said = rows(opened, "SELECT kind, detail FROM events")[1]
        assert said == ("verl", f"policy loss mhpo_{name} of verl {version_of('verl')} records")


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_run_nothing_is_added(run, name, monkeypatch, caplog):
    monkeypatch.delenv("MHPO_RUN")
    _, _, metrics, given = call(name, seed=3)
    assert call(f"mhpo_{name}", seed=3, config=given["config"])[2] == metrics
    call(f"mhpo_{name}", seed=4)
    stepped()
    assert adapter.active() is None and not run.exists()
    assert sum("MHPO_RUN is not set" in record.message for record in caplog.records) == 1


def test_micro_batches_of_an_update_are_one_step(run):
    settings = config_of()
    parts = [call("mhpo_vanilla", seed, settings) for seed in (1, 2)]
    step(optimizer := stepped())  # the second finds nothing new
    parts.append(call("mhpo_vanilla", 5, settings))
    step(optimizer)
    adapter.close()
    counts = [int(given["response_mask"].sum()) for *_, given in parts]
    losses = [float(loss) for loss, *_ in parts]
    with open_run(run) as opened:
        found = rows(opened, "SELECT step, n_sequences, n_tokens, loss FROM steps")
        assert [row[:3] for row in found] == [(1, 2 * B, counts[0] + counts[1]), (2, B, counts[2])]
        assert found[0][3] == pytest.approx(losses[0] + losses[1], rel=1e-6) and found[1][3] == losses[2]
        clipped = [float(metrics["actor/pg_clipfrac"]) for _, _, metrics, _ in parts[:2]]
        stored = column(opened, "SELECT value FROM metrics WHERE step = 1 AND name = 'actor/pg_clipfrac'")
        assert stored == [pytest.approx(sum(clipped) / 2)]


def test_weights_are_recorded_beside_the_advantages(run):
    given = call("mhpo_vanilla", seed=1)[3]
    stepped()
    adapter.close()
    weights, mask = given["rollout_is_weights"], given["response_mask"]
    with open_run(run) as opened:
        stored = dict(rows(opened, "SELECT name, value FROM metrics WHERE name LIKE 'mhpo/%'"))
        assert stored["mhpo/rollout_is_weight_mean"] == pytest.approx(float(weights[mask].mean()))
        assert stored["mhpo/rollout_is_weight_max"] == float(weights[mask].max())
        assert stored["mhpo/rollout_is_weight_min"] == float(weights[mask].min())
        first = json.loads(column(opened, "SELECT extra FROM sequences ORDER BY sequence_id")[0])
        assert first["rollout_is_weight"] == pytest.approx(float(weights[0][mask[0]].mean()))


def test_a_loss_that_gets_further_terms_is_not_known_to_a_policy_loss(run):
    call("mhpo_vanilla", 1, config_of(entropy_coeff=0.01))
    step(optimizer := stepped())
    call("mhpo_vanilla", 2, config_of(use_kl_loss=True))
    step(optimizer)
    adapter.close()
    with open_run(run) as opened:
        assert column(opened, "SELECT loss FROM steps") == [None, None]
        assert len(column(opened, "SELECT value FROM metrics WHERE name = 'actor/pg_loss'")) == 2


def test_the_policy_loss_is_recorded_without_the_terms_that_verl_adds_to_it(run, job, model):
    _, logged = trained(model, config_of("mhpo_vanilla", entropy_coeff=0.1))
    adapter.close()
    with open_run(run) as opened:
        stored = column(opened, "SELECT value FROM metrics WHERE name = 'actor/pg_loss' ORDER BY step")
        assert stored == pytest.approx([v for record in logged for v in record["actor/pg_loss"]], rel=1e-6)
        assert set(column(opened, "SELECT loss FROM steps")) == {None}


@pytest.mark.parametrize(
    ("expected", "n_ranks"),
    [((9, 9, 8), 1), ((9, 9, 9), 1), ((20, 20, 18), 2)],
    ids=["other", "complete", "other on two ranks"],
)
def test_an_update_that_verl_leaves_out_is_a_step_of_its_own(run, expected, n_ranks):
    """verl zeroes the gradient and calls no optimizer when the norm is not finite: here in the second of three."""
    sizes = [n // n_ranks for n in expected]
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    for update, n_tokens in enumerate(sizes):
        settings = config_of()
        settings.global_batch_info.update(batch_num_tokens=expected[update], dp_size=n_ranks)
        mask = torch.zeros(B, T, dtype=torch.bool)
        mask.view(-1)[:n_tokens] = True
        call("mhpo_vanilla", update, settings, response_mask=mask)
        if update != 1:
            step(optimizer)
    adapter.close()
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_tokens FROM steps") == list(zip((1, 2, 3), sizes, strict=True))
        assert rows(opened, "SELECT detail FROM events WHERE kind = 'update_skipped'") == [
            ("no optimizer stepped after the loss of step 2",)
        ]


def test_micro_batches_of_one_mini_batch_are_never_torn_apart(run):
    settings = config_of()
    settings.global_batch_info["batch_num_tokens"] = 8
    for chosen in (slice(0, 8), slice(0, 0), slice(0, 0)):
        mask = torch.zeros(B, T, dtype=torch.bool)
        mask.view(-1)[chosen] = True
        call("mhpo_vanilla", 1, settings, response_mask=mask, loss_agg_mode="token-sum")
    stepped()
    adapter.close()
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_tokens, n_sequences FROM steps") == [(1, 8, 2)]


def test_a_step_without_a_trained_token_still_counts(run):
    call("mhpo_vanilla", 1, response_mask=torch.zeros(B, T, dtype=torch.bool))
    stepped()
    adapter.close()
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_tokens FROM steps") in ([(1, None)], [(1, 0)])


def test_steps_go_on_where_the_checkpoint_of_the_optimizer_was(run):
    saved = stepped()
    step(saved)
    step(saved)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    optimizer.load_state_dict(saved.state_dict())
    call("mhpo_vanilla", 1)
    step(optimizer)
    adapter.close()
    assert rows(run, "SELECT step FROM steps") == [(4,)]


def test_passes_that_do_not_train_are_not_recorded(run):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        logp = -torch.rand(B, T, generator=generator)
        found = get_policy_loss_fn("mhpo_vanilla")(
            old_log_prob=logp, log_prob=logp, advantages=logp, response_mask=logp < 0, loss_agg_mode="token-mean",
            config=config_of(), rollout_is_weights=None,
        )  # fmt: skip
    assert found[1]["mhpo/recorded_tokens"] == 0 and not run.exists()


def test_ranks_that_repeat_another_record_nothing(run, monkeypatch):
    monkeypatch.setattr(adapter, "repeats_another_rank", lambda: True)
    assert call("mhpo_vanilla", 1)[2]["mhpo/recorded_tokens"] == 0
    assert not run.exists()


def fails_to_record(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise OSError("no space for this")

    monkeypatch.setattr(Recorder, "record", broken)


def fails_to_open(monkeypatch, tmp_path):
    (tmp_path / "run").write_text("a file")


def has_wrong_options(monkeypatch, tmp_path):
    monkeypatch.setenv("MHPO_OPTIONS", "tokens=all")


@pytest.mark.parametrize("trouble", [fails_to_record, fails_to_open, has_wrong_options])
def test_trouble_with_the_recording_never_reaches_the_training(trouble, monkeypatch, tmp_path, caplog):
    trouble(monkeypatch, tmp_path)
    optimizer = stepped()
    for seed in range(3):
        loss, gradient, metrics, given = call("vanilla", seed)
        same = call("mhpo_vanilla", seed, given["config"])
        assert torch.equal(loss, same[0]) and torch.equal(gradient, same[1])
        expected = int(given["response_mask"].sum()) if trouble is fails_to_record else 0
        assert same[2] == metrics | {"mhpo/recorded_tokens": expected}, "ranks must agree on the names of metrics"
        step(optimizer)
    assert sum("training goes on" in record.message for record in caplog.records) == 1, "said once"


def test_a_run_that_cannot_be_opened_is_not_tried_again_and_again(monkeypatch):
    tried = []

    def broken(*args, **kwargs):
        tried.append(args)
        raise OSError("no such bucket")

    monkeypatch.setattr(workers, "Recorder", broken)
    for seed in range(3):
        call("mhpo_vanilla", seed)
    assert len(tried) == 1


def test_the_rank_is_the_one_of_torch_distributed(run, job, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    call("mhpo_vanilla", 1)
    stepped()
    adapter.close()
    assert rows(run, "SELECT DISTINCT rank FROM sequences") == [(0,)]


def test_options_must_be_an_object():
    assert options_of("") == {} and options_of('{"tokens": "sample:2"}') == {"tokens": "sample:2"}
    for text in ("tokens=all", "[1]", "3"):
        with pytest.raises(ConfigError, match="allowed is a JSON object"):
            options_of(text)


LIKE = ["vanilla", "dppo_tv", "dppo_kl", "gspo", "geo_mean", "cispo", "sapo", "gpg", "bypass_mode"]


@pytest.mark.parametrize("name", LIKE)
def test_the_objective_has_the_gradient_of_the_loss(name):
    """d loss / d logp = −M·A / N under token-mean, / (B·|y|) where verl averages sequences."""
    _, gradient, _, given = call(name, 11, rollout_is_weights=None)
    mask = given["response_mask"]
    batch = TokenBatch(given["log_prob"].detach(), given["old_log_prob"], given["advantages"], mask)
    multiplier = objective_of(f"mhpo_{name}", given["config"]).terms(batch).gradient_multiplier
    by_sequence = B * mask.sum(dim=1, keepdim=True)
    share = by_sequence if name in ("geo_mean", "sapo") else mask.sum()
    expected = torch.where(mask, -multiplier * given["advantages"] / share, 0.0)
    assert torch.allclose(gradient, expected, rtol=2e-5, atol=1e-8)
    assert ((multiplier - 1).abs() > 0.05).any() or name == "gpg"


def test_the_objective_is_the_one_of_the_configuration():
    def of(name, **settings):
        found = objective_of(name, config_of(name, **settings))
        return found.name, found.hyperparameters()

    band = {"eps_low": 0.1, "eps_high": 0.15}
    assert of("vanilla") == ("dual_clip", band | {"dual_c": 3.0})
    assert of("vanilla", clip_ratio_low=None, clip_ratio=0.3)[1]["eps_low"] == 0.3
    assert of("dppo_tv") == ("dppo_tv", {"delta_low": 0.1, "delta_high": 0.15, "ratio_cap": 3.0})
    assert of("cispo") == ("cispo", {"ratio_min": 0.9, "ratio_max": 1.15})
    assert of("clip_cov") == ("ppo_clip", band) and of("somebody's") == ("ppo_clip", band)
    assert of("kl_cov")[0] == "is_pg" and of("dro")[0] == of("gpg")[0] == "reinforce"
    correction = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 4.0}
    bypassed = {"policy_loss": {"rollout_correction": correction}}
    found = objective_of("bypass_mode", bypassed)
    assert (found.name, found.hyperparameters()) == ("tis", {"ratio_min": None, "ratio_max": 4.0})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def trained(model: Path, config, loss=ppo_loss):
    made = worker(model, config, loss)
    logged = [tu.get(made.train_mini_batch(rollouts(seed)), "metrics") for seed in (0, 1)]
    return full_weights(made), logged


def without_measurements(logged: list[dict]) -> list[dict]:
    left_out = ("perf/", "mfu", "mhpo/")
    return [{k: v for k, v in record.items() if not k.startswith(left_out)} for record in logged]


RECIPES = {
    "a policy loss": ("mhpo_vanilla", ppo_loss), "the whole loss": ("vanilla", adapter.recording_ppo_loss),
    "both": ("mhpo_vanilla", adapter.recording_ppo_loss),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_real_worker_trains_the_same_and_its_loss_is_recorded(run, job, model, recipe):
    loss_mode, loss = RECIPES[recipe]
    plain_weights, plain_log = trained(model, config_of("vanilla"))
    weights, logged = trained(model, config_of(loss_mode), loss)
    adapter.close()
    assert all(torch.equal(a, b) for a, b in zip(plain_weights, weights, strict=True)) and len(weights) > 10
    assert without_measurements(plain_log) == without_measurements(logged)
    with open_run(run) as opened:
        assert column(opened, "SELECT step FROM steps") == list(range(1, 9))
        assert column(opened, "SELECT loss FROM steps") == [v for record in logged for v in record["loss"]]
        stored = column(opened, "SELECT value FROM metrics WHERE name = 'actor/pg_clipfrac' ORDER BY step")
        assert stored == pytest.approx([v for record in logged for v in record["actor/pg_clipfrac"]])
        trained_tokens = sum(2 * int(rollouts(seed)["response_mask"].values().sum()) for seed in (0, 1))
        assert column(opened, "SELECT count(*) FROM tokens") == [trained_tokens]
        assert column(opened, "SELECT sum(n_tokens) FROM steps") == [trained_tokens]


def test_gradients_are_measured_before_they_are_clipped(run, job, model):
    """Of a worker whose updates are all clipped, at 0.5."""
    _, logged = trained(model, config_of("mhpo_vanilla"))
    adapter.close()
    with open_run(run) as opened:
        logged_norms = [v for record in logged for v in record["grad_norm"]]
        assert column(opened, "SELECT grad_norm FROM steps ORDER BY step") == pytest.approx(logged_norms, rel=1e-5)
        assert min(logged_norms) > 0.5
        whole = "sqrt(sum(grad_norm * grad_norm)), count(*), min(grad_norm), min(weight_norm)"
        found = rows(opened, f"SELECT {whole} FROM gradients GROUP BY step ORDER BY step")
        assert [row[0] for row in found] == pytest.approx(logged_norms, rel=1e-5)
        assert {row[1] for row in found} == {11} and min(min(row[2:]) for row in found) > 0
        named = column(opened, "SELECT DISTINCT parameter FROM gradients")
        assert "model.layers.1.mlp" in named and "lm_head" in named


def test_gradients_that_cannot_be_measured_train_all_the_same(run, job, model, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ArithmeticError("no norm")

    plain_weights, _ = trained(model, config_of("vanilla"))
    monkeypatch.setattr(verl_gradients, "gradient_norms", broken)
    weights, _ = trained(model, config_of("mhpo_vanilla"))
    adapter.close()
    assert all(torch.equal(a, b) for a, b in zip(plain_weights, weights, strict=True))
    assert rows(run, "SELECT count(*), count(grad_norm) FROM steps") == [(8, 0)]
    assert sum("no norm" in record.message for record in caplog.records) == 1


def test_the_whole_loss_knows_ids_entropy_engine_rewards_and_groups(run, job, model):
    _, logged = trained(model, config_of(entropy_coeff=0.1), adapter.recording_ppo_loss)
    adapter.close()
    with open_run(run) as opened:
        assert column(opened, "SELECT loss FROM steps") == [v for record in logged for v in record["loss"]]
        assert column(opened, "SELECT count(*) FROM tokens WHERE entropy IS NULL OR token_id IS NULL") == [0]
        mismatch = opened.sql("SELECT logp_old - logp_rollout AS d FROM tokens").fetchnumpy()["d"]
        assert np.allclose(mismatch, -0.01, atol=1e-6)
        counted = "count(*), count(DISTINCT sequence_id), count(DISTINCT group_id)"
        assert rows(opened, f"SELECT {counted} FROM sequences") == [(32, 16, 8)], "an epoch trains a completion again"
        data = rollouts(0)
        ids = {tuple(row.tolist()): float(i) for i, row in enumerate(data["responses"].unbind())}
        found = rows(
            opened,
            "SELECT list(token_id ORDER BY position), any_value(reward) FROM tokens JOIN sequences USING (step, "
            "sequence_id) WHERE step <= 2 GROUP BY step, sequence_id",
        )
        assert {tuple(tokens): reward for tokens, reward in found} == ids and len(ids) == 8
        settings = json.loads((run / "run.json").read_text())["config"]["verl"]
        assert settings["entropy_coeff"] == 0.1 and settings["policy_loss"]["loss_mode"] == "vanilla"


def test_a_gradient_that_is_not_finite_is_a_step_and_the_next_one_another(run, job, model):
    made = worker(model, config_of(), adapter.recording_ppo_loss)
    broken = rollouts(0)
    broken["advantages"].values()[0] = math.inf
    made.train_mini_batch(broken)
    made.train_mini_batch(rollouts(1))
    adapter.close()
    with open_run(run) as opened:
        assert column(opened, "SELECT step FROM steps") == list(range(1, 9))
        assert column(opened, "SELECT count(*) FROM events WHERE kind = 'update_skipped'") == [2]
        assert column(opened, "SELECT count(*) FROM steps WHERE NOT isfinite(loss)") == [2]
        assert column(opened, "SELECT count(*) FROM steps WHERE NOT isfinite(grad_norm)") == [2]


def test_several_outputs_of_one_session_get_numbers_of_their_own(run, job, model):
    made = worker(model, config_of(), adapter.recording_ppo_loss)
    data = rollouts(0)
    data["session_id"] = torch.zeros(len(data), dtype=torch.int64)
    made.train_mini_batch(data)
    adapter.close()
    counted = "count(*), count(DISTINCT (step, sequence_id)), count(DISTINCT group_id)"
    assert rows(run, f"SELECT {counted} FROM sequences") == [(16, 16, 4)]


def test_the_loss_travels_to_a_worker_by_name():
    found = pickle.loads(pickle.dumps(partial(adapter.recording_ppo_loss, config={"clip_ratio": 0.2})))
    assert found.func is adapter.recording_ppo_loss


def test_two_ranks_write_every_token_once(run, model, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone",
        "-m", "tests.collectors.adapters.tiny_verl", str(model), str(tmp_path / "logged"),
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "logged").read_text())
    logged, norms = ([value for both in told for value in both[place]] for place in (0, 1))
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_sequences FROM steps") == [(n, 4) for n in range(1, 9)]
        per_rank = rows(
            opened, "SELECT rank, count(*), count(DISTINCT sequence_id) FROM sequences GROUP BY 1 ORDER BY 1"
        )
        assert per_rank == [(0, 16, 8), (1, 16, 8)]
        tokens, distinct = rows(opened, "SELECT count(*), count(DISTINCT (step, sequence_id, position)) FROM tokens")[0]
        expected = sum(2 * int(rollouts(seed)["response_mask"].values().sum()) for seed in (0, 1))
        assert tokens == distinct == expected
        # each rank's own, of which verl logs the mean; all tokens together are the mini-batch
        assert column(opened, "SELECT loss FROM steps ORDER BY step") == pytest.approx(logged, rel=1e-6)
        assert column(opened, "SELECT grad_norm FROM steps ORDER BY step") == pytest.approx(norms, rel=1e-5)
        counted = "count(DISTINCT rank), count(DISTINCT grad_norm), count(DISTINCT weight_norm)"
        per_layer = rows(opened, f"SELECT {counted} FROM gradients GROUP BY step, parameter")
        assert len(per_layer) == 8 * 11 and set(per_layer) == {(2, 1, 1)}, "the same on both ranks"


def said(code: list[str], **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MHPO_", "VERL_"))}
    return subprocess.run([sys.executable, *code], env=inherited | environment, capture_output=True, text=True)


def test_the_command_says_what_would_happen(tmp_path):
    done = said(["-m", "collectors.adapters.verl"], MHPO_RUN=str(tmp_path / "x"))
    assert done.returncode == 0 and "12 policy losses recorded as mhpo_vanilla, mhpo_dppo_tv" in done.stdout
    assert f"MHPO_RUN is {tmp_path / 'x'}" in done.stdout and not (tmp_path / "x").exists()
    hint = "neither VERL_USE_EXTERNAL_MODULES nor a plugin names collectors.adapters.verl"
    assert hint in done.stdout or any(p.value == adapter.__name__ for p in entry_points(group="verl.plugins"))


def test_a_worker_that_is_told_to_import_this_module_has_the_losses():
    code = "from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; print(f('mhpo_gspo').__wrapped__.__name__)"
    done = said(["-c", code], VERL_USE_EXTERNAL_MODULES="collectors.adapters.verl")
    assert done.stdout.strip() == "compute_policy_loss_gspo", done.stderr[-2000:]
