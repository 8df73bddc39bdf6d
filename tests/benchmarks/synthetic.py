"""Token telemetry as a run has it, from a seed; what the benchmarks of the store measure with.

Ragged lengths, Zipf token ids, log-probabilities near 0 for most tokens, log-ratios that widen with uncertainty and
have heavy tails, one advantage per sequence.
"""

from __future__ import annotations

import numpy as np
import torch

from mhpo_core import TokenBatch

VOCABULARY = 151_936


def step_batch(n_tokens: int, seed: int = 0, mean_length: int = 800, longest: int = 16_000) -> TokenBatch:
    """A batch of exactly so many trained tokens, (B, T) with padding."""
    rng = np.random.default_rng(seed)
    length = _lengths(rng, n_tokens, mean_length, longest)
    mask = np.arange(length.max())[None] < length[:, None]
    p = np.clip(rng.beta(2.5, 0.35, n_tokens), 1e-6, 1)
    old = np.log(p)
    new = np.minimum(old + _log_ratio(rng, p), 0)
    doubt = 1 - p

    def padded(values: np.ndarray, dtype: type = np.float32) -> torch.Tensor:
        full = np.zeros(mask.shape, dtype)
        full[mask] = values
        return torch.from_numpy(full)

    return TokenBatch(
        logp_new=padded(new),
        logp_old=padded(old),
        advantage=torch.from_numpy(rng.choice([-1.2, -0.8, 0.0, 0.8, 1.5], len(length)).astype(np.float32)),
        mask=torch.from_numpy(mask),
        logp_rollout=padded(np.minimum(old + rng.normal(size=n_tokens) * 0.01 * np.sqrt(doubt), 0)),
        entropy=padded(-2 * p * old + rng.random(n_tokens) * 0.3 * doubt),
        sum_p_squared=padded(p**2 + doubt**2 * rng.random(n_tokens) * 0.5),
        token_id=padded(rng.zipf(1.2, n_tokens) % VOCABULARY, np.int64),
    )


def _lengths(rng: np.random.Generator, n_tokens: int, mean: int, longest: int) -> np.ndarray:
    drawn = np.minimum(rng.lognormal(np.log(mean) - 0.28, 0.75, 4 * n_tokens // mean + 8).astype(int) + 1, longest)
    length = drawn[: int(np.searchsorted(drawn.cumsum(), n_tokens)) + 1]
    length[-1] -= length.sum() - n_tokens
    return length[length > 0]


def _log_ratio(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    shift = rng.normal(size=len(p)) * (0.01 + 0.1 * np.sqrt(p * (1 - p)))
    for share, draw in ((0.1, lambda n: rng.laplace(size=n) * 0.1), (0.0015, lambda n: rng.standard_t(1.8, n) * 0.3)):
        here = rng.random(len(p)) < share
        shift[here] = draw(int(here.sum()))
    return shift
