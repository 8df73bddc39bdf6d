"""The TRL adapter on real trainers: nothing of the training changes, and TRL's loss follows from what is recorded."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from collectors import open_run
from mhpo_core.errors import ConfigError
from mhpo_core.gradients import parameter_group
from tests.collectors.support import column, rows

pytest.importorskip("trl", reason="trl is not installed; `make test` installs it (pip install -e '.[test]')")

import trl
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from collectors.adapters import trl_steps
from collectors.adapters.trl import RecordsTelemetry, attach, objective_of
from tests.collectors.adapters.tiny_trl import BATCH, GROUP, LONGEST, build, reward

VERSION = tuple(int(part) for part in trl.__version__.split(".")[:2])
pytestmark = pytest.mark.filterwarnings("ignore")
# transformers 4 logs a loss with four digits
LOGGED = 1e-7 if int(transformers.__version__.split(".")[0]) >= 5 else 5.001e-5

SETTINGS = {
    "bnpo": {"loss_type": "bnpo", "epsilon": 0.1, "epsilon_high": 0.15, "gradient_accumulation_steps": 1},
    "dapo": {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.15},
    "grpo": {"loss_type": "grpo", "epsilon": 0.1},
    "grpo with a reference": {"loss_type": "grpo", "epsilon": 0.1, "beta": 0.05},
    "grpo, a generation for two steps": {"loss_type": "grpo", "epsilon": 0.1, "steps_per_generation": 4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
}
_LOSSES = inspect.getsource(inspect.getmodule(GRPOTrainer))
SETTINGS = {name: given for name, given in SETTINGS.items() if f'"{given["loss_type"]}"' in _LOSSES}
_QUICK = ("dapo", "grpo", "grpo, a generation for two steps")
KINDS = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in SETTINGS]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("CI", "1")  # without it a trainer reports its use over the network


def recorded(folder: Path, cls: type = GRPOTrainer, **settings):
    trainer = build(folder / "out", cls, **{"num_iterations": 2} | settings)
    attach(trainer, folder / "run", tokens="all", fsync=False)
    trainer.train()
    return trainer


def logged(trainer) -> list[dict]:
    return [record for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_for_bit_the_same(tmp_path, kind):
    settings = SETTINGS[kind]
    plain = build(tmp_path / "plain", num_iterations=2, **settings)
    plain.train()
    trainer = recorded(tmp_path, **settings)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))
    timeless = [
        [{k: v for k, v in record.items() if k != "step_time"} for record in logged(t)] for t in (plain, trainer)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_follows_from_what_is_recorded(tmp_path, kind):
    trainer = recorded(tmp_path, **SETTINGS[kind])
    args = trainer.args
    high = args.epsilon_high if args.epsilon_high is not None else args.epsilon
    moved = 0.0
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT step FROM steps") == [1, 2, 3, 4, 5, 6]
        for record in logged(trainer):
            tokens = run.sql(f"FROM tokens WHERE step = {record['step']}").fetchnumpy()
            new, old, advantage = (tokens[n].astype(np.float64) for n in ("logp_new", "logp_old", "advantage"))
            ratio = np.exp(new - old)
            moved = max(moved, float(np.abs(ratio - 1).max()))
            if kind == "cispo":
                loss = -np.minimum(ratio, high) * advantage * new
            else:
                clipped = np.clip(ratio, 1 - args.epsilon, 1 + high)
                loss = -np.minimum(ratio * advantage, clipped * advantage)
            if args.beta:
                shift = tokens["logp_ref"].astype(np.float64) - new
                # newer versions correct the estimate by the ratio
                weight = ratio if getattr(args, "use_bias_correction_kl", False) else 1.0
                loss = loss + args.beta * (np.expm1(shift) - shift) * weight
            if args.loss_type == "grpo":
                ids = tokens["sequence_id"]
                expected = np.mean([loss[ids == one].mean() for one in np.unique(ids)])
            else:
                expected = loss.mean()
            stored = column(run, f"SELECT loss FROM steps WHERE step = {record['step']}")[0]
            assert stored == pytest.approx(record["loss"], abs=LOGGED), "summed as transformers sums it"
            assert stored == pytest.approx(expected, abs=1e-6)
        mean = column(run, "SELECT avg(loss) FROM steps")[0]
        assert mean == pytest.approx(trainer.state.log_history[-1]["train_loss"], abs=1e-7), "no digit is cut there"
    assert moved > 0.05, "otherwise this shows nothing"


def test_completions_keep_ids_groups_texts_and_rewards(tmp_path):
    seen: dict[str, list[float]] = {}

    class Spied(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids):
            found = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
            for prompt, completion, value in zip(prompts, completions, found[:, 0].tolist(), strict=True):
                seen.setdefault(prompt + completion, []).append(value)
            return found

    # before 0.24 TRL counts a completion as cut where the model has said <pad> last, so it does not say it
    settings = {} if VERSION >= (0, 24) else {"generation_kwargs": {"suppress_tokens": [0]}}
    trainer = recorded(tmp_path, Spied, **settings)
    assert isinstance(trainer, RecordsTelemetry) and type(trainer).__name__ == "Spied"
    with open_run(tmp_path / "run") as run:
        columns = "step, sequence_id, group_id, prompt, completion, reward, advantage, policy_lag, length, truncated"
        found = rows(run, f"SELECT {columns} FROM sequences ORDER BY ALL")
        assert len(found) == 6 * 2 * BATCH
        ids = {}
        for step, sequence, group, *rest in found:
            ids.setdefault(step, []).append(sequence)
            assert group == sequence // GROUP
            prompt, completion, value, _, lag, length, truncated = rest
            key = prompt.replace(" ", "") + completion.replace("<eos>", "").replace("<pad>", "").replace(" ", "")
            assert any(key == k.replace(" ", "") and value in v for k, v in seen.items()), key
            assert lag == (step - 1) % 2 and truncated == (
                length == LONGEST and not completion.endswith(("<eos>", "<pad>"))
            )
        assert ids[1] == ids[2] == list(range(16)) and ids[3] == ids[4] == list(range(16, 32)), "each trains twice"
        assert column(run, "SELECT count(DISTINCT prompt) FROM sequences GROUP BY group_id") == [1] * 12
        means = rows(run, "SELECT step, reward_mean, truncated_fraction FROM steps WHERE step % 2 = 1")
        assert means == [
            (r["step"], pytest.approx(r["reward"], abs=1e-6), pytest.approx(r["completions/clipped_ratio"], abs=1e-6))
            for r in logged(trainer) if "reward" in r
        ]  # fmt: skip
        assert column(run, "SELECT count(*) FROM tokens WHERE token IS NULL") == [0]


def test_a_generation_that_lasts_several_steps_is_older_in_each(tmp_path):
    recorded(tmp_path, num_iterations=1, steps_per_generation=4)
    with open_run(tmp_path / "run") as run:
        by_step = rows(
            run,
            "SELECT step, list_sort(list(sequence_id)), list_distinct(list(policy_lag)), max(abs(logp_new - logp_old)) "
            "FROM tokens JOIN (SELECT step, sequence_id, policy_lag FROM sequences) USING (step, sequence_id) "
            "WHERE position = 0 GROUP BY step ORDER BY step",
        )
    for generation in range(3):
        (_, first, lag, moved), (_, second, later, moved_later) = by_step[2 * generation : 2 * generation + 2]
        assert sorted(first + second) == list(range(32 * generation, 32 * (generation + 1))), "each trains once"
        assert (lag, later) == ([0], [1]) and moved < 1e-5 and moved_later > 1e-3


def test_a_completion_that_trl_takes_from_the_loss_is_known_as_cut(tmp_path):
    trainer = recorded(tmp_path, mask_truncated_completions=True, max_steps=2)
    with open_run(tmp_path / "run") as run:
        cut = rows(run, "SELECT length, len(string_split(completion, ' ')) FROM sequences WHERE truncated")
        assert {length for length, _ in cut} == {0} and max(words for _, words in cut) == LONGEST
        assert min(words for _, words in cut) < LONGEST, "a <pad> that the model has said is not told from padding"
        kept = column(run, "SELECT completion FROM sequences WHERE NOT truncated")
        assert kept and all(text.endswith(("<eos>", "<pad>")) for text in kept)
        share = logged(trainer)[0]["completions/clipped_ratio"]
        assert 0 < share < 1 and column(run, "SELECT truncated_fraction FROM steps") == pytest.approx([share, share])


def test_what_is_measured_is_what_trl_logs(tmp_path):
    """With one micro-batch a step, where TRL's means of micro-batches are means over tokens."""
    trainer = recorded(tmp_path, gradient_accumulation_steps=1, epsilon=0.1)
    names = {"entropy_mean": "entropy", "grad_norm": "grad_norm", "lr": "learning_rate"}
    with open_run(tmp_path / "run") as run:
        for ours, theirs in names.items():
            assert column(run, f"SELECT {ours} FROM steps") == pytest.approx(
                [r[theirs] for r in logged(trainer)], rel=1e-5
            )
        # TRL means over the tokens of sequences with an advantage of 0 too, so do we
        for ours, theirs in (
            ("clip_fraction_low", "clip_ratio/low_mean"),
            ("clip_fraction_high", "clip_ratio/high_mean"),
        ):
            assert column(run, f"SELECT {ours} FROM steps") == pytest.approx(
                [r[theirs] for r in logged(trainer)], abs=1e-6
            )
        assert column(run, "SELECT value FROM metrics WHERE name = 'clip_ratio/low_min'") == [
            r["clip_ratio/low_min"] for r in logged(trainer)
        ]


