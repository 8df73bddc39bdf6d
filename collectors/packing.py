"""The trained tokens of a batch without the padding between them.

Shape letters: B sequences, T response tokens, N trained tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collectors.trained import Trained
from mhpo_core.batch import TokenBatch
from mhpo_core.objectives import Objective, Terms
from mhpo_core.telemetry import StepTelemetry, logit_gradient_norm, measure
from mhpo_core.telemetry.binned import measure_binned

BINNED_FROM = 200_000
"""Tokens from which on a step's scalars come from fine histograms; `measure_binned` says how exact they are."""


@dataclass(frozen=True)
class Packed:
    """Trained tokens in the order of sequence and position.

    Args:
        batch: the tokens as one row, (1, N).
        trained: where they lay in the batch.
    """

    batch: TokenBatch
    trained: Trained

    @property
    def length(self) -> NDArray[np.intp]:
        """(B,), trained tokens of each sequence."""
        return self.trained.length

    # what follows from the lengths is left to the thread that needs it
    @cached_property
    def row(self) -> NDArray[np.intp]:
        """(N,), the sequence of each token, in [0, B)."""
        return self.trained.row()

    @cached_property
    def position(self) -> NDArray[np.intp]:
        """(N,), the place of each token among those of its sequence, masked ones too."""
        return self.trained.position()


def pack(batch: TokenBatch) -> Packed:
    """The trained tokens of a batch, on the CPU.

    Shares memory with a batch on the CPU that has no padding.
    """
    trained = Trained(batch.mask)
    given = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "mask"}
    packed: dict[str, Any] = {n: None if v is None else trained.of(v.detach())[None] for n, v in given.items()}
    return Packed(TokenBatch(**packed, mask=torch.ones(1, trained.n_tokens, dtype=torch.bool)), trained)


def measure_packed(batch: TokenBatch | None, packed: Packed, objective: Objective) -> StepTelemetry:
    """`measure` of the batch, with `terms` and `logit_grad_norm` of the packed tokens, (1, N).

    Args:
        batch: None where the terms follow from each token's own ratio; padding then costs nothing.
    """
    if not objective.follows_from_ratio:
        assert batch is not None
        found = measure(batch, objective)
        trained = Trained(batch.mask)
        given = {f.name: getattr(found.terms, f.name) for f in fields(found.terms)}
        of_tokens: dict[str, Any] = {n: None if v is None else trained.of(v)[None] for n, v in given.items()}
        terms = Terms(**of_tokens)
        return replace(found, terms=terms, logit_grad_norm=trained.of(found.logit_grad_norm)[None])
    found = _measured(packed.batch, objective)
    names = found.accumulated.names.counts
    n_sequences = int(np.count_nonzero(packed.length))
    counts = found.accumulated.counts.clone()
    counts[names.index("n_sequences")] = n_sequences
    scalars = found.scalars | {"n_sequences": n_sequences, "length_mean": packed.trained.n_tokens / n_sequences}
    accumulated = replace(found.accumulated, counts=counts, n_rows=len(packed.length))
    return replace(found, scalars=scalars, accumulated=accumulated)


_WITHOUT_RATIO = (
    "n_tokens", "n_sequences", "length_mean", "nonfinite_count", "kl_rollout_old_k3", "entropy_mean",
    "impossible_count",
)  # fmt: skip
_QUANTITIES_WITHOUT_RATIO = ("mismatch", "entropy")


def without_ratio(found: StepTelemetry) -> StepTelemetry:
    """What of a step's telemetry does not follow from the log-probabilities of the policy being trained."""
    kept = {n: v for n, v in found.scalars.items() if n in _WITHOUT_RATIO or n.startswith("mismatch_")}
    histograms = [h for h in found.histograms if h.quantity in _QUANTITIES_WITHOUT_RATIO]
    return replace(found, scalars=kept, histograms=histograms)


def _measured(batch: TokenBatch, objective: Objective) -> StepTelemetry:
    if batch.mask.numel() < BINNED_FROM:
        return measure(batch, objective)
    binned, terms = measure_binned(batch, objective), objective.terms(batch)
    norm = logit_gradient_norm(batch, terms)
    return StepTelemetry(terms, norm, binned.scalars, binned.histograms, binned.accumulated)
