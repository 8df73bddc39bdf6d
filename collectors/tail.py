"""RunTail: follows a run step by step; a refresh costs the same after a million steps as after ten."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from collectors import layout
from collectors.bins import Bins, concatenate
from collectors.layout import StepFile
from collectors.rollup_files import END, RAW, Folder, Listing, Part, list_zoom, may_hide
from collectors.rollup_reader import Reader
from collectors.state import RunState, StateReader
from collectors.storage import LocalStorage, Storage
from collectors.window import StepSummary, Window
from collectors.zoom import LISTINGS, read, read_now

ALL_STEPS = "all"
RECENT = {"1000": 1000, "250": 250}
_MAX_BINS = 1200  # more columns than that cannot be told apart on a screen
_ALWAYS_READ = ("n_tokens", "recorder_ms", "dropped_tokens")
_REOPEN_AFTER_STEPS = 2048  # so many new ones are read faster from the coarser levels
_STEPS_OF_A_FILE = 256  # about, however far apart they are
_ZOOMS = 4
_WAIT_STEPS = 16  # a step is shown without a rank that is so many steps behind


class RunTail:
    """Everything the live page shows of one run, updated by `poll`. Safe to share between threads.

    It follows the latest branch: a step of an attempt counts unless a later attempt began at or before it. A step of
    several ranks is taken when all of them have written it.

    Args:
        run: the run folder, or where the run lies.
        metrics: names of METRICS to follow.

    Raises:
        StoreError: there is no run, or no such metric.
    """

    def __init__(self, run: Path | Storage, metrics: Sequence[str]) -> None:
        self.storage: Storage = LocalStorage(run) if isinstance(run, Path) else run
        self.manifest: dict[str, Any] = layout.read_manifest(self.storage)
        self.version = 0
        self.state = RunState("running", "", "")
        self._reader = Reader(self.storage, list(dict.fromkeys([*metrics, *_ALWAYS_READ])))
        self._lock = threading.RLock()
        self._states = StateReader(self.storage)
        self._hot, self._sealed = Folder(self.storage, layout.HOT), Folder(self.storage, layout.SEALED)
        self._running, self._unread = True, True
        self._reset()

    @property
    def name(self) -> str:
        """What the run is called: the last part of its path or URL."""
        return self.storage.local.name if self.storage.local else self.storage.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def damaged(self) -> list[str]:
        """Rollup files whose size or CRC-32 is not the one in their name; their steps are left out."""
        return sorted({*self._reader.damaged, *(f.name for f in self._truncated())})

    def _truncated(self) -> list[StepFile]:
        return [*self._hot.damaged, *self._sealed.damaged]

    def _reset(self) -> None:
        width = self._base()
        self.windows = {ALL_STEPS: Window(_MAX_BINS, self._reader.metrics, width=width)}
        for name, steps in RECENT.items():
            kept = min(_MAX_BINS, max(8, steps // width))
            self.windows[name] = Window(kept, self._reader.metrics, width=width, forget=True)
        # attempt and step up to which everything was read
        self._taken: tuple[int, int] | None = None
        self._until, self._incomplete = -1, -1
        self._zooms: OrderedDict[tuple[int, int, int], Window] = OrderedDict()
        self._ahead: list[StepFile] = []
        self.n_steps, self.n_tokens, self.dropped_tokens = 0, 0, 0
        self.last: StepSummary | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=64)

    def _base(self) -> int:
        return max(1, int(self.manifest.get("updates_per_iteration") or 1))

    def poll(self) -> bool:
        """Read what was committed since the last call; True if anything changed, the run's state included.

        Raises:
            OSError: files vanish or cannot be read; the next call makes up for it.
        """
        with self._lock:
            # the state first: of a run that has ended every step is there
            state = self._states.read()
            changed = self._poll_steps(state.name == "running")
            changed |= state != self.state
            self.state = state
            self.version += changed
            return changed

    def _poll_steps(self, running: bool) -> bool:
        for left in reversed(range(LISTINGS)):
            try:
                return self._poll_once(running)
            except FileNotFoundError:
                if not left:
                    raise
        raise AssertionError("unreachable")

    def _poll_once(self, running: bool) -> bool:
        truncated = {f.name for f in self._truncated()}
        # hot before sealed, so that a step which is moved between the two listings is not missed
        hot, sealed = self._hot.refresh(), self._sealed.refresh()
        if not (hot or sealed or self._unread or running != self._running):
            return False
        self._unread, self._running = True, running
        before = self._taken, self.n_steps
        healed = truncated & {f.name for f in (*self._hot.files, *self._sealed.files)}
        reopen = self._taken is None or bool(healed) or not self._follow(self._taken, sealed)
        if reopen:
            self._open()
        self._unread = False
        return (self._taken, self.n_steps) != before or (reopen and before[0] is not None)

    def _follow(self, taken: tuple[int, int], sealed: bool) -> bool:
        """Take the steps after those that were taken; False where that is not all, or not the fastest."""
        if sealed:
            self._ahead = self._sealed.files
        self._ahead = _later(self._ahead, taken)
        new = [*_later(self._hot.files, taken), *self._ahead]
        if may_hide(new, taken):
            self._hot.confirm()
            new = [*_later(self._hot.files, taken), *self._ahead]
        shown = -1 if self.last is None else self.last.step
        rewound = any(f.attempt > taken[0] and f.first <= shown for f in (*new, *self._truncated()))
        many = sum(min(f.last - f.first + 1, _STEPS_OF_A_FILE) for f in new) > _REOPEN_AFTER_STEPS
        if rewound or many or self._is_complete_now(taken[0]):
            return False
        if new:
            listing = Listing(layout.without_covered(new), {})
            attempt = max(listing.branch)
            end = self._end(attempt, new)
            parts = listing.parts(1, taken[1] + 1 if attempt == taken[0] else 0, END)
            cut = [replace(p, hi=min(p.hi, end)) if p.attempt == attempt else p for p in parts]
            # all of them are read before any is taken
            for steps in [self._reader.bins(part) for part in cut if part.lo < part.hi]:
                self._add(steps)
            self._taken = max(taken, (attempt, end - 1))
            begin = 0 if attempt == taken[0] else listing.branch[attempt][0]
            self._until = max(self._until, begin - 1, end - 1)
        return True

    def _end(self, attempt: int, files: Sequence[StepFile]) -> int:
        """The step after the last one of an attempt that can be taken; `files` are those not taken yet."""
        own = sorted((f for f in files if f.attempt == attempt), key=lambda f: (f.last, f.rank), reverse=True)
        if not own:
            return 0
        newest = _newest_of_ranks(own)
        all_there = min(newest.values()) if len(newest) >= self._reader.world_size(own) else -1
        steps = sorted({f.last for f in own})
        waited = steps[-1 - _WAIT_STEPS] if len(steps) > _WAIT_STEPS else -1
        last = max(all_there, waited) if self._running else own[0].last
        if last > all_there:
            self._incomplete = max(self._incomplete, last)
        return last + 1

    def _is_complete_now(self, attempt: int) -> bool:
        """True if steps were taken without some of their ranks, and these have come since."""
        if self._incomplete < 0:
            return False
        own = [f for f in (*self._hot.files, *self._sealed.files) if f.attempt == attempt]
        own.sort(key=lambda f: f.last, reverse=True)
        newest = _newest_of_ranks(own)
        return len(newest) >= self._reader.world_size(own) and min(newest.values()) >= self._incomplete

    def _open(self) -> None:
        """Read the run as it is now, whatever was read before."""
        self._reset()
        self._hot.confirm()
        raw = layout.without_covered([*self._hot.files, *self._sealed.files])
        listing = Listing(raw, list_zoom(self.storage), self._truncated())
        if not listing.branch:
            return
        attempt = max(listing.branch)
        end = self._end(attempt, raw)
        last = max(end, listing.branch[attempt][0]) - 1
        recent = self._newest_steps(listing, last)
        self._reader.known = recent
        try:
            everything = read(listing, self._reader, 0, last, _MAX_BINS, self._base())
        finally:
            self._reader.known = {}
        self.windows[ALL_STEPS].add(everything)
        self._count(everything)
        if recent:
            self._add_recent(concatenate(list(recent.values())))
        self._taken, self._until, self._ahead = (attempt, end - 1), last, self._sealed.files

    def _newest_steps(self, listing: Listing, last: int) -> dict[Part, Bins]:
        """Steps up to `last`, enough to fill the windows of the newest ones."""
        wanted = max(window.capacity for window in self.windows.values() if window.forgets)
        found: list[tuple[Part, Bins]] = []
        n_bins, earliest = 0, -1
        for part in reversed(listing.parts(1, 0, last)):
            if n_bins > wanted or part.level != RAW:
                break
            steps = self._reader.bins(part)
            found.append((part, steps))
            if steps.size:
                ids = np.unique(steps.first // self._base())
                n_bins += len(ids) - int(ids[-1] == earliest)
                earliest = int(ids[0])
        return dict(reversed(found))

    def _add(self, steps: Bins) -> None:
        if steps.size:
            self.windows[ALL_STEPS].add(steps)
            for (first, last, _), window in self._zooms.items():
                a, b = np.searchsorted(steps.first, [first, last + 1])
                window.add(steps.rows(slice(a, b)))
            self._count(steps)
            self._add_recent(steps)

    def _count(self, bins: Bins) -> None:
        total = dict(zip(bins.metrics.names, bins.metrics.total.sum(axis=0), strict=True))
        self.n_steps += int(bins.n_steps.sum())
        self.n_tokens += int(total["n_tokens"])
        self.dropped_tokens += int(total["dropped_tokens"])

    def _add_recent(self, steps: Bins) -> None:
        if not steps.size:
            return
        for name in RECENT:
            self.windows[name].add(steps)
        spent = steps.metrics.total[:, steps.metrics.names.index("recorder_ms")]
        self._recent.extend(zip(steps.wall_time[-64:].tolist(), spent[-64:].tolist(), strict=True))
        self.last = StepSummary.of(steps, steps.size - 1)

    def zoom(self, first: int, last: int, max_points: int = 2000) -> Window:
        """Steps first … last of those that were taken, in the narrowest bins of 1, 2, 4, … steps that are few enough.

        The last few ranges that were asked for are followed like the other windows.

        Raises:
            OSError: files vanish or cannot be read.
        """
        with self._lock:
            if self._taken is None:
                self.poll()
            asked = (first, last, max_points)
            if asked not in self._zooms:
                window = Window(max(1, max_points), self._reader.metrics)
                until = min(last, self._until)
                window.add(read_now(self.storage, self._reader, first, until, max_points))
                self._zooms[asked] = window
            self._zooms.move_to_end(asked)
            while len(self._zooms) > _ZOOMS:
                self._zooms.popitem(last=False)
            return self._zooms[asked]

    def recorder_share(self) -> float | None:
        """Recorder time of the training thread ÷ wall time, over the last steps; None before the second."""
        with self._lock:
            if len(self._recent) < 2:
                return None
            elapsed = self._recent[-1][0] - self._recent[0][0]
            spent = sum(ms for _, ms in list(self._recent)[1:]) / 1e3
            return spent / elapsed if elapsed > 0 else None

    def usual_pause(self) -> float | None:
        """Median time between the last steps, seconds; None before the second."""
        with self._lock:
            times = [t for t, _ in self._recent]
        return float(np.median(np.diff(times))) if len(times) > 1 else None

    def locked(self) -> threading.RLock:
        """The lock under which windows may be read while another thread polls."""
        return self._lock

    def close(self) -> None:
        """Nothing is held open between two polls; here so that a follower can be used like other readers."""


def _later(files: Sequence[StepFile], taken: tuple[int, int]) -> list[StepFile]:
    return [f for f in files if (f.attempt, f.last) > taken]


def _newest_of_ranks(files: Sequence[StepFile]) -> dict[int, int]:
    newest: dict[int, int] = {}
    for file in files:
        newest[file.rank] = max(file.last, newest.get(file.rank, -1))
    return newest
