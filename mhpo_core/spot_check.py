"""A slow second opinion on a few log-probabilities, against a kernel that is wrong without an error.

Shape letters: B sequences, T response tokens, N = B·T rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_VOCABULARY_SLICE = 8192


@torch.no_grad()
def spot_check(
    hidden: Tensor,
    weight: Tensor,
    token_id: Tensor,
    logp: Tensor,
    mask: Tensor,
    *,
    rows: int = 64,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """max |logp − reference| over up to `rows` trained tokens, the reference computed in float64.

    It shares no code with the chunked path: all rows at once, the vocabulary in slices, sums merged by logaddexp. The
    tokens are spread evenly over the trained ones, the first and the last included; the same ones at every call, so
    that no random number is drawn from the run's. Nothing waits for the device; reading the result does.

    Args:
        hidden, weight, token_id, bias, temperature, softcap: as `chunked_token_stats` was given them.
        logp: (B, T), nats, what is checked.
        mask: (B, T), True (or 1) = the token trains.
        rows: ≥ 1. The cost is about that of this many rows of the forward pass, and one read of weight.

    Returns:
        scalar float64, nats, ≥ 0; 0 if no token trains. Both −inf, or both NaN, count as equal; one alone gives ∞ or
        NaN.
    """
    trained = mask.reshape(-1).bool()
    seen = trained.cumsum(0)
    wanted = torch.arange(rows, device=mask.device) * (seen[-1] - 1) // max(1, rows - 1) + 1
    picked = torch.searchsorted(seen, wanted).clamp(max=len(seen) - 1)
    reference = _logp(
        hidden.reshape(-1, hidden.shape[-1])[picked].double(),
        weight,
        token_id.reshape(-1)[picked],
        bias,
        temperature,
        softcap,
    )
    found = logp.reshape(-1)[picked].double()
    equal = (found == reference) | (found.isnan() & reference.isnan()) | ~trained[picked]
    return torch.where(equal, 0.0, (found - reference).abs()).max()


def _logp(
    hidden: Tensor, weight: Tensor, token_id: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """(rows,) log p(token), one slice of the vocabulary after another."""
    normalizer = hidden.new_full(token_id.shape, -torch.inf)
    at_token = hidden.new_full(token_id.shape, -torch.inf)
    for start in range(0, len(weight), _VOCABULARY_SLICE):
        part = slice(start, start + _VOCABULARY_SLICE)
        z = hidden @ weight[part].double().t()
        if bias is not None:
            z = z + bias[part].double()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        normalizer = torch.logaddexp(normalizer, z.logsumexp(dim=1))
        inside = (token_id >= start) & (token_id < start + z.shape[1])
        own = z.gather(1, (token_id - start).clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
        at_token = torch.where(inside, own, at_token)
    return at_token - normalizer