def test_gradient_norms_are_those_before_clipping(tmp_path):
    seen: list[dict[str, float]] = []

    def spied(parameters, *rest, **options):
        parameters = list(parameters)
        squares: dict[str, float] = {}
        for name, parameter in trainer.model.named_parameters():
            group = parameter_group(name)
            squares[group] = squares.get(group, 0.0) + float((parameter.grad.double() ** 2).sum())
        seen.append({group: math.sqrt(v) for group, v in squares.items()})
        return clip(parameters, *rest, **options)

    trainer = build(tmp_path / "out", max_grad_norm=0.05)
    attach(trainer, tmp_path / "run", fsync=False)
    clip, trainer.accelerator.clip_grad_norm_ = trainer.accelerator.clip_grad_norm_, spied
    trainer.train()
    assert all(r["grad_norm"] > 0.05 for r in logged(trainer)) and len(seen) == 6, "every step is clipped"
    with open_run(tmp_path / "run") as run:
        for step, expected in enumerate(seen, 1):
            found = dict(rows(run, f"SELECT parameter, grad_norm FROM gradients WHERE step = {step}"))
            assert found == pytest.approx(expected, rel=1e-6)
    recorded(tmp_path / "other", max_grad_norm=0.0, max_steps=1, num_iterations=1)
    # transformers 4 logs no norm of what it does not clip; the first step is the same
    assert column(tmp_path / "other" / "run", "SELECT grad_norm FROM steps") == pytest.approx(
        [logged(trainer)[0]["grad_norm"]], rel=1e-5
    )


