"""Histograms finer than those that are stored, at the price of one scattered addition per token.

The leading bits of a float32 (sign, exponent, first bits of the mantissa) number its bin, so a shift finds it, and NaN
and ±Inf have bins of their own. The bins of `histograms` are unions of these.

Shape letters: R rows and C tokens of a block, K filled bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mhpo_core.histograms import N_BINS, bin_index
from mhpo_core.telemetry.panels import CODES, SIDES, Block, Values

FINE, COARSE = 16, 20
"""Bits of a float32 that a bin leaves away: it is 1/128 or 1/8 of an octave wide. No value is further than 0.4 % or
6 % from the middle of its bin."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Layout(NamedTuple):
    """For every code: the middle of its bin (±Inf, NaN), and its bin of `histograms`."""

    middle: Floats
    coarse: Integers


@cache
def layout(shift: int) -> Layout:
    """The bins that leave away `shift` bits of a float32, by code, that is by the other bits."""
    first = np.arange(1 << (32 - shift), dtype=np.uint32) << np.uint32(shift)
    low, high = first.view(np.float32), (first | np.uint32((1 << shift) - 1)).view(np.float32)
    middle = np.where(np.isinf(low), low, (low.astype(np.float64) + high) / 2)
    return Layout(middle, bin_index(torch.from_numpy(np.nan_to_num(low, nan=0.0))).numpy())


@dataclass(frozen=True)
class Filled:
    """The filled bins of one quantity, those of NaN among them.

    Args:
        key: (K,) side · CODES + code.
        middle: (K,) middle of the bin, ±Inf and NaN for theirs.
        value: (K,) mean of the bin's tokens where that is known, else the middle.
        count: (K,) tokens.
        weight: (K,) sum of the tokens' weights.
        coarse: (K,) bin of `histograms`.
    """

    key: Integers
    middle: Floats
    value: Floats
    count: Integers
    weight: Floats
    coarse: Integers

    @cached_property
    def side(self) -> Integers:
        """(K,) 0 A > 0, 1 A < 0, 2 A = 0, 3 A is NaN."""
        return self.key // CODES

    @cached_property
    def numbers(self) -> Integers:
        """(4, 4): tokens of each side that are finite, +Inf, −Inf and NaN."""
        kind = np.select([np.isfinite(self.value), self.value == np.inf, self.value == -np.inf], [0, 1, 2], 3)
        found = np.bincount(self.side * 4 + kind, weights=self.count, minlength=SIDES * 4)
        return found.astype(np.int64).reshape(SIDES, 4)

    def binned(self, values: NDArray[Any]) -> Floats:
        """(4, N_BINS): sums of `values`, (K,), over the bins of `histograms`; NaN lies where `accumulate` puts it."""
        slot = np.where(np.isnan(self.middle), SIDES - 1, self.side) * N_BINS + self.coarse
        found = np.bincount(slot, weights=values, minlength=SIDES * N_BINS)
        return found.astype(np.float64, copy=False).reshape(SIDES, N_BINS)


class SideSums(NamedTuple):
    """Σx and Σx² of the finite tokens of each side, smallest and largest token with ±Inf kept, (4,) each.

    Σx² is only there where it was asked for. Without a token the extremes are +Inf and −Inf.
    """

    total: Floats
    squares: Floats
    low: Floats
    high: Floats


