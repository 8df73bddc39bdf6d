"""The gradient of one optimizer step, identical under any split into micro-batches.

Shape letters: B completions of the minibatch, T response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhpo_core.batch import TokenBatch, concatenate
from mhpo_core.objectives import Objective, aggregate
from mhpo_core.training.experience import Experience, micro_batches
from mhpo_core.training.model import Policy


def accumulate_gradient(
    policy: Policy,
    objective: Objective,
    experience: Experience,
    rows: Tensor,
    *,
    aggregation: str,
    loss_scale: float,
    temperature: float,
    micro_batch_size: int = 0,
) -> tuple[TokenBatch, float]:
    """Add the gradient of −aggregate(J) over these rows to the model's parameters.

    Args:
        rows: (B,), indices into the experience.
        aggregation: a key of AGGREGATIONS.
        loss_scale: length that seq-mean-token-sum-norm divides by, tokens.
        temperature: the sampler's.
        micro_batch_size: completions per forward pass, 0 = all.

    Returns:
        the tokens of all rows, without a graph, and the loss in reward units.
    """
    full_mask = experience.rollout.mask[rows]
    batches, loss = [], 0.0
    for piece in micro_batches(torch.arange(len(rows), device=rows.device), micro_batch_size):
        batch = _forward(policy, experience, rows[piece], temperature)
        part = objective.loss(batch, aggregation, loss_scale) * loss_share(full_mask, piece, aggregation)
        torch.autograd.backward(part)
        batches.append(batch.detach())
        loss += part.item()
    return concatenate(batches), loss


def loss_share(mask: Tensor, rows: Tensor, aggregation: str) -> Tensor:
    """What the loss of these rows alone is multiplied by, so that the parts add up to the loss of the whole mask.

    It is the aggregate of 1 at these rows and 0 elsewhere, divided by the aggregate of 1 over these rows alone: for
    token-mean their share of the tokens, for the sequence means their share of the sequences, for token-sum 1.

    Args:
        mask: (B, T) bool, of the whole minibatch.
        rows: indices into it; at least one of their tokens trains.
        aggregation: a key of AGGREGATIONS.

    Returns:
        scalar tensor, > 0.
    """
    inside = torch.zeros(mask.shape, device=mask.device)
    inside[rows] = 1.0
    # any loss_scale cancels
    return aggregate(inside, mask, aggregation, 1.0) / aggregate(inside[rows], mask[rows], aggregation, 1.0)


def _forward(policy: Policy, experience: Experience, rows: Tensor, temperature: float) -> TokenBatch:
    rollout = experience.rollout.rows(rows)
    stats = policy.completion_stats(
        rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, temperature=temperature
    )
    return TokenBatch(
        logp_new=stats.logp,
        logp_old=experience.logp_old[rows],
        logp_rollout=experience.logp_rollout[rows],
        advantage=experience.advantage[rows],
        mask=rollout.mask,
        entropy=stats.entropy,
        sum_p_squared=stats.sum_p_squared,
        token_id=rollout.completion_ids,
    )
