"""Which rollup files hold which steps of a run's latest branch.

Raw files have one row per step and rank. A file of a coarser level has one row (bin) per 8, 64 or 512 neighbouring
steps and spans an aligned window of 256 of them; it is there only if every step of its attempt in that window is in it.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from collectors import layout
from collectors.bins import Counts
from collectors.layout import StepFile
from collectors.storage import Storage

RAW = 1
LEVELS = (512, 64, 8)
BINS_PER_FILE = 256
END = 2**62
"""Beyond every step."""

_FILES_AT_ONCE = 256

# A directory's time stamp has the resolution of a clock tick: a change within this many nanoseconds of the last
# listing may carry the same stamp.
_STAMP_RESOLUTION = 50_000_000


@dataclass(frozen=True)
class Part:
    """Steps lo … hi − 1 of an attempt, and the files of one level that hold them."""

    level: int
    attempt: int
    lo: int
    hi: int
    files: tuple[StepFile, ...]


class Listing:
    """The rollup files of a run at one moment.

    Args:
        raw: files of single steps and sealed ones, none of them covered by another one.
        zoom: files of each coarser level.
        unreadable: raw files that are known to be damaged; they still tell which steps there were.
    """

    def __init__(
        self, raw: Iterable[StepFile], zoom: Mapping[int, Iterable[StepFile]], unreadable: Iterable[StepFile] = ()
    ) -> None:
        self._raw = _by_attempt(raw)
        self._zoom = {level: _by_attempt(files) for level, files in zoom.items()}
        self._known = {a: _Known(files) for a, files in _by_attempt([*_flat(self._raw), *unreadable]).items()}
        self.branch = _branch([*_flat(self._raw), *unreadable, *(f for z in self._zoom.values() for f in _flat(z))])

    @classmethod
    def of(cls, storage: Storage) -> Listing:
        """What is committed now."""
        unreadable: list[StepFile] = []
        raw = layout.list_table(storage, layout.ROLLUP, unreadable)
        return cls(raw, list_zoom(storage), unreadable)

    def drop(self, name: str) -> None:
        """Take a file of a coarser level for missing."""
        for found in self._zoom.values():
            for attempt, files in found.items():
                found[attempt] = [f for f in files if f.name != name]

    def spans(self, first: int, last: int) -> tuple[Counts, Counts]:
        """First and last step of the raw files of the branch, cut to first … last, rising."""
        found: list[tuple[int, int]] = []
        for attempt in sorted(self.branch):
            lo, hi = self.interval(attempt, first, last)
            raw = self._raw.get(attempt, [])
            lead = [f for f in raw if f.rank == raw[0].rank]
            if lo < hi and (not lead or lead[0].first > lo):
                found.append((lo, min(hi, lead[0].first if lead else self._end_of(attempt)) - 1))
            found += [(max(f.first, lo), min(f.last, hi - 1)) for f in lead if f.last >= lo and f.first < hi]
        spans = np.array([s for s in found if s[0] <= s[1]], np.int64).reshape(-1, 2)
        return spans[:, 0], spans[:, 1]

    def _end_of(self, attempt: int) -> int:
        return 1 + max((f.last for z in self._zoom.values() for f in z.get(attempt, [])), default=-1)

    def newest(self, attempt: int) -> int:
        """Last raw step of an attempt, −1 if there is none."""
        return max((f.last for f in self._raw.get(attempt, [])), default=-1)

    def ends(self, level: int, attempt: int) -> list[int]:
        """First step after the window of each file of a coarser level."""
        span = level * BINS_PER_FILE
        return [(f.first // span + 1) * span for f in self._zoom.get(level, {}).get(attempt, [])]

    def interval(self, attempt: int, first: int, last: int) -> tuple[int, int]:
        """[lo, hi) of the steps first … last that belong to an attempt."""
        lo, hi = self.branch[attempt]
        return max(lo, first), min(hi, last + 1)

    def parts(self, width: int, first: int, last: int) -> list[Part]:
        """How to read steps first … last for bins of that width, from files as coarse as possible; steps rise."""
        levels = [level for level in LEVELS if width % level == 0]
        found: list[Part] = []
        for attempt in sorted(self.branch):
            found += self.attempt_parts(attempt, *self.interval(attempt, first, last), levels)
        return found

    def attempt_parts(self, attempt: int, lo: int, hi: int, levels: Sequence[int]) -> Iterator[Part]:
        """The same for steps lo … hi − 1 of one attempt; `levels` may be used, coarsest first."""
        if not levels:
            yield from self._raw_parts(attempt, lo, hi)
            return
        for file in self._zoom.get(levels[0], {}).get(attempt, []):
            a, b = _inside(file, levels[0], lo, hi)
            if a < b:
                yield from self.attempt_parts(attempt, lo, a, levels[1:])
                yield Part(levels[0], attempt, a, b, (file,))
                lo = b
        if lo < hi:
            yield from self.attempt_parts(attempt, lo, hi, levels[1:])

    def _raw_parts(self, attempt: int, lo: int, hi: int) -> Iterator[Part]:
        """Raw files; a coarser one where the rows were removed to save space."""
        known = self._known.get(attempt, _Known())
        for level in reversed(LEVELS):
            for file in self._zoom.get(level, {}).get(attempt, []):
                a, b = _inside(file, level, lo, hi)
                if a < b and known.lack(file, a, b):
                    yield from self._raw_parts(attempt, lo, a)
                    yield Part(level, attempt, a, b, (file,))
                    yield from self._raw_parts(attempt, b, hi)
                    return
        if lo < hi:
            yield from _groups(attempt, self._raw.get(attempt, []), lo, hi)


class Folder:
    """One level of raw files, listed anew only when its folder has changed.

    Args:
        files, damaged: whole files, and those whose size is not the one in their name.
    """

    def __init__(self, storage: Storage, level: str) -> None:
        self.files: list[StepFile] = []
        self.damaged: list[StepFile] = []
        self._storage, self._folder = storage, f"{layout.ROLLUP}/{level}"
        self._stamp: int | None = None
        self._trusted = False
        self._sizes: dict[str, int] = {}
        self._parsed: dict[str, StepFile | None] = {}

    def refresh(self) -> bool:
        """List if need be; True if there are other files than before."""
        stamp = self._storage.stamp(self._folder)
        if stamp is not None and stamp == self._stamp and self._trusted:
            return False
        # the content of a damaged file can be restored without a change of its folder
        settled = stamp is not None and time.time_ns() - stamp > _STAMP_RESOLUTION
        before = self._sizes
        self._list()
        self._stamp, self._trusted = stamp, settled and not self.damaged
        return before != self._sizes

    def confirm(self) -> None:
        """List again and keep what is complete: see layout.list_hot."""
        newest: dict[int, tuple[int, int]] = {}
        for file in self.files:
            newest[file.rank] = max(newest.get(file.rank, (-1, -1)), (file.attempt, file.last))
        self._list()
        self.files = [f for f in self.files if (f.attempt, f.last) <= newest.get(f.rank, (-1, -1))]

    def _list(self) -> None:
        self._sizes = self._storage.list(self._folder)
        known = self._parsed
        self._parsed = {n: known[n] if n in known else layout.parse_name(self._folder, n) for n in self._sizes}
        files = [(f, self._sizes[n]) for n, f in self._parsed.items() if f]
        self.files = [f for f, size in files if f.size == size]
        self.damaged = [f for f, size in files if f.size != size]


def may_hide(new: Sequence[StepFile], taken: tuple[int, int]) -> bool:
    """True unless the files follow what was taken without a gap: a listing can miss a file older than those it has.

    Args:
        taken: attempt and step.
    """
    reached: dict[int, int] = {}
    for file in sorted(new, key=lambda f: f.first):
        before = reached.get(file.rank, taken[1])
        if file.attempt != taken[0] or file.first > before + 1:
            return True
        reached[file.rank] = max(before, file.last)
    return False


def list_zoom(storage: Storage) -> dict[int, list[StepFile]]:
    """Files of each coarser level."""
    return {level: layout.list_level(storage, layout.ROLLUP, name) for level, name in layout.ZOOM.items()}


def _flat(found: Mapping[int, list[StepFile]]) -> list[StepFile]:
    return [file for files in found.values() for file in files]


def _by_attempt(files: Iterable[StepFile]) -> dict[int, list[StepFile]]:
    found: dict[int, list[StepFile]] = {}
    for file in sorted(files, key=lambda f: (f.rank, f.first, f.last)):
        found.setdefault(file.attempt, []).append(file)
    return found


def _branch(files: Iterable[StepFile]) -> dict[int, tuple[int, int]]:
    """Attempt → [lo, hi): its steps up to where a later attempt began, which gave up the rest."""
    first: dict[int, int] = {}
    for file in files:
        first[file.attempt] = min(file.first, first.get(file.attempt, file.first))
    end, found = END, {}
    for attempt in sorted(first, reverse=True):
        found[attempt] = (first[attempt], end)
        end = min(end, first[attempt])
    return found


class _Known:
    """Which steps of an attempt the raw files hold, whatever their rank."""

    def __init__(self, files: Iterable[StepFile] = ()) -> None:
        ordered = sorted(files)
        self._first = [f.first for f in ordered]
        self._last = list(accumulate((f.last for f in ordered), max))
        self._sealed_from = min((f.first for f in ordered if f"/{layout.SEALED}/" in f.name), default=END)

    def lack(self, zoomed: StepFile, a: int, b: int) -> bool:
        """True if raw rows of steps a … b − 1 were removed, some of which a coarser file has.

        The oldest rows go first, and sealed ones only.
        """
        until = min(b, self._sealed_from)
        if until <= max(a, zoomed.first):
            return False
        ends = [step for step in (zoomed.first, zoomed.last) if a <= step < until]
        return not all(self._hold(step, step) for step in ends) if ends else not self._hold(a, until - 1)

    def _hold(self, first: int, last: int) -> bool:
        """True if a file has steps of that range."""
        index = bisect_right(self._first, last) - 1
        return index >= 0 and first <= self._last[index]


def _inside(file: StepFile, level: int, lo: int, hi: int) -> tuple[int, int]:
    """[a, b) within [lo, hi): steps of the file's window whose bins are whole; a ≥ b if there are none."""
    span = BINS_PER_FILE * level
    start = file.first // span * span
    if file.last >= start + span:
        return 0, 0
    a = max(lo, start) if lo <= file.first else -(-lo // level) * level
    b = min(hi, start + span) if hi > file.last else hi // level * level
    return a, b


def _groups(attempt: int, files: list[StepFile], lo: int, hi: int) -> Iterator[Part]:
    """Files that are read together: a sealed one alone, single steps in bundles, each with those of the other ranks."""
    files = [f for f in files if f.last >= lo and f.first < hi]
    lead = [f for f in files if f.rank == files[0].rank]
    others = files[len(lead) :]
    bundles: list[list[StepFile]] = []
    for file in lead:
        single = file.first == file.last
        if single and bundles and bundles[-1][0].first == bundles[-1][0].last and len(bundles[-1]) < _FILES_AT_ONCE:
            bundles[-1].append(file)
        else:
            bundles.append([file])
    for place, bundle in enumerate(bundles):
        start, end = max(lo, bundle[0].first), min(hi, bundle[-1].last + 1)
        if others:
            start = lo if place == 0 else start
            end = hi if place == len(bundles) - 1 else bundles[place + 1][0].first
        beside = [f for f in others if f.last >= start and f.first < end]
        yield Part(RAW, attempt, start, end, (*bundle, *beside))