class Quantity:
    """Histogram, sums and extremes of one quantity, filled block by block.

    One addition per token serves count and weight: a token adds `unit` plus its weight, and all weights together stay
    below `unit`.

    Args:
        table: where to add; (n · CODES,) int64 or float64 with n sides, overwritten.
        shift: FINE or COARSE.
        unit: a power of two. With an int64 table the sums are exact; with a float64 one a bin of n tokens has its
            weight to within n²·unit·2⁻⁵³.
        refine_from: the bins of finite values at least as large as this get their mean instead of their middle.
    """

    def __init__(self, table: NDArray[Any], shift: int, unit: float, refine_from: float = np.inf) -> None:
        self.unit = unit
        self._added, self._shift, self._refine_from = table, shift, refine_from
        self._added[:] = 0
        self._far: list[tuple[Integers, Values]] = []
        self._rows: list[tuple[NDArray[Any], ...]] = []

    def add(self, block: Block, values: Values, packed: NDArray[Any]) -> None:
        """Add a block's trained tokens to the histogram, the sum and the extremes.

        Args:
            values: (R, C) float32 or float64, overwritten.
            packed: (R, C) `unit` plus the weight of each token, contiguous.
        """
        block.hide(values)
        total = _sums(values)
        self._rows.append((block.side, total, total, np.fmin.reduce(values, axis=1), np.fmax.reduce(values, axis=1)))
        self._count(block, values, packed, block.buffer("code", np.int32))

    def add_exactly(self, block: Block, values: Values, packed: NDArray[Any], code: NDArray[np.int32]) -> None:
        """`add` with the sum in float64, and the sum of squares.

        Args:
                code: (R, C) is overwritten with the place of each token's bin, CODES − 1 of its side where masked.
        """
        total, squares = _exact_sums(block.trained(values))
        block.hide(values)
        self._rows.append((block.side, total, squares, np.fmin.reduce(values, axis=1), np.fmax.reduce(values, axis=1)))
        self._count(block, values, packed, code)

    def _count(self, block: Block, values: Values, packed: NDArray[Any], code: NDArray[np.int32]) -> None:
        single = values.astype(np.float32, copy=False)
        np.right_shift(single.view(np.uint32), self._shift, out=code.view(np.uint32))
        flags = torch.from_numpy(code)
        torch.bitwise_or(flags, torch.from_numpy(block.side_code), out=flags)
        index = block.buffer("index", np.int64)
        np.copyto(index, code)
        # numpy's bincount takes twice as long: it looks for the largest index first
        added = torch.from_numpy(self._added)
        added.scatter_add_(0, torch.from_numpy(index.reshape(-1)), torch.from_numpy(packed.reshape(-1)))
        if self._refine_from < np.inf:
            low, high = self._rows[-1][3:]
            rows = np.flatnonzero(np.fmax(high, -low) >= self._refine_from)
            if len(rows):
                size = np.abs(values[rows])
                far = (size >= self._refine_from) & (size < np.inf)
                self._far.append((index[rows][far], values[rows][far]))

    def filled(self) -> Filled:
        """The bins that hold a token."""
        bins = layout(self._shift)
        # the last bin holds what is masked: NaN with all bits set, which no arithmetic makes
        by_side = self._added.reshape(-1, CODES)[:, : len(bins.middle) - 1]
        key = np.concatenate([side * CODES + np.flatnonzero(row != 0) for side, row in enumerate(by_side)])
        code = key % CODES
        count, weight = np.divmod(self._added[key], self.unit)
        middle = bins.middle[code]
        return Filled(
            key=key,
            middle=middle,
            value=self._refined(key, middle, count),
            count=count.astype(np.int64),
            weight=weight.astype(np.float64),
            coarse=bins.coarse[code],
        )

    def _refined(self, key: Integers, middle: Floats, count: NDArray[Any]) -> Floats:
        """Means of the bins far out, and the middles of the others."""
        if not self._far:
            return middle
        index, values = (np.concatenate(column) for column in zip(*self._far, strict=True))
        place = np.searchsorted(key, index)
        offset = np.bincount(place, weights=values - middle[place], minlength=len(key))
        return np.asarray(middle + offset / count)

    def by_side(self) -> SideSums:
        """Sums and extremes of the tokens of each side."""
        if not self._rows:
            return SideSums(np.zeros(SIDES), np.zeros(SIDES), np.full(SIDES, np.inf), np.full(SIDES, -np.inf))
        side, first, second, low, high = (np.concatenate(column) for column in zip(*self._rows, strict=True))
        here = [side == number for number in range(SIDES)]
        return SideSums(
            total=np.array([first[h].sum(dtype=np.float64) for h in here]),
            squares=np.array([second[h].sum(dtype=np.float64) for h in here]),
            low=np.array([np.fmin.reduce(low[h], initial=np.inf) for h in here], dtype=np.float64),
            high=np.array([np.fmax.reduce(high[h], initial=-np.inf) for h in here], dtype=np.float64),
        )


def _sums(hidden: Values) -> Floats:
    """(R,) sums of the finite values of each row."""
    total: Floats = torch.from_numpy(hidden).nansum(1).numpy()
    if not math.isfinite(total.sum()):
        total = total.astype(np.float64)
        for row in np.flatnonzero(~np.isfinite(total)):
            total[row] = hidden[row][np.isfinite(hidden[row])].sum(dtype=np.float64)
    return total


def _exact_sums(trained: Values) -> tuple[Floats, Floats]:
    """(R,) sums and sums of squares of the finite values of each row."""
    total, squares = trained.sum(axis=1, dtype=np.float64), np.vecdot(trained, trained)
    if not math.isfinite(total.sum() + squares.sum()):
        squares = squares.astype(np.float64)
        for row in np.flatnonzero(~np.isfinite(total) | ~np.isfinite(squares)):
            finite = trained[row][np.isfinite(trained[row])].astype(np.float64)
            total[row], squares[row] = finite.sum(), finite @ finite
    return total, squares


def quantiles(value: Floats, count: Integers, levels: Floats) -> Floats | None:
    """Quantiles with linear interpolation between the values at the two ranks around (n − 1)·level.

    Each of the two is off by as much as `value` is from the values in its bin. None where there is no token.

    Args:
        value: (K,) finite, ascending.
        count: (K,).
        levels: (Q,) in [0, 1].
    """
    last_place = np.cumsum(count) - 1
    if not len(count):
        return None
    place = levels * last_place[-1]
    below = np.floor(place)
    low, high = (value[np.searchsorted(last_place, where)] for where in (below, np.ceil(place)))
    return np.asarray(low + (place - below) * (high - low))
