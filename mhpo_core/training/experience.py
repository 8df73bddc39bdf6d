"""One iteration's completions with everything the updates need of them.

Shape letters: B completions of the iteration, T response tokens (padded on the right); a group is consecutive rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mhpo_core.advantages import group_advantages
from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.training.config import Config
from mhpo_core.training.model import Policy
from mhpo_core.training.randomness import seeded
from mhpo_core.training.sampling import Rollout, sample
from mhpo_core.training.tasks import Prompt, Task

LogpFunction = Callable[[Rollout], TokenBatch]


@dataclass(frozen=True)
class Experience:
    """What one iteration sampled and how it was judged.

    Args:
        rollout: the completions.
        logp_rollout: (B, T), nats, as the sampler reports them.
        logp_old: (B, T), nats, what the ratio is taken against.
        reward: (B,), what the trainer sees.
        true_reward: (B,), the task's own.
        advantage: (B,).
        prompts: B prompts, each repeated over its group.
        completions: B texts.
        iteration: that sampled them.
    """

    rollout: Rollout
    logp_rollout: Tensor
    logp_old: Tensor
    reward: Tensor
    true_reward: Tensor
    advantage: Tensor
    prompts: list[Prompt]
    completions: list[str]
    iteration: int

    def sequences(self, rows: Tensor, group_size: int, policy_lag: int) -> Sequences:
        """What the store keeps of these rows."""
        picked = rows.tolist()
        first = self.iteration * len(self.prompts)
        return Sequences(
            reward=self.reward[rows],
            sequence_id=[first + i for i in picked],
            group_id=[(first + i) // group_size for i in picked],
            truncated=self.rollout.truncated[rows],
            policy_lag=[policy_lag] * len(picked),
            prompt=[self.prompts[i].text for i in picked],
            completion=[self.completions[i] for i in picked],
        )


def collect(policy: Policy, task: Task, config: Config, iteration: int) -> Experience:
    """Sample config.rollout.prompts groups, judge them and settle what logp_old is."""
    settings = config.rollout
    drawn = task.prompts(settings.prompts, seeded("cpu", config.seed, "prompts", iteration))
    prompts = [p for p in drawn for _ in range(settings.group_size)]
    rollout = sample(
        policy,
        [p.ids for p in prompts],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        eos_id=task.eos_id,
        pad_id=task.pad_id,
        generator=seeded(policy.device, config.seed, "sample", iteration),
    )
    completions = _unpadded(rollout)
    judged = [task.reward(p, c) for p, c in zip(prompts, completions, strict=True)]
    true_reward = torch.tensor(judged, device=policy.device)
    reward = config.fault.reward(true_reward, completions, iteration)
    normalize_std = settings.normalize_std and config.objective.normalizes_std
    advantage = group_advantages(reward, settings.group_size, normalize_std=normalize_std)
    logp_rollout = config.fault.report(rollout.logp, iteration, seeded("cpu", config.seed, "fault", iteration))
    return Experience(
        rollout=rollout,
        logp_rollout=logp_rollout,
        logp_old=_OLD_POLICIES[settings.old_policy](policy, rollout, logp_rollout, config),
        reward=reward,
        true_reward=true_reward,
        advantage=config.fault.advantage(advantage, completions, iteration),
        prompts=prompts,
        completions=[task.decode(c) for c in completions],
        iteration=iteration,
    )


def micro_batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """The rows in pieces of at most `size`; 0 = one piece."""
    return torch.split(rows, size or len(rows))


def _unpadded(rollout: Rollout) -> list[list[int]]:
    lengths = rollout.mask.sum(dim=1).tolist()
    return [ids[:n] for ids, n in zip(rollout.completion_ids.tolist(), lengths, strict=True)]


@torch.no_grad()
def _recomputed(policy: Policy, rollout: Rollout, logp_rollout: Tensor, config: Config) -> Tensor:
    rows = torch.arange(len(logp_rollout), device=policy.device)
    pieces = [rollout.rows(piece) for piece in micro_batches(rows, config.optimizer.micro_batch_size)]
    stats = [
        policy.completion_stats(p.prompt_ids, p.prompt_mask, p.completion_ids, temperature=config.rollout.temperature)
        for p in pieces
    ]
    return torch.cat([s.logp for s in stats])


def _reported(policy: Policy, rollout: Rollout, logp_rollout: Tensor, config: Config) -> Tensor:
    return logp_rollout


_OLD_POLICIES = {"rollout": _reported, "recomputed": _recomputed}
