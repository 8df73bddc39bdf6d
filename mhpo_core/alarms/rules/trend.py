"""Where a trend leads: engine mismatch grows exponentially before it kills a run; its slope tells what time is left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from statistics import median

from mhpo_core.alarms.rules.base import WARNING, Finding, State

_ROWS = 20
_AT_LEAST = 12


class MismatchProjection:
    """Theil–Sen slope of log KL(rollout‖old), projected to the level at which runs have been seen to fail.

    Source: δ_{t+1} ≥ (1 + ημ/2) δ_t and failure beyond 0.05, IcePop.
    """

    name = "mismatch-projection"
    about = "engine mismatch grows and will reach the level at which runs fail"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """From 12 values on; the slope must be upward for 99 % of all orders (Mann–Kendall)."""
        s = state.settings
        points = [(step, math.log(v)) for step, v in state.last("mismatch_kl", _ROWS) if 0 < v < math.inf]
        if "mismatch_kl" not in state.readings or len(points) < _AT_LEAST:
            return
        slopes = [(b - a) / (t - r) for (r, a), (t, b) in combinations(points, 2) if t > r]
        if not slopes:
            return
        slope, n = median(slopes), len(points)
        concordance = sum((x > 0) - (x < 0) for x in slopes)
        z = concordance / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
        level = math.exp(median(v for _, v in points[-5:]))
        if slope <= 0 or z < 2.6 or level >= s.projected_mismatch:
            return
        steps = math.log(s.projected_mismatch / level) / slope
        spacing = (points[-1][0] - points[0][0]) / (n - 1)
        if steps <= s.projected_rows * spacing:
            yield Finding(
                self.name, WARNING,
                f"engine mismatch is {level:.2g} nats and grows; at this rate it reaches {s.projected_mismatch:g} in "
                f"{steps:.0f} steps", level, s.projected_mismatch, ("mismatch_kl",), onset_step=points[0][0],
            )  # fmt: skip
