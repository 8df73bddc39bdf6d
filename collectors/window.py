"""A bounded summary of a run that grows step by step: the bins of all steps, or those of the newest ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collectors.bins import Bins, Counts, Stats, coarsen, concatenate, drop_to


@dataclass(frozen=True)
class StepSummary:
    """One step as the live reader sees it; metrics that were not computed are None."""

    step: int
    wall_time: float
    metrics: Mapping[str, float | None]
    gradients: Mapping[str, float]
    log_ratio: NDArray[np.int64]

    @classmethod
    def of(cls, bins: Bins, row: int) -> StepSummary:
        """A bin of one step.

        Args:
            row: of the bin.
        """
        metrics, gradients = _values(bins.metrics, row), _values(bins.gradients, row)
        known = {name: value for name, value in gradients.items() if value is not None}
        return cls(int(bins.last[row]), float(bins.wall_time[row]), metrics, known, bins.log_ratio[row].copy())

    def bins(self) -> Bins:
        """The step as one bin."""
        step = np.array([self.step], np.int64)
        stats = [
            Stats.of_values(
                list(values),
                np.array([[np.nan if v is None else v for v in values.values()]], np.float64),
                np.array([[v is not None for v in values.values()]], bool),
            )
            for values in (self.metrics, self.gradients)
        ]
        counts = self.log_ratio[None].astype(np.int64)
        return Bins(1, step, step.copy(), np.ones(1, np.int64), np.array([self.wall_time]), stats[0], stats[1], counts)


def _values(stats: Stats, row: int) -> dict[str, float | None]:
    kinds = (stats.finite, stats.nan, stats.above, stats.below)
    found: dict[str, float | None] = {}
    for column, name in enumerate(stats.names):
        finite, nan, above, below = (bool(kind[row, column]) for kind in kinds)
        value = float(stats.total[row, column]) if finite else np.nan if nan else np.inf if above else -np.inf
        found[name] = value if finite or nan or above or below else None
    return found


class Window:
    """At most `capacity` bins of neighbouring steps; adding a step costs the same however many there were before.

    What it holds depends on the steps alone, not on how many came at once.

    Args:
        capacity: bins kept.
        metrics: names to begin with; others are added as they come.
        width: steps of one bin to begin with.
        forget: keep the newest bins (a window that moves along); otherwise all steps, in bins whose width is doubled
            whenever there are more than `capacity`.
    """

    def __init__(self, capacity: int, metrics: Sequence[str], *, width: int = 1, forget: bool = False) -> None:
        self.capacity, self.forgets = capacity, forget
        # more room than needed, so that moving the newest bins to the front is rare
        self._room = Bins.empty(capacity + forget * max(1, capacity // 4), width, metrics)
        self._start = 0
        self.size = 0

    def add(self, steps: StepSummary | Bins) -> None:
        """Add steps later than all before.

        Args:
            steps: one, or bins of which the width divides that of the window.
        """
        new = steps.bins() if isinstance(steps, StepSummary) else steps
        if not new.size:
            return
        new = coarsen(new, self.width) if new.width <= self.width else new
        if new.width > self.width:
            self._replace(coarsen(self.bins, new.width))
        # the newest bin may still be open
        end = self._start + self.size
        newest = self._room.rows(slice(end - min(self.size, 1), end))
        self.size -= newest.size
        self._append(concatenate([newest, new]))

    def _append(self, new: Bins) -> None:
        """Append bins whose names begin with those of the room."""
        if new.metrics.names != self._room.metrics.names or new.gradients.names != self._room.gradients.names:
            self._room = self._room.select(new.metrics.names, new.gradients.names)
        if self.forgets:
            self._append_newest(new.rows(slice(-self.capacity, None)))
        elif self.size + new.size > self.capacity:
            self._replace(drop_to(concatenate([self.bins, new]), self.capacity))
        else:
            self._room.put(self.size, new)
            self.size += new.size

    def _append_newest(self, new: Bins) -> None:
        if self._start + self.size + new.size > self._room.size:
            kept = self.bins.rows(slice(max(0, self.size + new.size - self.capacity), None))
            self._room.put(0, kept)
            self._start, self.size = 0, kept.size
        self._room.put(self._start + self.size, new)
        surplus = max(0, self.size + new.size - self.capacity)
        self._start, self.size = self._start + surplus, self.size + new.size - surplus

    def _replace(self, bins: Bins) -> None:
        self._room = Bins.empty(self._room.size, bins.width, bins.metrics.names, bins.gradients.names)
        self._room.put(0, bins)
        self._start, self.size = 0, bins.size

    @property
    def bins(self) -> Bins:
        """A view of what is held now."""
        return self._room.rows(slice(self._start, self._start + self.size))

    @property
    def width(self) -> int:
        """Steps of one bin."""
        return self._room.width

    @property
    def first(self) -> Counts:
        """(K,): see Bins."""
        return self.bins.first

    @property
    def last(self) -> Counts:
        """(K,): see Bins."""
        return self.bins.last

    @property
    def metrics(self) -> Stats:
        """(K, M): see Bins."""
        return self.bins.metrics

    @property
    def gradients(self) -> Stats:
        """(K, G): see Bins."""
        return self.bins.gradients

    @property
    def log_ratio(self) -> Counts:
        """(K, 3, N_BINS): see Bins."""
        return self.bins.log_ratio
