"""A robust CUSUM of one signal: how far, and since when, it has left its own recent past. Looks at no later row."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from mhpo_core.alarms.settings import Settings

_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


@dataclass
class Detector:
    """Median and MAD of a trailing window give z; S ← max(0, S + min(z, cap) − drift) accumulates it.

    The newest value is not in the window that judges it, nor is the one before it, so that a jump does not hide itself.
    NaN and ±Inf are not judged here and do not enter the window: rules of their own see them.

    Args:
        floor: smallest spread, in the signal's transformed unit, so that a quiet signal does not alarm on noise.
        rows: values that stand for one, because each is the worst of so many steps and a single bad one is in all of
            them.
    """

    settings: Settings
    floor: float
    rows: int = 1

    def __post_init__(self) -> None:
        self._values: deque[float] = deque(maxlen=self.settings.window + 1)
        self._seen = 0
        self.score = 0.0
        self.z = math.nan
        self.baseline = math.nan
        self.onset: int | None = None

    def observe(self, step: int, value: float, floor: float = 0.0) -> None:
        """Judge one value.

        Args:
            floor: a larger smallest spread, for this value alone.
        """
        if not math.isfinite(value):
            return
        self._seen += 1
        window = list(self._values)[:-1]
        if self._seen > self.settings.warm_up + 1:
            self._judge(step, value, window, max(self.floor, floor))
        self._values.append(value)

    def _judge(self, step: int, value: float, window: list[float], floor: float) -> None:
        s = self.settings
        self.baseline = median(window)
        spread = _NORMAL * median(abs(v - self.baseline) for v in window) * (1 + 4 / len(window))
        self.z = (value - self.baseline) / max(spread, floor)
        before = self.score
        excess = min(self.z, s.cap) - s.drift
        # a batch that is as usual takes back four times of what a bad one adds
        self.score = min(s.ceiling, max(0.0, before + excess / (self.rows if excess > 0 else max(1, self.rows / 4))))
        if before == 0 and self.score > 0:
            self.onset = step
        elif self.score == 0:
            self.onset = None
