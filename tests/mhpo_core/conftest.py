"""Random token batches whose masked positions hold garbage.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mhpo_core import TokenBatch

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., TokenBatch]:
    """random_batch(seed, n_sequences=, n_positions=, spread=, dtype=): every optional field, a ragged mask, one row
    without tokens where there are three or more, advantages of all three signs, garbage wherever the mask is False.
    """

    def build(seed=0, n_sequences=5, n_positions=7, spread=0.6, dtype=torch.float64) -> TokenBatch:
        rng = np.random.default_rng(seed)
        shape = (n_sequences, n_positions)
        mask = rng.random(shape) < 0.7
        mask[0, 0] = True
        if n_sequences > 2:
            mask[n_sequences - 1] = False
        probability = rng.uniform(0.02, 0.98, shape)
        logp_new = np.log(probability)
        logp_old = np.minimum(logp_new - spread * rng.standard_normal(shape), -1e-3)
        fields = {
            "logp_new": logp_new,
            "logp_old": logp_old,
            "advantage": rng.choice([-1.7, -0.4, 0.0, 0.6, 2.1], shape),
            "logp_rollout": logp_old - 0.1 * rng.standard_normal(shape),
            "logp_ref": logp_new + 0.2 * rng.standard_normal(shape),
            "entropy": rng.uniform(0, 2, shape),
            # p² plus what at least one other entry of the vocabulary adds
            "sum_p_squared": probability**2 + rng.uniform(0.2, 1, shape) * (1 - probability) ** 2,
        }
        garbage = rng.choice(GARBAGE, (len(fields), *shape))
        tensors = {
            name: torch.as_tensor(np.where(mask, values, garbage[i]), dtype=dtype)
            for i, (name, values) in enumerate(fields.items())
        }
        token_id = torch.as_tensor(rng.integers(0, 50, shape))
        return TokenBatch(**tensors, mask=torch.as_tensor(mask), token_id=token_id)

    return build
