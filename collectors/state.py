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


class StateReader:
    """Reads a run's state again and again; the event files only when there is a new one."""

    def __init__(self, run: Path, connection: duckdb.DuckDBPyConnection) -> None:
        self._run, self._connection = run, connection
        self._newest: list[str] = []
        self._event = ("", "")

    def read(self) -> RunState:
        """The state now. The lock is asked first, since a writer ends with an event and then lets go."""
        alive = has_writer(self._run)
        # two processes' clocks can disagree by more than their events are apart, so the names alone do not decide
        newest = sorted(str(p) for p in (self._run / layout.EVENTS).glob("e*.parquet"))[-4:]
        if newest != self._newest:
            self._event = self._read_newest(newest) if newest else ("", "")
            self._newest = newest
        kind, detail = self._event
        return RunState("running" if alive else _ENDS.get(kind, "killed"), detail, kind)

    def _read_newest(self, paths: list[str]) -> tuple[str, str]:
        query = f"SELECT kind, detail FROM {read_parquet(paths)} ORDER BY time DESC LIMIT 1"
        return self._connection.execute(query).fetchone() or ("", "")


def run_state(run: Path, connection: duckdb.DuckDBPyConnection) -> RunState:
    """State of a run that is looked at once."""
    return StateReader(run, connection).read()
