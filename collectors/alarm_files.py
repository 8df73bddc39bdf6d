"""Files of raised alarms, one each; named like events."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pyarrow as pa

from collectors import layout
from collectors.encoding import encode
from collectors.events import read_event
from collectors.schema import ALARM_SCHEMA, utf8
from collectors.storage import Storage
from mhpo_core.alarms import CRITICAL, Alarm

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


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
