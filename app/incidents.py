"""The alarms of a run as pages show them, found over what is stored; live ones come out the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from app.evidence import with_evidence
from collectors.alarms import engine_for, summaries_of
from collectors.reader import Run, open_run
from mhpo_core.alarms import CRITICAL, Alarm
from mhpo_core.errors import StoreError

_KEPT = 8
_WITH_TOKENS = 20  # alarms whose tokens are looked up, the critical and earliest ones first


@dataclass(frozen=True)
class Incidents:
    """Alarms of one state of a run.

    Args:
        alarms: as `mhpo check --json` gives them, critical ones first, the earliest first among equals.
        missing: signal without data → how to have it.
        steps: that were judged.
        problem: why there is nothing, empty if nothing is wrong.
    """

    alarms: tuple[dict[str, Any], ...] = ()
    missing: dict[str, str] | None = None
    steps: int = 0
    problem: str = ""


class IncidentReader:
    """Alarms of runs; steps that were judged once are not judged again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: OrderedDict[Path, _Watched] = OrderedDict()

    def read(self, path: Path) -> Incidents:
        """The alarms of everything that is committed now."""
        try:
            with self._lock:
                if path not in self._watched:
                    self._watched[path] = _Watched(open_run(path))
                self._watched.move_to_end(path)
                while len(self._watched) > _KEPT:
                    self._watched.popitem(last=False)[1].close()
                watched = self._watched[path]
            return watched.read()
        except (StoreError, pa.ArrowException, duckdb.Error, OSError) as error:
            with self._lock:
                self._watched.pop(path, None)
            return Incidents(problem=str(error).splitlines()[0])

    def close(self) -> None:
        """Close every run."""
        with self._lock:
            while self._watched:
                self._watched.popitem()[1].close()


class _Watched:
    """One run, and how far it has been judged."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.Lock()  # a long run takes a while, and nobody who looks at another one waits for it
        self._begin()

    def close(self) -> None:
        """Close the run, once nobody reads it."""
        with self._lock:
            self.run.close()

    def _begin(self) -> None:
        self._engine, self._last, self._steps, self._attempt = engine_for(self.run), -1, 0, 0
        self._alarms: list[Alarm] = []
        self._told = Incidents(missing=self._engine.missing)

    def read(self) -> Incidents:
        """What is known now."""
        with self._lock:
            return self._read()

    def _read(self) -> Incidents:
        if not self.run.refresh() and self._steps:
            return self._told
        attempt = max((f.attempt for f in self.run.files.rollup), default=0)
        if attempt != self._attempt:  # rewound: some of the steps that were judged do not count any more
            self._begin()
            self._attempt = attempt
        for s in summaries_of(self.run, after=self._last):
            self._alarms += self._engine.observe(s.step, s.scalars, s.layers).alarms
            self._last, self._steps = s.step, self._steps + 1
        ranked = sorted(self._alarms, key=lambda a: (a.severity != CRITICAL, a.step))
        told = [with_evidence(self.run, a) for a in ranked[:_WITH_TOKENS]]
        told += [a.to_dict() for a in ranked[_WITH_TOKENS:]]
        self._told = Incidents(tuple(told), self._engine.missing, self._steps)
        return self._told
