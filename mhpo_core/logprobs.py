"""Log-probability, entropy and collision probability of sampled tokens, from logits.

Shape letters: B sequences, T response tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

VIOLATIONS = (
    "logp > 1e-4",
    "entropy < -1e-4",
    "entropy > ln V + 1e-3",
    "sum_p_squared outside [1/V, 1] by more than 0.1 %",
    "not finite",
)


@dataclass(frozen=True)
class TokenStats:
    """What telemetry needs of the predictive distribution at each sampled token, all (B, T), float32 or float64.

    Args:
        logp: log p(token), nats, ≤ 0; carries the graph.
        entropy: −Σ p·log p, nats, in [0, ln V]; no graph.
        sum_p_squared: Σ p², in [1/V, 1]; no graph.
        vocabulary_size: V.
    """

    logp: Tensor
    entropy: Tensor
    sum_p_squared: Tensor
    vocabulary_size: int

    @torch.no_grad()
    def violations(self, mask: Tensor) -> Tensor:
        """How many trained tokens hold a value that no distribution over V tokens has; all 0 for a correct kernel.

        A fused kernel that is wrong trains without an error: verl#2656 is a collapse from positive log-probabilities.
        Nothing waits for the device, and counts of several micro-batches may be added.

        Args:
            mask: (B, T), True (or 1) = the token trains; nothing is read elsewhere.

        Returns:
            (5,) int64, one count per entry of VIOLATIONS. NaN is counted as not finite and nowhere else, a logp of −inf
            too: the sampled token had probability 0.
        """
        broken = (
            self.logp > 1e-4,
            self.entropy < -1e-4,
            self.entropy > math.log(self.vocabulary_size) + 1e-3,
            (self.sum_p_squared < 0.999 / self.vocabulary_size) | (self.sum_p_squared > 1.001),
            ~(self.logp.isfinite() & self.entropy.isfinite() & self.sum_p_squared.isfinite()),
        )
        return (torch.stack(broken) & mask.bool()).sum(dim=(1, 2))


def token_stats(logits: Tensor, token_id: Tensor, *, temperature: float = 1.0) -> TokenStats:
    """log p, H and Σp² of softmax(logits / temperature), in float32 whatever dtype comes in; float64 stays.

    Args:
        logits: (B, T, V).
        token_id: (B, T), the sampled tokens.
        temperature: the sampler's temperature, > 0, so that the ratio compares the distributions that were sampled.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probabilities = torch.log_softmax(logits / temperature, dim=-1)
    logp = log_probabilities.gather(-1, token_id.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        probabilities = log_probabilities.exp()
        # a logit of −inf gives p = 0 and 0·(−inf) = NaN; its share of the entropy is 0
        entropy = -(probabilities * log_probabilities.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
        sum_p_squared = probabilities.square().sum(-1)
    return TokenStats(logp=logp, entropy=entropy, sum_p_squared=sum_p_squared, vocabulary_size=logits.shape[-1])
