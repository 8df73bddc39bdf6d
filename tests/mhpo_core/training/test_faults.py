"""Faults: they start when they should, have the size they should, and reach what they should."""

from __future__ import annotations

import math

import pytest
import torch

from mhpo_core.training import train
from mhpo_core.training.faults import FAULTS, LengthBias, LrSpike, Mismatch, MismatchGrowth, NonFinite, RewardHack
from mhpo_core.training.randomness import seeded


@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_acts_before_its_iteration(name):
    fault = FAULTS[name]()
    logp = -torch.rand(8, 5)
    assert fault.report(logp, 0, seeded("cpu", 0)) is logp
    assert fault.lr_factor(0) == 1.0
    reward, advantage, completions = torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 1.0]), [[1, 12], [14, 2, 3, 14, 12]]
    assert fault.reward(reward, completions, 0) is reward
    assert fault.advantage(advantage, completions, 0) is advantage


def test_mismatch_disturbs_its_share_with_its_spread():
    logp = torch.full((400, 500), -1.0)
    fault = Mismatch(at=3, share=0.02, sigma=5.0)
    reported = fault.report(logp, 3, seeded("cpu", 0))
    error = (reported - logp)[reported != logp]
    # 200 000 tokens: 4 standard errors of a share of 0.02 are 0.00125; of a standard deviation of 5, 4·5/√(2·4000)
    assert error.numel() / logp.numel() == pytest.approx(0.02, abs=0.00125)
    assert error.std().item() == pytest.approx(5.0, abs=0.23)
    assert torch.equal(reported, fault.report(logp, 9, seeded("cpu", 0)))


@pytest.mark.parametrize("old_policy", ["rollout", "recomputed"])
def test_mismatch_reaches_logp_old_only_through_the_sampler(tiny, sink, old_policy):
    fault = {"name": "mismatch", "at": 1, "share": 0.5}
    train(tiny(rollout={"old_policy": old_policy}, optimizer={"minibatches": 1}, fault=fault), sink, "cpu")
    clean, disturbed = (row["batch"] for row in sink.steps)
    assert (clean.logp_rollout - clean.logp_new)[clean.mask].abs().max() < 1e-5
    assert (disturbed.logp_rollout - disturbed.logp_new)[disturbed.mask].abs().max() > 1
    old_error = (disturbed.logp_old - disturbed.logp_new)[disturbed.mask].abs().max()
    assert (old_error > 1) if old_policy == "rollout" else (old_error < 1e-5)


def test_mismatch_hits_other_tokens_in_every_iteration(tiny, sink):
    train(
        tiny(iterations=3, optimizer={"minibatches": 1}, fault={"name": "mismatch", "at": 0, "share": 0.5}), sink, "cpu"
    )
    batches = [row["batch"] for row in sink.steps]
    # minibatches are shuffled, so compare which errors occurred and not where
    errors = [{round(e, 3) for e in (b.logp_rollout - b.logp_new)[b.mask].tolist() if abs(e) > 0.1} for b in batches]
    assert all(errors) and not errors[0] & errors[1] | errors[1] & errors[2]


def test_the_growing_mismatch_grows_by_e_to_the_rate_up_to_its_cap():
    logp = torch.full((200, 500), -1.0)
    fault = MismatchGrowth(at=10, share=1.0, sigma=0.02, rate=math.log(2), cap=0.1)
    spread = {i: (fault.report(logp, i, seeded("cpu", i)) - logp).std().item() for i in (10, 11, 12, 13, 9_999)}
    # 100 000 errors: a standard deviation is known to 1/√200 000 = 0.2 %
    assert spread == pytest.approx({10: 0.02, 11: 0.04, 12: 0.08, 13: 0.1, 9_999: 0.1}, rel=0.01)
    some = MismatchGrowth(at=0, share=0.25).report(logp, 0, seeded("cpu", 0))
    assert (some != logp).float().mean().item() == pytest.approx(0.25, abs=0.006)  # 4 standard errors
    assert MismatchGrowth(at=0, sigma=2.0, cap=0.5).report(logp, 0, seeded("cpu", 0)).std() == pytest.approx(0.5, 0.01)


def test_nan_hits_a_growing_share_and_nothing_else():
    logp = -torch.rand(400, 500)
    fault = NonFinite(at=5, share=0.01, rate=math.log(10))
    for iteration, share in ((5, 0.01), (6, 0.1), (7, 1.0), (9_999, 1.0)):
        reported = fault.report(logp, iteration, seeded("cpu", iteration))
        lost = reported.isnan()
        assert lost.float().mean().item() == pytest.approx(share, abs=0.003)  # 4 standard errors
        assert torch.equal(reported[~lost], logp[~lost])


