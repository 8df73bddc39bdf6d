"""What was said about a run: started, resumed, rewound, dropped, pinned, finished, …"""

from __future__ import annotations

import contextlib
from typing import Any

import pyarrow as pa

from collectors.encoding import read_rows
from collectors.layout import EventFile, holds_its_bytes
from collectors.storage import Storage


def read_event(storage: Storage, event: EventFile) -> dict[str, Any] | None:
    """The event of a file; None where it is damaged or gone."""
    with contextlib.suppress(OSError, pa.ArrowException, IndexError):
        data = storage.read(event.name)
        if holds_its_bytes(event, data):
            row: dict[str, Any] = read_rows(data).to_pylist()[-1]
            return row
    return None
