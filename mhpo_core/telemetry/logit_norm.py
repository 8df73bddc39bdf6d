"""How hard one token pulls on its logits.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhpo_core.batch import TokenBatch
from mhpo_core.objectives import Terms


def logit_gradient_norm(batch: TokenBatch, terms: Terms) -> Tensor:
    """|A·M|·sqrt(1 − 2p + Σp²): L2 norm of one token's policy-gradient term with respect to its logits.

    Without Σp² it is |A·M|·(1 − p), which is at most √2 too small. Both at temperature 1.

    Returns:
        (B, T) ≥ 0, 0 at masked positions.

    Source: ∂log p_y/∂z = e_y − p, whose squared norm is 1 − 2p_y + Σp².
    """
    dtype = terms.log_ratio.dtype
    logp = torch.where(batch.mask, batch.logp_new.to(dtype), 0.0)
    # a log-probability a rounding error above 0 is a probability of 1
    miss = -torch.expm1(logp.clamp(max=0))
    if batch.sum_p_squared is not None:
        # 1 − 2p + Σp² = (1−p)² + (Σp² − p²), and the second part lies in [0, (1−p)²]; for p near 1 it is all rounding
        rest = batch.sum_p_squared.to(dtype) - torch.exp(2 * logp)
        miss = (miss.square() + torch.minimum(rest.clamp(min=0), miss.square())).sqrt()
    weight = (terms.gradient_multiplier * torch.where(batch.mask, batch.advantage.to(dtype), 0.0)).abs()
    return torch.where(batch.mask & (weight != 0), weight * miss, 0.0)
