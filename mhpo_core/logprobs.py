"""Log-probability, entropy and collision probability of sampled tokens, from logits.

Shape letters: B sequences, T response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStats:
    """What telemetry needs of the predictive distribution at each sampled token, all (B, T) float32.

    Args:
        logp: log p(token), nats, ≤ 0; carries the graph.
        entropy: −Σ p·log p, nats, in [0, ln V]; no graph.
        sum_p_squared: Σ p², in [1/V, 1]; no graph.
    """

    logp: Tensor
    entropy: Tensor
    sum_p_squared: Tensor


def token_stats(logits: Tensor, token_id: Tensor, *, temperature: float = 1.0) -> TokenStats:
    """log p, H and Σp² of softmax(logits / temperature), in float32 whatever dtype comes in.

    Args:
        logits: (B, T, V).
        token_id: (B, T), the sampled tokens.
        temperature: the sampler's temperature, > 0, so that the ratio compares the distributions that were sampled.
    """
    log_probabilities = torch.log_softmax(logits.float() / temperature, dim=-1)
    logp = log_probabilities.gather(-1, token_id.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        probabilities = log_probabilities.exp()
        # a logit of −inf gives p = 0 and 0·(−inf) = NaN; its share of the entropy is 0
        entropy = -(probabilities * log_probabilities.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
        sum_p_squared = probabilities.square().sum(-1)
    return TokenStats(logp=logp, entropy=entropy, sum_p_squared=sum_p_squared)