def test_a_nan_loss_that_is_logged_as_zero_is_nan(tmp_path):
    class Breaks(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    trainer = recorded(tmp_path, Breaks, max_steps=3)
    assert logged(trainer)[2]["loss"] == 0.0, "otherwise TRL has changed"
    with open_run(tmp_path / "run") as run:
        assert rows(run, "SELECT step FROM steps WHERE isnan(loss)") == [(3,)]
        assert rows(run, "SELECT step FROM steps WHERE isnan(grad_norm)") == [(3,)]
        assert "pinned" not in column(run, "SELECT kind FROM events"), "every token is kept here"


@pytest.mark.skipif(VERSION < (1, 15), reason="this TRL has no fused head to hook")
def test_the_private_read_gives_what_the_hook_gives(tmp_path, monkeypatch):
    def tokens(folder):
        with open_run(folder / "run") as run:
            return rows(run, "SELECT step, sequence_id, position, logp_new, entropy FROM tokens ORDER BY ALL")

    recorded(tmp_path / "hook", max_steps=2)
    monkeypatch.setattr(RecordsTelemetry, "_get_per_token_logps_and_entropies", lambda self, *a, **k: super(
        RecordsTelemetry, self)._get_per_token_logps_and_entropies(*a, **k))  # fmt: skip
    recorded(tmp_path / "hook alone", max_steps=2)
    monkeypatch.undo()
    monkeypatch.setattr(
        torch.nn.Module, "register_forward_hook", lambda *a, **k: type("Handle", (), {"remove": lambda self: None})()
    )
    recorded(tmp_path / "private alone", max_steps=2)
    assert tokens(tmp_path / "hook") == tokens(tmp_path / "hook alone") == tokens(tmp_path / "private alone") != []


def test_a_loss_that_cannot_be_read_says_so_and_keeps_the_rest(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trl_steps.StepTelemetry, "saw", lambda *a: None)
    trainer = recorded(tmp_path, max_steps=2)
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT loss FROM steps") == pytest.approx([r["loss"] for r in logged(trainer)], abs=LOGGED)
        assert column(run, "SELECT n_tokens FROM steps") == [None, None]
        (detail,) = column(run, "SELECT detail FROM events WHERE kind = 'dropped'")
        assert "use_liger_loss" in detail
    assert sum("without their tokens" in record.message for record in caplog.records) == 1, "said once"


def test_telemetry_that_fails_does_not_stop_training(tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no space for this")

    monkeypatch.setattr(trl_steps, "concatenate", broken)
    trainer = recorded(tmp_path, max_steps=2)
    assert len(logged(trainer)) == 2
    assert sum("no space for this" in record.message for record in caplog.records) == 1, "said once"


def test_a_training_that_raises_is_a_failed_run_and_a_second_training_continues_it(tmp_path):
    class Raises(GRPOTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2 and not getattr(self, "calm", False):
                raise ValueError("cuda is out of patience")
            return super().training_step(*args, **kwargs)

    trainer = build(tmp_path / "out", Raises, max_steps=3)
    attach(trainer, tmp_path / "run", fsync=False)
    with pytest.raises(ValueError, match="patience"):
        trainer.train()
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT step FROM steps") == [1, 2]
        assert rows(run, "SELECT kind, detail FROM events")[-1] == ("failed", "ValueError: cuda is out of patience")
    trainer.calm = True
    trainer.train()
    with open_run(tmp_path / "run") as run:
        assert rows(run, "SELECT step, attempt FROM steps_all") == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 1)]
        assert column(run, "SELECT kind FROM events")[-1] == "finished"


def test_the_objective_is_the_one_of_the_arguments(tmp_path):
    def of(**settings):
        found = objective_of(GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings))
        return found.name, found.hyperparameters()

    assert of(epsilon=0.1) == ("ppo_clip", {"eps_low": 0.1, "eps_high": 0.1})
    assert of(epsilon_high=0.28) == ("ppo_clip", {"eps_low": 0.2, "eps_high": 0.28})
    assert of(delta=3.0) == ("two_sided_clip", {"eps_low": 0.2, "eps_high": 0.2, "delta": 3.0})
    assert of(loss_type="cispo", epsilon_high=5.0) == ("cispo", {"ratio_min": 0.0, "ratio_max": 5.0})
    if hasattr(GRPOConfig, "sapo_temperature_pos"):
        assert of(loss_type="sapo")[0] == "sapo"
    if hasattr(GRPOConfig, "vespo_k_pos"):
        assert of(loss_type="vespo")[0] == "vespo"
    assert of(importance_sampling_level="sequence") == ("gspo", {"eps_low": 0.2, "eps_high": 0.2})
    assert of(loss_type="luspo", importance_sampling_level="sequence")[0] == "luspo"


