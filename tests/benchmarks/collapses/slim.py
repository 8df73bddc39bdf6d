"""Recordings small enough for a repository: every step's scalars, and the tokens and histograms of a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from collectors import Recorder
from collectors.intake import owned_sequences, sequence_scalars
from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.telemetry import measure

WHOLE_EVERY = 20  # iterations


class Slim:
    """A sink in front of a recorder that keeps back the tokens of all but every 20th iteration."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def record(
        self,
        step: int,
        batch: TokenBatch,
        *,
        reward: Tensor | None = None,
        sequences: Sequences | None = None,
        metrics: Mapping[str, float] | None = None,
        **rest: Any,
    ) -> None:
        """The step itself, or the step without tokens, with its scalars as columns of float32 precision."""
        metrics = metrics or {}
        if metrics["iteration"] % WHOLE_EVERY == 0:
            self._recorder.record(step, batch, reward=reward, sequences=sequences, metrics=metrics, **rest)
            return
        of_tokens = measure(batch, self._recorder.objective).scalars
        of_sequences = sequence_scalars(owned_sequences(sequences or Sequences(), reward, batch.n_sequences))
        measured = (of_tokens | of_sequences).items()
        columns = {name: float(np.float32(value)) for name, value in measured if value is not None}
        self._recorder.record(step, None, columns=columns, metrics=metrics, **rest)

    def event(self, kind: str, detail: str = "") -> None:
        """Passed on."""
        self._recorder.event(kind, detail)
