"""Where the training loop hands its telemetry; `collectors.Recorder` is the implementation that writes a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.gradients import GradientNorms


class Sink(Protocol):
    """Receives one call per optimizer step, after clipping and before the next forward pass changes the batch."""

    def record(
        self,
        step: int,
        batch: TokenBatch,
        *,
        loss: float | Tensor | None = None,
        reward: Tensor | None = None,
        grad_norm: float | None = None,
        gradient_norms: GradientNorms | Mapping[str, float] | None = None,
        sequences: Sequences | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Take the step; must return quickly and must not raise because a disk is slow or full."""

    def event(self, kind: str, detail: str = "") -> None:
        """Note that something happened to the run: started, resumed, rewound, finished, dropped, failed."""