def test_what_is_no_trainer_is_refused_with_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="trainer is a dict, allowed is a GRPOTrainer"):
        attach({}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(RLOOTrainer, "_calculate_rewards"), reason="this TRL has the RLOOTrainer of PPO")
def test_a_trainer_without_a_ratio_per_token_is_refused(tmp_path):
    trainer = build(tmp_path / "out", RLOOTrainer, config=RLOOConfig, beta=0.0)
    with pytest.raises(ConfigError, match="trainer is a RLOOTrainer, allowed is a GRPOTrainer"):
        attach(trainer, tmp_path / "run")
    assert type(trainer) is RLOOTrainer and not (tmp_path / "run").exists()
    mixed = build(tmp_path / "out", type("Mixed", (RecordsTelemetry, RLOOTrainer), {}), config=RLOOConfig, beta=0.0)
    with pytest.raises(ConfigError, match="trainer is a Mixed, allowed is a GRPOTrainer"):
        mixed.record_to(tmp_path / "run")


def test_two_ranks_write_every_token_once(tmp_path):
    environment = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone",
        "-m", "tests.collectors.adapters.tiny_trl", str(tmp_path / "out"), str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    with open_run(tmp_path / "run") as run:
        assert rows(run, "SELECT step, n_sequences FROM steps") == [(1, 32), (2, 32), (3, 32)]
        counted = "count(*), min(sequence_id), max(sequence_id), count(DISTINCT group_id)"
        per_rank = rows(run, f"SELECT step, rank, {counted} FROM sequences GROUP BY step, rank ORDER BY ALL")
        assert per_rank == [
            (1, 0, 16, 0, 15, 4), (1, 1, 16, 16, 31, 4), (2, 0, 16, 0, 15, 4), (2, 1, 16, 16, 31, 4),
            (3, 0, 16, 32, 47, 4), (3, 1, 16, 48, 63, 4),
        ]  # fmt: skip
        tokens, distinct = rows(run, "SELECT count(*), count(DISTINCT (step, sequence_id, position)) FROM tokens")[0]
        assert tokens == distinct == column(run, "SELECT sum(n_tokens) FROM steps")[0]
        logged = json.loads((tmp_path / "out" / "losses.json").read_text())
        assert column(run, "SELECT loss FROM steps ORDER BY step") == pytest.approx(logged, rel=1e-5, abs=LOGGED)
        norms = rows(run, "SELECT step, parameter, count(DISTINCT grad_norm) FROM gradients GROUP BY ALL")
        assert norms and all(count == 1 for _, _, count in norms), "gradients are the same on both ranks"