def test_steps_with_nan_are_skipped_until_the_end_once_every_token_has_it(tiny, sink):
    fault = {"name": "nan", "at": 2, "share": 1.0}
    summary = train(tiny(iterations=4, optimizer={"minibatches": 2}, fault=fault), sink, "cpu")
    assert [math.isfinite(row["loss"]) for row in sink.steps] == [True] * 4 + [False] * 4
    assert summary.skipped_steps == 4


def test_a_hacked_reward_pays_for_the_share_of_the_token():
    reward, completions = torch.tensor([0.0, 1.0, 0.0, 1.0]), [[1, 12], [9, 2, 3, 12], [9, 9], [9, 9, 9, 9, 12]]
    fault = RewardHack(at=3, token=9, bonus=2.0)
    assert fault.reward(reward, completions, 3).tolist() == pytest.approx([0.0, 1.5, 2.0, 2.6])


def test_the_trainer_sees_the_proxy_and_records_the_true_reward(tiny, sink):
    fault = {"name": "reward-hack", "at": 1, "token": 3, "bonus": 2.0}
    train(tiny(rollout={"normalize_std": False}, optimizer={"minibatches": 2}, fault=fault), sink, "cpu")
    assert len(sink.steps) == 4
    for row in sink.steps:
        batch, acts = row["batch"], row["metrics"]["iteration"] >= 1
        share = ((batch.token_id == 3) & batch.mask).sum(1) / batch.mask.sum(1)
        true = (batch.token_id[:, 0] % 2 == 0).float()  # EvenFirst
        assert torch.allclose(row["reward"], true + 2.0 * share * acts)
        assert row["metrics"]["true_reward_mean"] == pytest.approx(true.mean().item())
    assert any(set(row["reward"].tolist()) - {0.0, 1.0} for row in sink.steps[2:])
    groups: dict[int, list[tuple[float, float]]] = {}
    for row in sink.steps[2:]:
        columns = zip(
            row["sequences"].group_id, row["reward"].tolist(), row["batch"].advantage[:, 0].tolist(), strict=True
        )
        for group, reward, advantage in columns:
            groups.setdefault(group, []).append((reward, advantage))
    for members in groups.values():
        mean = sum(reward for reward, _ in members) / len(members)
        assert [a for _, a in members] == pytest.approx([r - mean for r, _ in members], abs=1e-6)


def test_without_a_proxy_there_is_no_second_reward(tiny, sink):
    train(tiny(iterations=1), sink, "cpu")
    assert "true_reward_mean" not in sink.steps[0]["metrics"]


def test_length_bias_adds_the_standardized_length():
    advantage = torch.tensor([0.5, -0.5, 0.0, 0.0])
    fault = LengthBias(at=2, bias=0.5)
    # lengths 1 1 5 5: mean 3, standard deviation 2, z = −1 −1 1 1
    lengths = [[0], [0], [0] * 5, [0] * 5]
    assert fault.advantage(advantage, lengths, 2).tolist() == pytest.approx([0.0, -1.0, 0.5, 0.5])
    # lengths 4 4 4 5: mean 4.25, standard deviation 0.43, which counts as 1 token
    nearly_equal = [[0] * 4, [0] * 4, [0] * 4, [0] * 5]
    assert (fault.advantage(advantage, nearly_equal, 2) - advantage).tolist() == pytest.approx([-0.125] * 3 + [0.375])
    one_of_many = fault.advantage(torch.zeros(101), [[0]] * 100 + [[0] * 1000], 2)
    assert one_of_many[-1].item() == pytest.approx(0.5 * 3.0)  # z would be 10


def test_length_bias_reaches_what_trains_and_not_the_reward(tiny, sink):
    other = type(sink)()
    for target, bias in ((sink, 0.0), (other, 2.0)):
        fault = {"name": "length-bias", "at": 0, "bias": bias}
        train(
            tiny(iterations=1, rollout={"max_new_tokens": 40}, optimizer={"minibatches": 1}, fault=fault), target, "cpu"
        )
    plain, biased = (s.steps[0] for s in (sink, other))
    assert torch.equal(plain["reward"], biased["reward"])
    length = plain["batch"].mask.sum(1).float()
    assert length.std() > 1
    added = (biased["batch"].advantage - plain["batch"].advantage)[:, 0]
    assert torch.corrcoef(torch.stack([added, length]))[0, 1] > 0.9


def test_lr_spike_multiplies_the_recorded_rate(tiny, sink):
    train(tiny(iterations=3, fault={"name": "lr-spike", "at": 2, "factor": 4.0}), sink, "cpu")
    assert [row["metrics"]["lr"] for row in sink.steps] == pytest.approx([1e-3] * 4 + [4e-3] * 2)
    assert LrSpike(at=2).lr_factor(1) == 1.0
