"""Batched sampling with a key-value cache and the exact log-probability of every sampled token.

Shape letters: B sequences, P prompt tokens (padded on the left), T response tokens (padded on the right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mhpo_core.training.model import Policy


@dataclass(frozen=True)
class Rollout:
    """Sampled completions.

    Args:
        prompt_ids: (B, P).
        prompt_mask: (B, P), 1 = a token of the prompt, 0 = padding.
        completion_ids: (B, T).
        mask: (B, T) bool, True up to and with the end token.
        logp: (B, T), nats, log-probability of the token in the distribution it was drawn from; 0 where masked.
        truncated: (B,) bool, the limit came before the end token.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    logp: Tensor
    truncated: Tensor

    def rows(self, index: Tensor) -> Rollout:
        """These rows only."""
        return Rollout(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) ids and mask of ragged prompts, so that all of them end at the same position."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids and bool mask of ragged completions."""
    width = max(map(len, rows))
    ids = [list(row) + [pad_id] * (width - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator,
) -> Rollout:
    """One completion per prompt, drawn from softmax(logits / temperature).

    Args:
        prompts: B prompts, ragged; repeat one to sample a group.
        max_new_tokens: limit on T, the end token included.
        generator: on the policy's device.
    """
    prompt_ids, prompt_mask = pad_left(prompts, pad_id, policy.device)
    ids, attention_mask, cache = prompt_ids, prompt_mask, None
    running = torch.ones(len(prompts), dtype=torch.bool, device=policy.device)
    tokens, masks, logps = [], [], []
    for _ in range(max_new_tokens):
        logits, cache = policy.logits(ids, attention_mask, keep=1, cache=cache)
        distribution = torch.log_softmax(logits[:, -1].float() / temperature, dim=-1)
        drawn = torch.where(running, _draw(distribution, generator), pad_id)
        tokens.append(drawn)
        masks.append(running)
        logps.append(distribution.gather(1, drawn[:, None]).squeeze(1).where(running, 0.0))
        running = running & (drawn != eos_id)
        if not bool(running.any()):
            break
        ids = drawn[:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(ids)], dim=1)
    return Rollout(
        prompt_ids, prompt_mask, torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logps, 1), running
    )


def _draw(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    # exponential races: argmax p/E with E ~ Exp(1) draws from p, and unlike multinomial accepts a NaN distribution
    return (log_probabilities.exp() / torch.empty_like(log_probabilities).exponential_(generator=generator)).argmax(1)
