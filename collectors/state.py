"""What a run is doing: running, finished, stopped, failed or killed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from collectors import layout
from collectors.events import read_event
from collectors.layout import EventFile
from collectors.storage import Storage
from collectors.writers import has_writer

_STARTS, _ENDS = ("started", "resumed"), ("finished", "stopped", "failed")
_RANKS = re.compile(r"rank \d+ of (\d+)$")  # as Recorder says it when it starts
_LOOKED_AT = 16  # newest events, in case the very newest is damaged


@dataclass(frozen=True)
class RunState:
    """State of a run and the last thing that was said about it.

    Args:
        name: running; finished, stopped (on purpose, before its end), failed (an exception ended it), killed (the
            process died without a word). A run on a bucket is running until it says otherwise.
        detail: text of the last event, untrusted.
        phase: kind of the last event.
    """

    name: str
    detail: str
    phase: str


class StateReader:
    """Reads a run's state again and again; the event files only when there is a new one."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._stamp: int | None = None
        self._newest: list[EventFile] = []
        self._event: dict[str, Any] = {"kind": "", "detail": ""}
        self._known: dict[str, dict[str, Any] | None] = {}
        self._end = "killed"

    def read(self) -> RunState:
        """The state now. The lock is asked first, since a writer ends with an event and then lets go."""
        alive = has_writer(self._storage)
        self._read_events()
        kind, detail = str(self._event["kind"]), str(self._event["detail"])
        if alive is None:
            alive = self._end == "killed"
        return RunState("running" if alive else self._end, detail, kind)

    def _read_events(self) -> None:
        events = [e for e in layout.list_events(self._storage) if e.rank != layout.OUTSIDE]
        if events == self._newest:
            return
        self._newest = events
        self._event = next((e for f in reversed(events[-_LOOKED_AT:]) if (e := self._read(f))), self._event)
        self._end = self._how_it_ended(events)

    def _how_it_ended(self, events: list[EventFile]) -> str:
        """The worst that the last events of the ranks of the last launch tell."""
        last = {event.rank: event for event in events}
        # what ranks of an earlier, larger job said last does not count
        size = self._ranks_of_last_launch(events) if len(last) > 1 else math.inf
        found = [self._read(event) for rank, event in last.items() if rank < size]
        kinds = [str(row["kind"]) if row else "" for row in found]
        if not kinds or any(kind not in _ENDS for kind in kinds):
            return "killed"
        return next(end for end in ("failed", "stopped", "finished") if end in kinds)

    def _ranks_of_last_launch(self, events: list[EventFile]) -> int:
        for event in reversed(events):
            row = self._read(event)
            if row and row["kind"] in _STARTS:
                found = _RANKS.search(row["detail"])
                return int(found[1]) if found else 1
        return 1

    def _read(self, event: EventFile) -> dict[str, Any] | None:
        if event.name not in self._known:
            self._known[event.name] = read_event(self._storage, event)
        return self._known[event.name]


def run_state(storage: Storage) -> RunState:
    """State of a run that is looked at once."""
    return StateReader(storage).read()
