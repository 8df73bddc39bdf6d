"""What was said about a run: started, resumed, rewound, dropped, pinned, finished, …"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pyarrow as pa

from collectors import layout
from collectors.encoding import encode, read_rows
from collectors.layout import EventFile, holds_its_bytes
from collectors.schema import EVENT_SCHEMA, utf8
from collectors.storage import Storage


def note(storage: Storage, kind: str, detail: str) -> None:
    """Note an event about a run that another process writes, or nobody any more.

    Raises:
        OSError: it cannot be written.
    """
    number = max((event.number for event in layout.list_events(storage)), default=-1) + 1
    row = {
        "number": [number], "rank": [layout.OUTSIDE], "time": [time.time()], "kind": [utf8(kind)],
        "detail": [utf8(detail)],
    }  # fmt: skip
    data = encode(pa.table(row, schema=EVENT_SCHEMA))
    storage.write(f"{layout.EVENTS}/{layout.event_name(number, layout.OUTSIDE, data)}", data, fsync=True)


def read_event(storage: Storage, event: EventFile) -> dict[str, Any] | None:
    """The event of a file; None where it is damaged or gone."""
    with contextlib.suppress(OSError, pa.ArrowException, IndexError):
        data = storage.read(event.name)
        if holds_its_bytes(event, data):
            row: dict[str, Any] = read_rows(data).to_pylist()[-1]
            return row
    return None
