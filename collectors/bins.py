"""Bins of neighbouring steps that merge exactly: whatever zoom of a run is drawn, it is drawn from these.

Shape letters: K bins, M names, 3 sides of the advantage, N_BINS histogram bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhpo_core.histograms import N_BINS
from mhpo_core.metrics import SIDES

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_RULES: dict[str, tuple[np.ufunc, Any]] = {
    "total": (np.add, 0.0), "finite": (np.add, 0), "nan": (np.add, 0), "above": (np.add, 0), "below": (np.add, 0),
    "low": (np.minimum, np.inf), "high": (np.maximum, -np.inf),
}  # fmt: skip


@dataclass(frozen=True)
class Stats:
    """What the values of each bin come to, per name. A value that was not computed counts nowhere.

    Args:
        names: of the columns.
        total: (K, M) sum of the finite values.
        finite, nan, above, below: (K, M) number of finite values, of NaN, of +Inf and of −Inf.
        low, high: (K, M) smallest and largest finite value; +Inf and −Inf where there is none.
    """

    names: list[str]
    total: Floats
    finite: Counts
    nan: Counts
    above: Counts
    below: Counts
    low: Floats
    high: Floats

    @classmethod
    def empty(cls, size: int, names: Sequence[str]) -> Stats:
        """No value yet in `size` bins."""
        shape = (size, len(names))
        return cls(list(names), **{a: np.full(shape, nothing) for a, (_, nothing) in _RULES.items()})

    @classmethod
    def of_values(cls, names: Sequence[str], values: Floats, known: NDArray[np.bool_]) -> Stats:
        """One bin per row.

        Args:
            values: (K, M).
            known: (K, M), false where nothing was computed.
        """
        finite = known & np.isfinite(values)
        return cls(
            list(names),
            total=np.where(finite, values, 0.0),
            finite=finite.astype(np.int64),
            nan=(known & np.isnan(values)).astype(np.int64),
            above=(known & (values == np.inf)).astype(np.int64),
            below=(known & (values == -np.inf)).astype(np.int64),
            low=np.where(finite, values, np.inf),
            high=np.where(finite, values, -np.inf),
        )

    def map(self, change: Callable[[str, NDArray[Any]], NDArray[Any]], names: list[str] | None = None) -> Stats:
        """The same with every array changed.

        Args:
            change: gets an array and its name.
            names: of the columns afterwards, if they are other ones.
        """
        changed = {attribute: change(attribute, getattr(self, attribute)) for attribute in _RULES}
        return Stats(self.names if names is None else names, **changed)

    @property
    def nonfinite(self) -> Counts:
        """(K, M): number of NaN and ±Inf."""
        return self.nan + self.above + self.below

    def mean(self, size: int | None = None) -> Floats:
        """(size, M): mean over the finite values of a bin, NaN where there is none.

        Args:
            size: only the first so many bins.
        """
        total, finite, low, high = (a[:size] for a in (self.total, self.finite, self.low, self.high))
        with np.errstate(invalid="ignore"):
            mean = np.clip(total / np.maximum(finite, 1), low, high)
            # a sum of huge values overflows while their mean does not: +Inf and −Inf were clipped, Inf − Inf is here
            mean = np.where(np.isnan(mean), low / 2 + high / 2, mean)
        return np.where(finite > 0, mean, np.nan)

    def select(self, names: Sequence[str]) -> Stats:
        """These names in this order; one that is not here is empty."""
        if list(names) == self.names:
            return self
        place = {name: column for column, name in enumerate(self.names)}
        here = [i for i, name in enumerate(names) if name in place]
        source = [place[names[i]] for i in here]
        chosen = Stats.empty(len(self.total), names)
        for attribute in _RULES:
            getattr(chosen, attribute)[:, here] = getattr(self, attribute)[:, source]
        return chosen


@dataclass(frozen=True)
class Bins:
    """Bins in rising order, each with the steps of one multiple of `width`; multiples without a step have no bin.

    Args:
        width: step s belongs to bin s // width.
        first, last: (K,) smallest and largest step in the bin.
        n_steps: (K,).
        wall_time: (K,) of the last step, seconds since the epoch.
        metrics: of the columns of `steps`.
        gradients: of the gradient norm per parameter group.
        log_ratio: (K, 3, N_BINS) tokens per side of the advantage and histogram bin.
    """

    width: int
    first: Counts
    last: Counts
    n_steps: Counts
    wall_time: Floats
    metrics: Stats
    gradients: Stats
    log_ratio: Counts

    @classmethod
    def empty(cls, size: int, width: int, metrics: Sequence[str], gradients: Sequence[str] = ()) -> Bins:
        """Room for `size` bins."""
        step = np.zeros((3, size), np.int64)
        counts = np.zeros((size, len(SIDES), N_BINS), np.int64)
        stats = Stats.empty(size, metrics), Stats.empty(size, gradients)
        return cls(width, step[0], step[1], step[2], np.zeros(size), *stats, counts)

    @property
    def size(self) -> int:
        """Number of bins, K."""
        return len(self.first)

    def rows(self, where: slice) -> Bins:
        """A view of some of the bins."""
        return self._map(lambda array: array[where], lambda stats: stats.map(lambda _, array: array[where]))

    def select(self, metrics: Sequence[str], gradients: Sequence[str]) -> Bins:
        """The same with these names; one that is not here is empty."""
        return replace(self, metrics=self.metrics.select(metrics), gradients=self.gradients.select(gradients))

    def put(self, at: int, bins: Bins) -> None:
        """Overwrite the bins from row `at` on; the names must be the same."""
        rows = slice(at, at + bins.size)
        for name in _ARRAYS:
            getattr(self, name)[rows] = getattr(bins, name)
        for mine, theirs in ((self.metrics, bins.metrics), (self.gradients, bins.gradients)):
            for attribute in _RULES:
                getattr(mine, attribute)[rows] = getattr(theirs, attribute)

    def _map(self, change: Callable[[NDArray[Any]], NDArray[Any]], change_stats: Callable[[Stats], Stats]) -> Bins:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in _ARRAYS}
        return replace(self, metrics=change_stats(self.metrics), gradients=change_stats(self.gradients), **changed)


_ARRAYS = [f.name for f in fields(Bins) if f.name not in ("width", "metrics", "gradients")]


def coarsen(bins: Bins, width: int) -> Bins:
    """Merge the bins of each multiple of a larger width. Counts, low and high are exact, sums are rounded.

    Args:
        width: a multiple of the present one.
    """
    if width == bins.width or not bins.size:
        return replace(bins, width=width)
    return _merge(replace(bins, width=width))


def _merge(bins: Bins) -> Bins:
    ids = bins.first // bins.width
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
    if len(starts) == bins.size:
        return bins
    ends = np.append(starts[1:], bins.size) - 1

    def merged(stats: Stats) -> Stats:
        return stats.map(lambda attribute, array: _RULES[attribute][0].reduceat(array, starts, axis=0))

    with np.errstate(over="ignore", invalid="ignore"):
        metrics, gradients = merged(bins.metrics), merged(bins.gradients)
    return Bins(
        bins.width, bins.first[starts], bins.last[ends], np.add.reduceat(bins.n_steps, starts), bins.wall_time[ends],
        metrics, gradients, np.add.reduceat(bins.log_ratio, starts, axis=0),
    )  # fmt: skip


def concatenate(parts: Sequence[Bins]) -> Bins:
    """Bins of one width after one another, steps rising, with the names of all of them.

    The last steps of one part and the first of the next may belong to the same bin, which is then one.
    """
    if len(parts) == 1:
        return parts[0]
    metrics = list(dict.fromkeys(name for part in parts for name in part.metrics.names))
    gradients = list(dict.fromkeys(name for part in parts for name in part.gradients.names))
    aligned = [part.select(metrics, gradients) for part in parts if part.size] or [parts[0].select(metrics, gradients)]

    def joined(stats: list[Stats]) -> Stats:
        return stats[0].map(lambda attribute, _: np.concatenate([getattr(s, attribute) for s in stats]))

    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in aligned]) for name in _ARRAYS}
    stats = joined([part.metrics for part in aligned]), joined([part.gradients for part in aligned])
    bins = replace(parts[0], metrics=stats[0], gradients=stats[1], **arrays)
    return _merge(bins) if bins.size else bins


def count_bins(first: Counts, last: Counts, width: int) -> int:
    """Number of bins of that width which the intervals first … last touch; they rise and do not overlap.

    Exact for the steps of bins down to half of their width: their first and last step then tell which halves are used.
    """
    low, high = first // width, last // width
    return int((high - low + 1).sum() - (low[1:] == high[:-1]).sum())


def drop_to(bins: Bins, max_points: int) -> Bins:
    """The smallest width, doubled as often as needed, that leaves at most so many bins."""
    width = bins.width
    while count_bins(bins.first, bins.first, width) > max_points:
        width *= 2
    return coarsen(bins, width)
