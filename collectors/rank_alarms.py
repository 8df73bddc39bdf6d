"""Alarms of a run of several ranks, while it is written: rank 0 reads the steps that all ranks have committed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from collectors import layout
from collectors.alarm_files import stored_ids
from collectors.alarms import COLUMNS, Summary, summary_of
from collectors.encoding import read_rows
from collectors.incidents import Incidents, tell
from collectors.ranks import merge_ranks
from collectors.retention import pin_ring
from collectors.storage import Storage
from mhpo_core.alarms import CRITICAL, Alarm, AlarmEngine, Settings

_LOG = logging.getLogger(__name__)
_SECONDS = 2.0
_WAIT_STEPS = 16
"""A step is judged without a rank that is so many steps behind."""


class RankAlarms:
    """A thread that follows a run of several ranks.

    What it judges is what readers see, so that `mhpo check` finds the same alarms. A step's evaluation is not stored
    with it, since no single rank has it.

    Args:
        keep: stores an alarm of an attempt.
        told: called with each alarm, in this thread.
        incidents: told of every evaluation, in this thread.
    """

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        updates_per_iteration: int,
        keep: Callable[[Alarm, int], None],
        told: Callable[[Alarm], None],
        incidents: Sequence[Incidents] = (),
    ) -> None:
        self._storage, self._settings, self._updates = storage, settings, updates_per_iteration
        self._keep, self._told, self._incidents = keep, told, incidents
        self._known = stored_ids(storage)
        self._warned = False
        self._begin(0)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mhpo-alarms", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; `finish` judges what is left."""
        self._ending.set()
        self._thread.join()

    def finish(self) -> None:
        """Judge what was committed since, in the thread that calls."""
        self._poll()

    def _begin(self, attempt: int) -> None:
        self._engine, self._last, self._attempt = AlarmEngine(self._settings, self._updates), -1, attempt
        for incidents in self._incidents:
            incidents.restart()

    def _follow(self) -> None:
        while not self._ending.wait(_SECONDS):
            self._poll()

    def _poll(self) -> None:
        try:
            for summary, attempt in self._new():
                self._last = summary.step
                found = self._engine.observe(summary.step, summary.scalars, summary.layers)
                past = all((alarm.id, attempt) in self._known for alarm in found.alarms)
                for alarm in found.alarms:
                    self._raise(alarm, attempt)
                for incidents in self._incidents:
                    incidents.observe(found, past=past)
        except FileNotFoundError:  # sealed since the listing; the next poll sees it elsewhere
            return
        except Exception:  # a run that nobody watches is better than a training that ends
            if not self._warned:
                self._warned = True
                _LOG.warning("Recorder: the run cannot be watched for alarms now; training goes on.", exc_info=True)

    def _raise(self, alarm: Alarm, attempt: int) -> None:
        if (alarm.id, attempt) in self._known:
            return
        self._known.add((alarm.id, attempt))
        self._keep(alarm, attempt)
        tell(self._told, alarm)
        if alarm.severity == CRITICAL:
            with contextlib.suppress(OSError):
                pin_ring(self._storage)

    def _new(self) -> Iterator[tuple[Summary, int]]:
        """Steps that all ranks have, or that a rank is too far behind for, and their attempts."""
        files = layout.list_table(self._storage, layout.ROLLUP)
        attempt = max((f.attempt for f in files), default=0)
        if attempt != self._attempt:  # rewound: some of the steps that were judged do not count any more
            self._begin(attempt)
        parts = [read_rows(self._storage.read(f.name)) for f in files if f.last > self._last]
        if not parts:
            return
        rows = pa.concat_tables(parts)
        rows = rows.filter(pc.greater(rows["step"], self._last))
        merged = {row["step"]: row for row in merge_ranks(rows).to_pylist()}  # ordered by attempt, so the latest wins
        found = zip(rows["step"].to_pylist(), rows["attempt"].to_pylist(), strict=True)
        ranks: dict[int, int] = {}
        for step, of in found:
            ranks[step] = ranks.get(step, 0) + (of == merged[step]["attempt"])
        newest = max(ranks, default=-1)
        for step in sorted(ranks):
            if ranks[step] < merged[step]["world_size"] and newest - step < _WAIT_STEPS:
                return
            yield summary_of({name: merged[step][name] for name in COLUMNS}), merged[step]["attempt"]
