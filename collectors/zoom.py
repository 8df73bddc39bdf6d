"""Any zoom of a run from a bounded number of rows: coarser levels of `rollup` beside the raw one.

A level of 8, 64 or 512 has one row per so many neighbouring steps. Its files are written when a step has passed the end
of their window, and may be missing: readers then take the next finer level, down to the raw rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from collectors import layout
from collectors.bin_tables import bins_of_steps, bins_to_table
from collectors.bins import Bins, coarsen, concatenate, count_bins, drop_to
from collectors.rollup_files import BINS_PER_FILE, END, LEVELS, RAW, Listing, Part
from collectors.rollup_reader import Reader, Unreadable
from collectors.storage import Storage
from mhpo_core.metrics import METRICS

Write = Callable[[str, int, int, int, int, pa.Table], None]

LISTINGS = 5
"""Until one is read before its files are sealed and removed; the second one succeeds."""

_PARTS_AT_START = 40  # files or bundles of files; a run whose coarser levels are there needs 25
_STEPS_PER_BIN = 2  # a level whose bins hold fewer steps than that saves nothing


def read_range(
    storage: Storage, first: int, last: int, max_points: int = 2000, metrics: Sequence[str] | None = None
) -> Bins:
    """Steps first … last of a run's latest branch, in the narrowest bins of 1, 2, 4, … steps that are few enough.

    A step of an attempt counts unless a later attempt began at or before it. The numbers are those of all steps read at
    once, whichever coarser levels there are; the bins are wider only where raw rows were removed to save space.

    Args:
        max_points: most bins.
        metrics: names of METRICS; None = all.

    Raises:
        FileNotFoundError: files vanish faster than they are read.
        StoreError: there is no such metric.
    """
    reader = Reader(storage, list(METRICS) if metrics is None else metrics)
    return read_now(storage, reader, first, last, max_points)


def read_now(storage: Storage, reader: Reader, first: int, last: int, max_points: int) -> Bins:
    """What read_range returns, read by a reader that has remembered what is damaged."""
    for left in reversed(range(LISTINGS)):
        try:
            return read(Listing.of(storage), reader, first, last, max_points)
        except FileNotFoundError:
            if not left:
                raise
    raise AssertionError("unreachable")


def plan(listing: Listing, first: int, last: int, max_points: int, base: int = 1) -> tuple[int, list[Part]]:
    """Width of the bins and files to read, as far as the names tell: as if there were a step wherever one can be.

    Args:
        base: the width is base, 2·base, 4·base, …
    """
    lows, highs = listing.spans(first, last)
    width = base
    while count_bins(lows, highs, width) > max(1, max_points):
        width *= 2
    return _possible(listing, width, first, last)


def _possible(listing: Listing, width: int, first: int, last: int) -> tuple[int, list[Part]]:
    """Bins at least that wide, and as wide as what is left of the rows."""
    parts = listing.parts(width, first, last)
    while any(width % part.level for part in parts):
        width *= 2
        parts = listing.parts(width, first, last)
    return width, parts


def read(listing: Listing, reader: Reader, first: int, last: int, max_points: int, base: int = 1) -> Bins:
    """What read_range returns, of a listing; the narrowest bins of base, 2·base, 4·base, … steps.

    Raises:
        FileNotFoundError: a raw file is gone. List again.
    """
    while True:
        try:
            return _read_narrowest(listing, reader, first, last, max(1, max_points), base)
        except Unreadable as file:
            listing.drop(file.name)


def _read_narrowest(listing: Listing, reader: Reader, first: int, last: int, max_points: int, base: int) -> Bins:
    width, parts = plan(listing, first, last, max_points, base)
    while True:
        found = drop_to(_read_parts(reader, parts, width), max_points)
        # a file of many steps can hold them far apart, then the names promised more bins than there are
        if found.width > width or width == base or count_bins(found.first, found.last, width // 2) > max_points:
            return found
        width, parts = _possible(listing, _narrower(found, max_points, base), first, last)
        if width >= found.width:
            return found


def _narrower(bins: Bins, max_points: int, base: int) -> int:
    """A smaller width, of which as many bins as there can be are few enough."""
    width = bins.width // 2
    while width > base and np.minimum(bins.n_steps, 2 * bins.width // width).sum() <= max_points:
        width //= 2
    return width


def _read_parts(reader: Reader, parts: Sequence[Part], width: int) -> Bins:
    found = [Bins.empty(0, width, reader.metrics)]
    found += [coarsen(reader.bins(part), width) for part in parts]
    return concatenate(found)


class ZoomWriter:
    """Writes the coarser levels of one rank's rollup. Every committed step must be added, or none after it.

    Args:
        write: commits a file; gets its level (x8, x64, x512), the first and last step in it, attempt, rank and rows.
            What it raises passes through; that file is then missing, nothing else.
    """

    def __init__(self, attempt: int, rank: int, write: Write) -> None:
        self._rank, self._write = rank, write
        self._begin(attempt)

    def _begin(self, attempt: int) -> None:
        self._attempt, self._last = attempt, -1
        self._pending = {level: Bins.empty(0, level, list(METRICS)) for level in layout.ZOOM}
        self._from = dict.fromkeys(layout.ZOOM, 0)

    @classmethod
    def resume(cls, storage: Storage, attempt: int, rank: int, write: Write) -> ZoomWriter:
        """Go on where an earlier writer of the attempt stopped, with what is committed.

        Raises:
            FileNotFoundError: another process removes files.
        """
        writer, listing = cls(attempt, rank, write), Listing.of(storage)
        reader = Reader(storage, list(METRICS))
        while attempt in listing.branch:
            try:
                for level, begin, bins in _unwritten(listing, reader, attempt):
                    writer._from[level], writer._pending[level] = begin, bins
                break
            except Unreadable as file:
                listing.drop(file.name)
        writer._last = listing.newest(attempt)
        return writer

    def add(self, table: pa.Table) -> None:
        """Add committed rows of `rollup`, one per step, later than those before; earlier ones are known already.

        A new attempt begins afresh.
        """
        if not table.num_rows:
            return
        attempt = int(table["attempt"][0].as_py())
        if attempt != self._attempt:
            self._begin(attempt)
        self._add(bins_of_steps(table, list(METRICS)))

    def _add(self, steps: Bins) -> None:
        steps = steps.rows(slice(int(np.searchsorted(steps.first, self._last, "right")), None))
        if not steps.size:
            return
        self._last = int(steps.last[-1])
        closed = [window for level in layout.ZOOM for window in self._close(level, steps)]
        for bins in closed:
            if bins.n_steps.sum() >= _STEPS_PER_BIN * bins.size:
                name, first, last = layout.ZOOM[bins.width], int(bins.first[0]), int(bins.last[-1])
                self._write(name, first, last, self._attempt, self._rank, bins_to_table(bins))

    def _skip_to(self, step: int) -> None:
        """Write no window that begins before a step, since not all of it is known."""
        for level in layout.ZOOM:
            span = level * BINS_PER_FILE
            self._from[level] = max(self._from[level], -(-step // span) * span)
            self._pending[level] = Bins.empty(0, level, list(METRICS))

    def _close(self, level: int, steps: Bins) -> list[Bins]:
        """The windows that no further step can belong to."""
        steps = steps.rows(slice(int(np.searchsorted(steps.first, self._from[level])), None))
        bins = concatenate([self._pending[level], coarsen(steps, level)])
        if not bins.size:
            return []
        window = bins.first // (level * BINS_PER_FILE)
        starts = np.flatnonzero(np.diff(window, prepend=window[0] - 1))
        ends = [*starts[1:], bins.size]
        windows = [bins.rows(slice(a, b)) for a, b in zip(starts, ends, strict=True)]
        # a copy, or the whole array would stay in memory
        self._pending[level] = concatenate([Bins.empty(0, level, list(METRICS)), windows.pop()])
        return windows


def _unwritten(listing: Listing, reader: Reader, attempt: int) -> Iterator[tuple[int, int, Bins]]:
    """Level, step and the bins of an attempt from that step on, which no file of the level holds.

    The step is the end of the newest file; at most the window before the one of the last step is made up for, and none
    if that took long.
    """
    known, finer = END, Bins.empty(0, 1, reader.metrics)
    newest = listing.newest(attempt)
    for level in layout.ZOOM:
        span = level * BINS_PER_FILE
        begin = max([0, (newest // span - 1) * span, *listing.ends(level, attempt)])
        levels = [other for other in LEVELS if other < level]
        parts = list(listing.attempt_parts(attempt, begin, known, levels)) if begin < known else []
        if len(parts) > _PARTS_AT_START:
            begin, parts = (newest // span + 1) * span, []
        # where rows were removed, only files of this level or coarser ones are left
        bins = _read_parts(reader, [p for p in parts if p.level < level], level)
        later = finer.rows(slice(int(np.searchsorted(finer.first, begin)), None))
        finer, known = concatenate([bins, coarsen(later, level)]), begin
        yield level, begin, finer


def write_missing(storage: Storage, write: Write) -> None:
    """Write the coarser levels of a run, as far as its rows are there and its recorder did not: of an imported run, or
    of one whose steps come from several ranks. Nobody else may write the run.

    Args:
        write: see ZoomWriter.

    Raises:
        FileNotFoundError: another process removes files.
    """
    listing, reader = Listing.of(storage), Reader(storage, list(METRICS))
    for attempt in listing.branch:

        def write_new(level: str, first: int, last: int, attempt: int, rank: int, rows: pa.Table) -> None:
            width = next(w for w, name in layout.ZOOM.items() if name == level)
            span = width * BINS_PER_FILE
            if (first // span + 1) * span not in listing.ends(width, attempt):
                write(level, first, last, attempt, rank, rows)

        writer = ZoomWriter(attempt, 0, write_new)
        for part in listing.attempt_parts(attempt, 0, END, []):
            if part.level == RAW:
                writer._add(reader.bins(part))
            else:  # rows that were removed to save space
                writer._skip_to(part.hi)
