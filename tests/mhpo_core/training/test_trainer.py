"""The loop: what it records, that it learns, and that NaN, stop, bfloat16 and odd settings do not break it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from mhpo_core.errors import ConfigError
from mhpo_core.training import open_task, train
from mhpo_core.training.checkpoint import FILE_NAME
from mhpo_core.training.faults import NoFault
from mhpo_core.training.model import resolve_device
from mhpo_core.training.tasks import Prompt


@dataclass(frozen=True)
class NanAt(NoFault):
    """The sampler reports NaN in one iteration."""

    name: ClassVar[str] = "nan"

    def report(self, logp, iteration, generator):
        return logp * math.nan if iteration == 1 else logp


def test_records_of_a_run_with_reuse(tiny, sink):
    config = tiny(optimizer={"epochs": 2, "minibatches": 2, "micro_batch_size": 3})
    summary = train(config, sink, "cpu")
    assert [row["step"] for row in sink.steps] == list(range(8))
    assert summary.steps == 8 and summary.iterations == 2 and not summary.stopped
    task = open_task(config)
    for row in sink.steps:
        sequences, metrics = row["sequences"], row["metrics"]
        assert sequences.policy_lag == [row["step"] % 4] * 8
        assert (metrics["epoch"], metrics["minibatch"]) == (row["step"] % 4 // 2, row["step"] % 2)
        assert {i // 16 for i in sequences.sequence_id} == {metrics["iteration"]}
        assert sequences.group_id == [i // 4 for i in sequences.sequence_id]
        assert row["grad_norm"] == row["gradient_norms"].total > 0
        for i, (text, ids) in enumerate(zip(sequences.completion, row["batch"].token_id.tolist(), strict=True)):
            completion = ids[: int(row["batch"].mask[i].sum())]
            assert text == task.decode(completion)
            answer = str(int(sequences.prompt[i].rstrip("=")))
            assert float(row["reward"][i]) == task.reward(Prompt((), "", answer), completion)
    ids = [i for row in sink.steps for i in row["sequences"].sequence_id]
    assert sorted(ids) == sorted([*range(32)] * 2)  # every completion trains once per epoch
    orders = {tuple(i % 16 for i in row["sequences"].sequence_id) for row in sink.steps}
    assert len(orders) == 8  # shuffled anew for every epoch
    first, second = sink.steps[0]["batch"], sink.steps[1]["batch"]
    assert (first.logp_new - first.logp_old)[first.mask].abs().max() < 1e-5
    assert (second.logp_new - second.logp_old)[second.mask].abs().max() > 1e-4
    assert not first.logp_new.requires_grad


def test_a_group_is_one_prompt_and_advantages_compare_within_it(tiny, sink):
    train(tiny(iterations=1, optimizer={"minibatches": 1}, rollout={"normalize_std": False}), sink, "cpu")
    row = sink.steps[0]
    groups: dict[int, list[tuple[str, float, float]]] = {}
    advantages = row["batch"].advantage[:, 0].tolist()
    sequences = row["sequences"]
    columns = zip(sequences.group_id, sequences.prompt, sequences.reward.tolist(), advantages, strict=True)
    for group, prompt, reward, advantage in columns:
        groups.setdefault(group, []).append((prompt, reward, advantage))
    assert sorted(groups) == [0, 1, 2, 3] and all(len(members) == 4 for members in groups.values())
    assert len({prompt for members in groups.values() for prompt, _, _ in members}) > 1
    for members in groups.values():
        assert len({prompt for prompt, _, _ in members}) == 1
        mean = sum(reward for _, reward, _ in members) / 4
        assert [a for _, _, a in members] == pytest.approx([r - mean for _, r, _ in members])


def test_it_learns(tiny, sink):
    config = tiny(iterations=25, rollout={"prompts": 8, "group_size": 8}, optimizer={"lr": 5e-3})
    calls = []
    summary = train(config, sink, "cpu", progress=lambda *call: calls.append(call))
    rewards = summary.rewards
    assert sum(rewards[:3]) / 3 < 0.7  # 8 of 16 tokens are even
    assert summary.final_reward == pytest.approx(sum(rewards[-2:]) / 2) and summary.final_reward > 0.9
    assert [c[:3] for c in calls] == [("train", i + 1, 50) for i in range(50)]
    assert calls[-1][3]["reward"] == rewards[-1]


def test_equal_configurations_give_equal_runs_and_another_seed_another(tiny, sink):
    sinks = [sink, type(sink)(), type(sink)()]
    for target, seed in zip(sinks, (0, 0, 1), strict=True):
        train(tiny(seed=seed), target, "cpu")
    one, same, other = ([row["loss"] for row in s.steps] for s in sinks)
    assert one == same != other


def test_the_warm_start_teaches_the_task(tiny, sink):
    calls = []
    warm = {"steps": 60, "batch_size": 64, "lr": 0.02, "lr_warmup": 10}
    config = tiny(task={"name": "digit-sum", "digits": 2}, warm_start=warm, iterations=1)
    summary = train(config, sink, "cpu", progress=lambda *call: calls.append(call))
    assert sink.events == [("warm_start", "60 supervised steps of 64 examples")]
    assert [c[:3] for c in calls[:60]] == [("warm_start", i + 1, 60) for i in range(60)]
    losses = [c[3]["loss"] for c in calls[:60]]
    # untrained: ln 16 = 2.77 nats per token; two random digits and the end token at best: 2·ln 10/3 = 1.54 or less
    assert losses[0] > 2.6 and losses[-1] < 1.7
    batch = sink.steps[0]["batch"]
    assert batch.mask.sum(1).float().mean() == pytest.approx(3, abs=0.3)  # two digits and the end token
    assert summary.rewards[0] >= 0


def test_a_nan_is_recorded_and_the_step_is_skipped(tiny, sink):
    config = replace(tiny(iterations=3), fault=NanAt())
    summary = train(config, sink, "cpu")
    assert summary.skipped_steps == 2
    assert [math.isnan(row["loss"]) for row in sink.steps] == [False, False, True, True, False, False]
    assert [row["metrics"]["skipped_steps"] for row in sink.steps] == [0, 0, 1, 2, 2, 2]
    assert all(sink.steps[2]["gradient_norms"].nonfinite_by_group.values())
    assert math.isfinite(sink.steps[-1]["grad_norm"])


def test_a_skipped_step_leaves_the_weights_alone(tiny, sink, tmp_path):
    fine, broken = tiny(iterations=1), replace(tiny(iterations=2), fault=NanAt())
    for config, name in ((fine, "one"), (broken, "two")):
        train(config, sink, "cpu", checkpoint=tmp_path / name)
    one, two = (torch.load(tmp_path / n / FILE_NAME, weights_only=True)["model"] for n in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_stop_ends_cleanly_after_any_call(tiny, sink, after):
    calls = []
    summary = train(tiny(), sink, "cpu", stop=lambda: calls.append(0) or len(calls) > after)
    assert summary.stopped
    assert summary.steps == len(sink.steps) < 4


def test_stop_during_the_warm_start(tiny, sink):
    done = []
    config = tiny(warm_start={"steps": 50, "batch_size": 4})
    summary = train(config, sink, "cpu", progress=lambda *c: done.append(c), stop=lambda: len(done) >= 3)
    assert summary.stopped and len(done) == 3 and not sink.steps and math.isnan(summary.final_reward)


def test_bfloat16_trains_float32_weights(tiny, sink, tmp_path):
    summary = train(tiny(model={"dtype": "bfloat16"}), sink, "cpu", checkpoint=tmp_path)
    weights = torch.load(tmp_path / FILE_NAME, weights_only=True)["model"]
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert summary.steps == 4 and summary.skipped_steps == 0
    assert all(row["batch"].logp_new.dtype == torch.float32 and row["grad_norm"] > 0 for row in sink.steps)


def test_bfloat16_arithmetic_is_really_used(policy):
    ids, mask = torch.tensor([[10, 3, 11]] * 64), torch.ones(64, 3, dtype=torch.long)
    completion = torch.randint(16, (64, 8), generator=torch.Generator().manual_seed(0))
    rounded = replace(policy, dtype=torch.bfloat16)
    one, two = (p.completion_stats(ids, mask, completion, temperature=1.0).logp for p in (policy, rounded))
    assert one.dtype == two.dtype == torch.float32
    # bfloat16 keeps 8 bits: relative error 2^-9 = 0.002 per rounding of logits of size ~ 5
    assert 1e-3 < (one - two).abs().max() < 0.3


def test_learning_rate_warms_up_and_decays(tiny, sink):
    train(tiny(optimizer={"lr_warmup": 2, "lr_final": 0.5}), sink, "cpu")
    # warm-up 1/2, 1, 1, 1 times decay 1 − 0.5·step/4
    expected = [1e-3 * w * d for w, d in ((0.5, 1.0), (1, 0.875), (1, 0.75), (1, 0.625))]
    assert [row["metrics"]["lr"] for row in sink.steps] == pytest.approx(expected)


def test_the_gradient_is_clipped_after_its_norm_is_taken(tiny, sink):
    other = type(sink)()
    train(tiny(optimizer={"max_grad_norm": 1e-12}), sink, "cpu")
    train(tiny(optimizer={"max_grad_norm": 1e6}), other, "cpu")
    assert sink.steps[0]["grad_norm"] == other.steps[0]["grad_norm"] > 1e-3
    # AdamW divides scale out, but not below its epsilon of 1e-8: the clipped run hardly moves
    batches = [s.steps[-1]["batch"] for s in (sink, other)]
    clipped, free = ((b.logp_new - b.logp_old)[b.mask].abs().max() for b in batches)
    assert clipped < 1e-2 * free


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "meta", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError, match=rf"device: got '{device}', allowed are auto, cpu and cuda"):
        resolve_device(device)


def test_auto_device():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_code_runs_on_cuda(tiny, sink, dtype):
    config = tiny(model={"dtype": dtype}, optimizer={"micro_batch_size": 3}, warm_start={"steps": 2, "batch_size": 4})
    summary = train(config, sink, "cuda")
    assert summary.steps == 4 and summary.skipped_steps == 0
    assert sink.steps[0]["batch"].logp_new.is_cuda
