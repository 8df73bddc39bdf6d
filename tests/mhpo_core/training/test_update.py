"""The gradient of a step: the same under any micro-batch split, for every objective and aggregation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mhpo_core import objectives
from mhpo_core.training.experience import collect
from mhpo_core.training.tasks import DigitSum
from mhpo_core.training.update import accumulate_gradient, loss_share


@pytest.fixture
def experience(policy, tiny):
    """Completions of different lengths whose ratios and advantages are far from trivial."""
    found = collect(policy, DigitSum(2), tiny(rollout={"max_new_tokens": 6}), 0)
    generator = torch.Generator().manual_seed(1)
    noise = 0.5 * torch.randn(found.logp_old.shape, generator=generator)
    advantage = torch.randn(found.advantage.shape, generator=generator)
    assert len(set(found.rollout.mask.sum(1).tolist())) > 2
    return replace(found, logp_old=found.logp_old + noise, advantage=advantage)


def gradient(policy, objective, experience, aggregation, size):
    policy.model.zero_grad()
    rows = torch.arange(13)  # no split below divides it evenly
    batch, loss = accumulate_gradient(
        policy,
        objective,
        experience,
        rows,
        aggregation=aggregation,
        loss_scale=6.0,
        temperature=1.0,
        micro_batch_size=size,
    )
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()]), loss, batch


@pytest.mark.parametrize("aggregation", objectives.AGGREGATIONS)
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_gradient_loss_and_telemetry_do_not_depend_on_the_split(policy, experience, name, aggregation):
    objective = objectives.create(name)
    whole, loss, batch = gradient(policy, objective, experience, aggregation, 0)
    assert whole.norm() > 0
    for size in (1, 4, 6):
        split, split_loss, split_batch = gradient(policy, objective, experience, aggregation, size)
        assert (split - whole).norm() <= 1e-5 * whole.norm()
        assert split_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(split_batch.logp_new, batch.logp_new, rtol=0, atol=1e-5)
        assert torch.equal(split_batch.token_id, batch.token_id) and torch.equal(split_batch.mask, batch.mask)


def test_loss_share_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()  # 6 tokens in 3 sequences
    rows = torch.tensor([0, 2])  # 5 tokens in 2 sequences
    shares = {mode: float(loss_share(mask, rows, mode)) for mode in objectives.AGGREGATIONS}
    for mode, share in shares.items():
        expected = {"token-mean": 5 / 6, "token-sum": 1.0}.get(mode, 2 / 3)
        assert share == pytest.approx(expected, rel=1e-6), mode


def test_loss_scale_divides_the_sum_norm_loss(policy, experience):
    objective = objectives.create("grpo")
    whole, loss, _ = gradient(policy, objective, experience, "seq-mean-token-sum", 4)
    scaled, scaled_loss, _ = gradient(policy, objective, experience, "seq-mean-token-sum-norm", 4)
    assert scaled_loss == pytest.approx(loss / 6, rel=1e-5)
    torch.testing.assert_close(scaled, whole / 6, rtol=1e-5, atol=1e-7)
