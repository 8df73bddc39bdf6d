"""Telemetry of a step's tokens: `measure` for a whole step, `accumulate` and `merge` for its parts."""

from __future__ import annotations

from mhpo_core.telemetry.accumulators import Accumulators, merge
from mhpo_core.telemetry.logit_norm import logit_gradient_norm
from mhpo_core.telemetry.one_pass import accumulate
from mhpo_core.telemetry.reread import TermDistribution, term_distribution
from mhpo_core.telemetry.step import StepTelemetry, measure
from mhpo_core.telemetry.summary import Histogram, Scalar, histograms_of, scalars_of

__all__ = [
    "Accumulators", "Histogram", "Scalar", "StepTelemetry", "TermDistribution", "accumulate", "histograms_of",
    "logit_gradient_norm", "measure", "merge", "scalars_of", "term_distribution",
]  # fmt: skip
