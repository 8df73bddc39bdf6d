"""The warm start: its loss counts exactly the completion tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mhpo_core.training.sections import WarmStartConfig
from mhpo_core.training.tasks import DigitSum, Example
from mhpo_core.training.warm_start import warm_start

EXAMPLES = [Example((10, 3, 11), (1, 2, 12)), Example((10, 1, 7, 5, 11), (12,)), Example((4,), (9, 9, 9, 9, 12))]


@dataclass(frozen=True)
class Ragged(DigitSum):
    """Examples of different lengths."""

    def examples(self, count, generator):
        return EXAMPLES[:count]


def test_first_loss_is_the_mean_over_completion_tokens_of_unpadded_examples(policy):
    logps = []
    for example in EXAMPLES:
        ids = torch.tensor(example.prompt_ids + example.completion_ids)
        with torch.no_grad():
            logits = policy.model(input_ids=ids[None]).logits[0, len(example.prompt_ids) - 1 : -1]
        picked = torch.log_softmax(logits, -1)[range(len(logits)), list(example.completion_ids)]
        logps += picked.tolist()
    assert len(logps) == 9  # 3 + 1 + 5
    losses = []
    config = WarmStartConfig(steps=2, batch_size=3)
    warm_start(policy, Ragged(), config, 0, lambda done, loss: losses.append(loss) or False)
    assert losses[0] == pytest.approx(-sum(logps) / 9, rel=1e-5)
    assert losses[1] < losses[0]
