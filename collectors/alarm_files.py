"""Files of raised alarms, one each; named like events."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pyarrow as pa

from collectors import layout
from collectors.attempts import begun
from collectors.encoding import encode
from collectors.events import read_event
from collectors.schema import ALARM_SCHEMA, utf8
from collectors.storage import Storage
from mhpo_core.alarms import CRITICAL, WARNING, Alarm

_LOOKED_AT = 64  # newest alarms


def alarm_file(storage: Storage, alarm: Alarm, attempt: int, rank: int = 0) -> tuple[str, pa.Buffer]:
    """Name and bytes of an alarm's file."""
    listed = (layout.parse_event(n, layout.ALARMS) for n in storage.list(layout.ALARMS))
    number = max((found.number for found in listed if found), default=-1) + 1
    row = alarm.to_dict() | {
        "number": number, "attempt": attempt, "time": time.time(), "message": utf8(alarm.message),
        "evidence": json.dumps(_finite(alarm.evidence)),
    }  # fmt: skip
    data = encode(pa.Table.from_pylist([row], schema=ALARM_SCHEMA))
    return f"{layout.ALARMS}/{layout.event_name(number, rank, data)}", data


def stored_ids(storage: Storage) -> set[tuple[str, int]]:
    """Id and attempt of every stored alarm."""
    rows = (read_event(storage, file) for file in layout.list_events(storage, folder=layout.ALARMS))
    return {(row["id"], row["attempt"]) for row in rows if row is not None}


def newest_critical(storage: Storage) -> dict[str, Any] | None:
    """The newest critical alarm that is stored, its step, mode and message; None where there is none."""
    for file in reversed(layout.list_events(storage, folder=layout.ALARMS)[-_LOOKED_AT:]):
        row = read_event(storage, file)
        if row is not None and row["severity"] == CRITICAL:
            return row
    return None


class AlarmCounts:
    """Counts a run's alarms again and again; a file is read once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, tuple[str, int, int] | None] = {}

    def read(self) -> dict[str, int]:
        """Severity → number of alarms at steps that were not trained again since.

        Raises:
            OSError: the run cannot be listed.
        """
        later = begun(self._storage)
        counts = {CRITICAL: 0, WARNING: 0}
        for file in layout.list_events(self._storage, folder=layout.ALARMS):
            if file.name not in self._known:
                row = read_event(self._storage, file)
                self._known[file.name] = None if row is None else (row["severity"], row["step"], row["attempt"])
            found = self._known[file.name]
            if found and not any(attempt > found[2] and step <= found[1] for attempt, step in later):
                counts[found[0]] = counts.get(found[0], 0) + 1
        return counts


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
