"""Small recorded runs for the tests of the app."""

from __future__ import annotations

from pathlib import Path

import torch

from collectors import Recorder
from mhpo_core import TokenBatch


def token_batch(seed: int, scale: float = 0.1, n_sequences: int = 16) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(n_sequences, 5, generator=generator) - 0.2
    return TokenBatch(
        logp_new=old + scale * torch.randn(n_sequences, 5, generator=generator),
        logp_old=old,
        advantage=torch.randn(n_sequences, generator=generator),
        mask=torch.rand(n_sequences, 5, generator=generator) > 0.1,
        logp_rollout=old + 1e-4,
        entropy=-old,
    )


def record_run(path: Path, n_steps: int, *, objective: str = "mhpo", updates: int = 1, scale: float = 0.1) -> None:
    with Recorder(path, objective=objective, updates_per_iteration=updates) as recorder:
        for step in range(n_steps):
            batch = token_batch(step, scale)
            recorder.record(
                step, batch, loss=0.5, reward=torch.linspace(0, 1, batch.n_sequences), grad_norm=1.0 + step,
                gradient_norms={"model.layers.0.mlp": 0.5 + step, "lm_head": 2.0},
            )  # fmt: skip
