"""A bounded summary of many steps: bins of neighbouring steps that merge exactly.

Shape letters: K bins, M metrics, G gradient groups, 3 sides of the advantage, N_BINS histogram bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mhpo_core.histograms import N_BINS
from mhpo_core.metrics import SIDES

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StepSummary:
    """One step as the live reader sees it; metrics that were not computed are None."""

    step: int
    wall_time: float
    metrics: Mapping[str, float | None]
    gradients: Mapping[str, float]
    log_ratio: NDArray[np.int64]


class Aggregate:
    """Mean, smallest, largest and number of non-finite values per bin and name."""

    def __init__(self, capacity: int, names: list[str]) -> None:
        self.names = list(names)
        self._capacity = capacity
        shape = (capacity, len(names))
        self._total, self._finite, self.nonfinite = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.low, self.high = np.full(shape, np.inf), np.full(shape, -np.inf)

    def _arrays(self) -> list[tuple[str, np.ufunc, float]]:
        return [
            ("_total", np.add, 0.0), ("_finite", np.add, 0.0), ("nonfinite", np.add, 0.0),
            ("low", np.minimum, np.inf), ("high", np.maximum, -np.inf),
        ]  # fmt: skip

    def add(self, bin_: int, values: Mapping[str, float | None]) -> None:
        """Add one step's values to a bin."""
        new = [name for name in values if name not in self.names]
        if new:
            self._add_names(new)
        for name, value in values.items():
            if value is None:
                continue
            column = self.names.index(name)
            if not np.isfinite(value):
                self.nonfinite[bin_, column] += 1
                continue
            self._total[bin_, column] += value
            self._finite[bin_, column] += 1
            self.low[bin_, column] = min(self.low[bin_, column], value)
            self.high[bin_, column] = max(self.high[bin_, column], value)

    def _add_names(self, names: list[str]) -> None:
        self.names += names
        for attribute, _, empty in self._arrays():
            padding = np.full((self._capacity, len(names)), empty)
            setattr(self, attribute, np.hstack([getattr(self, attribute), padding]))

    def merge(self, starts: NDArray[np.intp], size: int) -> None:
        """Merge the first `size` bins into groups that begin at `starts`."""
        for attribute, rule, empty in self._arrays():
            array = getattr(self, attribute)
            merged = rule.reduceat(array[:size], starts, axis=0)
            array[: len(starts)] = merged
            array[len(starts) :] = empty

    def drop(self, count: int) -> None:
        """Forget the oldest `count` bins."""
        for attribute, _, empty in self._arrays():
            array = getattr(self, attribute)
            array[:-count] = array[count:]
            array[-count:] = empty

    def mean(self, size: int) -> Floats:
        """(size, names): mean over the finite values of a bin, NaN where there is none."""
        with np.errstate(invalid="ignore"):
            return np.where(self._finite[:size] > 0, self._total[:size] / self._finite[:size], np.nan)


class Window:
    """At most `capacity` bins of `width` neighbouring steps.

    Args:
        capacity: bins kept.
        width: steps of one bin to begin with.
        forget: when full, drop the oldest quarter (a window that moves along); otherwise double the width (all steps
            at a coarser resolution). Either way the cost of a step does not depend on how many there were before.
    """

    def __init__(self, capacity: int, metrics: list[str], *, width: int = 1, forget: bool = False) -> None:
        self.capacity, self.width, self._forget = capacity, width, forget
        self.size = 0
        self.first = np.zeros(capacity, np.int64)
        self.last = np.zeros(capacity, np.int64)
        self.metrics = Aggregate(capacity, metrics)
        self.gradients = Aggregate(capacity, [])
        self.log_ratio = np.zeros((capacity, len(SIDES), N_BINS), np.int64)

    def add(self, summary: StepSummary) -> None:
        """Add one step; steps come in rising order."""
        if not self._belongs_to_last(summary.step) and self.size == self.capacity:
            self._make_room()
        if not self._belongs_to_last(summary.step):
            self.first[self.size] = summary.step
            self.size += 1
        bin_ = self.size - 1
        self.last[bin_] = summary.step
        self.metrics.add(bin_, summary.metrics)
        self.gradients.add(bin_, summary.gradients)
        self.log_ratio[bin_] += summary.log_ratio

    def _belongs_to_last(self, step: int) -> bool:
        return self.size > 0 and int(self.first[self.size - 1]) // self.width == step // self.width

    def _make_room(self) -> None:
        if self._forget:
            self._drop(max(1, self.capacity // 4))
            return
        # steps may be far apart, then one doubling merges nothing
        while self.size > self.capacity // 2:
            self.width *= 2
            ids = self.first[: self.size] // self.width
            self._merge(np.flatnonzero(np.diff(ids, prepend=ids[0] - 1)))

    def _merge(self, starts: NDArray[np.intp]) -> None:
        ends = np.append(starts[1:], self.size) - 1
        for aggregate in (self.metrics, self.gradients):
            aggregate.merge(starts, self.size)
        count = len(starts)
        self.log_ratio[:count] = np.add.reduceat(self.log_ratio[: self.size], starts, axis=0)
        self.log_ratio[count:] = 0
        self.first[:count], self.last[:count] = self.first[starts], self.last[ends]
        self.size = count

    def _drop(self, count: int) -> None:
        for aggregate in (self.metrics, self.gradients):
            aggregate.drop(count)
        for array in (self.first, self.last, self.log_ratio):
            array[:-count] = array[count:].copy()
        self.log_ratio[-count:] = 0
        self.size -= count
