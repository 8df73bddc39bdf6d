"""What a rule sees of a run, and what it may say."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Protocol

from mhpo_core.alarms.detector import Detector
from mhpo_core.alarms.settings import Settings

WARNING, CRITICAL = "warning", "critical"
_KEPT = 256
SLOW = 20
"""Rows of what changes slowly: a spent entropy, a reward that fades."""


@dataclass(frozen=True)
class Finding:
    """What a rule found at one step.

    Args:
        rule: its name.
        severity: WARNING or CRITICAL.
        message: one sentence with the numbers.
        value, threshold: of what was compared.
        signals: names of the signals it rests on; the failure mode follows from them and their order.
        mode: the failure mode, where the rule alone tells it.
        onset_step: first step of what it saw; None: the earliest onset of its signals.
    """

    rule: str
    severity: str
    message: str
    value: float
    threshold: float
    signals: tuple[str, ...] = ()
    mode: str = ""
    onset_step: int | None = None


@dataclass(frozen=True)
class LastCritical:
    """The newest critical alarm.

    Args:
        row: when it was raised.
        reward: median before the first critical alarm from which the run has not come back; NaN where not known.
    """

    id: str
    row: int
    mode: str
    onset_step: int
    reward: float


@dataclass
class Reward:
    """How a reward has fared, by means over several rows, so that one bad batch is no fall.

    Args:
        averaged: those rows.
    """

    averaged: int = 3

    lowest: float = math.inf
    highest: float = -math.inf
    best: float = -math.inf

    def __post_init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.averaged)

    def observe(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
        self.recent.append(value)
        if self.full:
            self.best = max(self.best, fmean(self.recent))

    @property
    def full(self) -> bool:
        """True once there are values for a mean."""
        return len(self.recent) == self.averaged

    @property
    def span(self) -> float:
        """Highest minus lowest value so far."""
        return max(0.0, self.highest - self.lowest)

    def kept(self, value: float, of: float | None = None) -> float:
        """The share of the best mean, or of another value, that a value is, from 0 or the lowest one below it."""
        bottom, of = min(self.lowest, 0.0), self.best if of is None else of
        return (value - bottom) / (of - bottom) if of - bottom > 1e-6 else math.nan


@dataclass
class State:
    """A run up to and including one step.

    Args:
        row: number of steps seen before this one.
        readings: of this step.
        detectors: by signal.
        families: family → the cumulative sums of its strongest signal over the last rows, weighted.
    """

    settings: Settings
    step: int = 0
    row: int = -1
    readings: Mapping[str, float] = field(default_factory=dict)
    detectors: dict[str, Detector] = field(default_factory=dict)
    families: dict[str, float] = field(default_factory=dict)
    critical: LastCritical | None = None
    reward: Reward = field(default_factory=Reward)
    slow_reward: Reward = field(default_factory=lambda: Reward(SLOW))
    true_reward: Reward = field(default_factory=Reward)
    first_entropies: list[float] = field(default_factory=list)
    past: dict[str, deque[tuple[int, float]]] = field(default_factory=dict)

    def first_entropy(self) -> float:
        """Median of the first 20 entropies; NaN before there are as many."""
        return median(self.first_entropies) if len(self.first_entropies) == SLOW else math.nan

    def remember(self, step: int, readings: Mapping[str, float]) -> None:
        """Take a step in."""
        self.step, self.readings = step, readings
        self.row += 1
        entropy = readings.get("entropy", math.nan)
        if math.isfinite(entropy) and len(self.first_entropies) < SLOW:
            self.first_entropies.append(entropy)
        for name, value in readings.items():
            self.past.setdefault(name, deque(maxlen=_KEPT)).append((step, value))

    def last(self, name: str, count: int) -> list[tuple[int, float]]:
        """(step, value) of the last rows that had the reading, the newest last."""
        return list(self.past.get(name, ()))[-count:]

    def typical(self, name: str, count: int, skip: int = 1) -> float:
        """Median of the finite values before the last `skip` ones; NaN where there are none."""
        values = [v for _, v in list(self.past.get(name, ()))[:-skip][-count:] if math.isfinite(v)]
        return median(values) if values else math.nan


class Rule(Protocol):
    """One way in which a run can be seen to fail."""

    name: str
    about: str

    def evaluate(self, state: State) -> Iterable[Finding]:
        """What it finds at this step; nothing where its data is missing."""