@pytest.mark.skipif("def _generate_single_turn" not in _LOSSES, reason="this TRL keeps what the engine says to itself")
def test_sampling_probabilities_of_an_engine_are_recorded(tmp_path):
    """Where vLLM's come from in TRL, each token says of itself what its number is."""

    class Engine(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            found = list(super()._generate_single_turn(*args, **kwargs))
            at = found.index(None)
            found[at] = [[-(1 + token) / 16 for token in ids] for ids in found[at - 1]]
            return tuple(found)

    recorded(tmp_path, Engine, max_steps=2)
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT DISTINCT logp_rollout * 16 + 1 + token_id FROM tokens") == [0]
        assert column(run, "SELECT count(*) FROM steps WHERE mismatch_mean IS NULL") == [0]
    assert reward(["11"]) == [1.0]


def test_an_engine_whose_probabilities_trl_keeps_is_said_once(tmp_path, caplog):
    class Engine(GRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.use_vllm = True
            return loss

        def _prepare_inputs(self, *args, **kwargs):
            self.use_vllm = False
            return super()._prepare_inputs(*args, **kwargs)

    recorded(tmp_path, Engine, max_steps=2)
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT DISTINCT logp_rollout FROM tokens") == [None]
        (detail,) = column(run, "SELECT detail FROM events WHERE kind = 'dropped'")
    assert detail == "logp_rollout: this version of TRL does not hand on the log-probabilities of vLLM"
    assert sum("of vLLM" in record.message for record in caplog.records) == 1
