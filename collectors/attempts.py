"""Which attempt a step belongs to. A step that is written again opens a new attempt; all ranks of a job agree on it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable

from collectors.layout import ATTEMPTS, StepFile
from collectors.storage import Storage

_MARK = re.compile(r"a(\d{3,9})\.s(\d{9,18})\.([0-9a-f]{12})\.json")


def begun(storage: Storage) -> list[tuple[int, int]]:
    """Attempts of a run, each with the step at which it began."""
    marks = (_MARK.fullmatch(name) for name in storage.list(ATTEMPTS))
    return [(int(mark[1]), int(mark[2])) for mark in marks if mark]


class Attempts:
    """Decides the attempt of the first step after a start, and of a step that does not rise.

    The first rank of a launch that needs a new attempt leaves a mark; the others of the same launch follow it. A rank
    that was restarted alone finds the mark of the launch and goes on beside the others.

    Args:
        rank: this writer's.
        launch: see WriterLock.
        committed: rollup files of all ranks, listed before anything of this launch was decided here.
    """

    def __init__(self, storage: Storage, rank: int, launch: str, committed: Iterable[StepFile]) -> None:
        self._storage = storage
        self._launch = hashlib.sha256(launch.encode()).hexdigest()[:12]
        self._rank = rank
        self._reached: dict[int, int] = {}
        self._own: dict[int, int] = {}
        for file in committed:
            self._reached[file.attempt] = max(self._reached.get(file.attempt, -1), file.last)
            if file.rank == rank:
                self._own[file.attempt] = max(self._own.get(file.attempt, -1), file.last)
        self.last = max(((a, s) for a, s in self._own.items()), default=(0, -1))

    def begin(self, step: int) -> int:
        """The attempt of a step that does not continue the one before; steps after it belong to the same attempt."""
        marks = [m for name in self._storage.list(ATTEMPTS) if (m := _MARK.fullmatch(name))]
        top = max([*self._reached, *(int(m[1]) for m in marks)], default=-1)
        ours = any(int(m[1]) == top and m[3] == self._launch for m in marks)
        if not ours or self._own.get(top, -1) >= step:
            top = max(0, top + (self._reached.get(top, -1) >= step))
            name = f"{ATTEMPTS}/a{top:03d}.s{step:09d}.{self._launch}.json"
            self._storage.create(name, json.dumps({"rank": self._rank, "step": step}).encode())
        self.saw(top, step)
        return top

    def saw(self, attempt: int, step: int) -> None:
        """Remember that this rank has handed over a step, whether or not it is written yet."""
        self._own[attempt] = max(self._own.get(attempt, -1), step)
        self._reached[attempt] = max(self._reached.get(attempt, -1), step)
