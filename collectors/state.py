"""What a run is doing: running, finished, stopped, failed or killed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb

from collectors import layout
from collectors.lock import has_writer
from collectors.views import read_parquet

_ENDS = {"finished": "finished", "stopped": "stopped", "failed": "failed"}


@dataclass(frozen=True)
class RunState:
    """State of a run and the last thing that was said about it.

    Args:
        name: running; finished, stopped (on purpose, before its end), failed (an exception ended it), killed (the
            process died without a word).
        detail: text of the last event, untrusted.
        phase: kind of the last event.
    """

    name: str
    detail: str
    phase: str


def run_state(run: Path, connection: duckdb.DuckDBPyConnection) -> RunState:
    """State from the writer's lock and the newest event; the lock is asked first, since a writer ends with an event."""
    alive = has_writer(run)
    paths = sorted(str(p) for p in (run / layout.EVENTS).glob("e*.parquet"))
    if not paths:
        return RunState("running" if alive else "killed", "", "")
    newest = read_parquet(paths[-4:])
    row = connection.execute(f"SELECT kind, detail FROM {newest} ORDER BY time DESC LIMIT 1").fetchone()
    kind, detail = row or ("", "")
    if alive:
        return RunState("running", detail, kind)
    return RunState(_ENDS.get(kind, "killed"), detail, kind)
