"""Sampling: masks, truncation, exact log-probabilities and padding that changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mhpo_core.training.randomness import seeded
from mhpo_core.training.sampling import sample
from mhpo_core.training.tasks.digit_sum import EOS, PAD

RAGGED = [(10, 3, 11), (10, 1, 7, 5, 2, 11), (4,), (10, 0, 11)] * 4


def draw(policy, prompts, max_new_tokens=6, temperature=1.0):
    return sample(
        policy,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_id=EOS,
        pad_id=PAD,
        generator=seeded("cpu", 0),
    )


@dataclass
class Scripted:
    """A policy that puts all probability on the next token of a script, one list per row."""

    script: list[list[int]]
    device = torch.device("cpu")
    calls: int = 0

    def logits(self, ids, attention_mask, keep, cache=None):
        row = torch.tensor([s[self.calls] for s in self.script])
        self.calls += 1
        return torch.where(torch.nn.functional.one_hot(row, 16).bool(), 0.0, -torch.inf)[:, None], None


def test_mask_ends_with_the_end_token_and_truncation_is_told_apart():
    policy = Scripted([[5, EOS, 9, 9], [5, 6, 7, EOS], [5, 6, 7, 8], [EOS, 1, 1, 1]])
    rollout = draw(policy, [(1,)] * 4, max_new_tokens=4)
    assert rollout.completion_ids.tolist() == [[5, EOS, PAD, PAD], [5, 6, 7, EOS], [5, 6, 7, 8], [EOS, PAD, PAD, PAD]]
    assert rollout.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert rollout.truncated.tolist() == [False, False, True, False]
    assert rollout.logp.tolist() == [[0.0] * 4] * 4  # certain tokens, and 0 where masked


def test_sampling_ends_when_every_completion_has():
    policy = Scripted([[5, EOS, 9], [EOS, 9, 9]])
    rollout = draw(policy, [(1,)] * 2, max_new_tokens=3)
    assert policy.calls == 2
    assert rollout.completion_ids.tolist() == [[5, EOS], [EOS, PAD]]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_sampler_and_training_forward_agree_with_an_unpadded_forward_of_each_row(any_policy, temperature):
    rollout = draw(any_policy, RAGGED, temperature=temperature)
    stats = any_policy.completion_stats(
        rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, temperature=temperature
    )
    assert len(set(rollout.mask.sum(1).tolist())) > 1  # lengths differ, so padding is really tested
    for row, prompt in enumerate(RAGGED):
        length = int(rollout.mask[row].sum())
        completion = rollout.completion_ids[row, :length]
        ids = torch.cat([torch.tensor(prompt), completion])
        with torch.no_grad():
            logits = any_policy.model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1)[torch.arange(length), completion]
        # float32 attention over another number of keys: sums in another order
        torch.testing.assert_close(rollout.logp[row, :length], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(stats.logp[row, :length].detach(), expected, rtol=0, atol=1e-5)


def test_tokens_are_drawn_with_their_probabilities(policy):
    count = 20_000
    rollout = draw(policy, [(10, 3, 11)] * count, max_new_tokens=1)
    with torch.no_grad():
        p = policy.model(input_ids=torch.tensor([[10, 3, 11]])).logits[0, -1].softmax(-1)
    frequency = torch.bincount(rollout.completion_ids[:, 0], minlength=16) / count
    assert ((frequency - p).abs() <= 4.5 * (p * (1 - p) / count).sqrt() + 1e-4).all()


def test_a_policy_with_nan_weights_still_samples(policy):
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(torch.nan)
    rollout = draw(policy, RAGGED[:2])
    assert rollout.logp[rollout.mask].isnan().all()
