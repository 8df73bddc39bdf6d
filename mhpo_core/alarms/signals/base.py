"""What a signal is: one quantity of a step, how it is judged, what is healthy and who says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mhpo_core.alarms.readings import READINGS

Scale = Callable[[float], float]


def linear(value: float) -> float:
    """As it is: shares, rewards."""
    return value


def log_from(smallest: float) -> Scale:
    """log |x|, in nats; what is smaller counts as the smallest."""
    return lambda value: math.log(max(abs(value), smallest)) if math.isfinite(value) else abs(value)


def log_to(largest: float) -> Scale:
    """log x, in nats; what is larger is healthy and counts as the largest."""
    return lambda value: math.log(min(max(value, 1e-9), largest)) if math.isfinite(value) else value


def linear_from(smallest: float) -> Scale:
    """As it is; what is smaller is healthy and counts as the smallest."""
    return lambda value: max(value, smallest) if math.isfinite(value) else value


def log_unless_zero(value: float) -> float:
    """log x; NaN, which no detector judges, where x is 0."""
    return math.log(value) if 0 < value < math.inf else math.nan


def distance_from_one(value: float) -> float:
    """|log x|: how far a factor is from 1."""
    return abs(math.log(max(value, 1e-9))) if math.isfinite(value) else abs(value)


@dataclass(frozen=True)
class Signal:
    """A reading that is watched for rising (or falling) out of its own recent past.

    Args:
        name: unique, as alarms and evaluations show it.
        family: signals of one cause, of which only the strongest counts.
        label: what people read.
        reading: key of READINGS.
        scale: on which it is judged.
        floor: smallest spread that counts as noise, on that scale.
        falling: it is the fall that is a sign.
        weight: share of the family's weight that it brings; 0 names the failure mode and never alarms.
        lagged: it grows with every update on one batch of rollouts, so that it is judged by the worst of as many steps.
        healthy: what is seen in healthy runs, in words.
        source: who says so.
    """

    name: str
    family: str
    label: str
    reading: str
    scale: Scale
    floor: float
    falling: bool = False
    weight: float = 1.0
    lagged: bool = False
    healthy: str = ""
    source: str = ""

    @property
    def how(self) -> str:
        """How to have the data."""
        return READINGS[self.reading].how

    def transformed(self, value: float) -> float:
        """The value on the scale on which it is judged, so that up is bad."""
        scaled = self.scale(value)
        return -scaled if self.falling else scaled


@dataclass(frozen=True)
class Family:
    """Signals of one cause.

    Args:
        weight: that it brings to the fused score; the rarer its signals rise in healthy runs, the more.
        label: what people read.
    """

    name: str
    weight: float
    label: str
    signals: tuple[Signal, ...]
