"""Supervised steps before RL, so that some completions earn a reward and RL has something to tell apart."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mhpo_core.training.model import Policy
from mhpo_core.training.randomness import seeded
from mhpo_core.training.sampling import pad_left, pad_right
from mhpo_core.training.sections import WarmStartConfig
from mhpo_core.training.tasks import Task


def warm_start(
    policy: Policy, task: Task, config: WarmStartConfig, seed: int, on_step: Callable[[int, float], bool]
) -> None:
    """Minimise −mean log p of the completion tokens of the task's examples, end token included.

    Args:
        seed: of the examples.
        on_step: called with (steps done, loss in nats per token) after every step; True ends the warm start.
    """
    parameters = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    generator = seeded("cpu", seed, "warm_start")
    for step in range(config.steps):
        examples = task.examples(config.batch_size, generator)
        prompt_ids, prompt_mask = pad_left([e.prompt_ids for e in examples], task.pad_id, policy.device)
        completion_ids, mask = pad_right([e.completion_ids for e in examples], task.pad_id, policy.device)
        stats = policy.completion_stats(prompt_ids, prompt_mask, completion_ids, temperature=1.0)
        loss = -stats.logp[mask].mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.lr_warmup))
        optimizer.step()
        optimizer.zero_grad()
        if on_step(step + 1, loss.item()):
            return
