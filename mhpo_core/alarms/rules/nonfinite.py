"""NaN and ±Inf. One is reported and never forgotten; many, or an infinite one, mean that the run is dying."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mhpo_core.alarms.rules.base import CRITICAL, WARNING, Finding, State

_WATCHED = ("grad_norm", "loss", "kl_reference", "kl_policy", "reward", "entropy")
_INFINITE_IS_FATAL = ("grad_norm", "kl_reference", "kl_policy", "loss")
_ROWS = 20


class NonFinite:
    """A NaN or ±Inf in a scalar, or in the log-probabilities or advantages of trained tokens."""

    name = "non-finite"
    about = "NaN or ±Inf in the loss, gradient norm, KL or in trained tokens"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Critical at an infinite value, or when `nonfinite_rows` of the last 20 rows have a NaN; else a warning."""
        needed = state.settings.nonfinite_rows
        for name in _WATCHED:
            value = state.readings.get(name)
            if value is None or math.isfinite(value):
                continue
            rows = [(step, v) for step, v in state.last(name, _ROWS) if not math.isfinite(v)]
            infinite = math.isinf(value) and name in _INFINITE_IS_FATAL
            severity = CRITICAL if infinite or len(rows) >= needed else WARNING
            yield Finding(
                self.name, severity, f"{name} is {value} ({len(rows)} of the last {_ROWS} steps are not finite)",
                value, float(needed), mode="non-finite", onset_step=rows[0][0],
            )  # fmt: skip
        count = state.readings.get("nonfinite_tokens", 0.0)
        if count:
            rows = [(step, v) for step, v in state.last("nonfinite_tokens", _ROWS) if v]
            severity = CRITICAL if len(rows) >= needed else WARNING
            yield Finding(
                self.name, severity,
                f"{count:.0f} trained tokens have a NaN or ±Inf ({len(rows)} of the last {_ROWS} steps have some)",
                count, float(needed), mode="non-finite", onset_step=rows[0][0],
            )  # fmt: skip
