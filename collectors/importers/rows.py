"""Rows of metrics: which of their numbers is the step, and which rows make one step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import number, step_number

STEP_KEYS = (
    "train/global_step", "training/global_step", "trainer/global_step", "global_step", "train/step", "step", "Step",
    "_step",
)  # fmt: skip
"""What counts optimizer steps, the surest first: the step of a logger counts its calls."""

_CLOCKS = ("wall_time", "Wall time", "_timestamp", "timestamp", "time")
_EPOCH = (1e9, 1e11)
"""Seconds since the epoch from 2001 on; what is outside is a duration, or counted in milliseconds."""


class StepOf:
    """The step of each row of one source.

    A source can count in two ways at once. Once both are known to differ, a row that has only the less sure one has no
    known step.
    """

    def __init__(self) -> None:
        self._best = len(STEP_KEYS)
        self._differ = False

    def __call__(self, row: Mapping[str, object]) -> int | None:
        """The step, None if it is not known."""
        told = [(rank, step_number(row[key])) for rank, key in enumerate(STEP_KEYS) if key in row]
        given = [(rank, step) for rank, step in told if step is not None]
        if not given:
            return None
        rank, step = given[0]
        self._differ |= any(other != step for _, other in given)
        if rank > self._best and self._differ:
            return None
        self._best = min(self._best, rank)
        return step


def wall_time(row: Mapping[str, object]) -> tuple[str | None, float | None]:
    """Name and value of what tells seconds since the epoch; None, None if nothing does."""
    for name in _CLOCKS:
        found = number(row[name]) if name in row else None
        if found is not None and _EPOCH[0] < found < _EPOCH[1]:
            return name, found
    return None, None


def joined(rows: Iterator[ImportedStep], notes: Notes) -> Iterator[ImportedStep]:
    """Neighbours of one step as one, if each has its own metrics and none contradicts the other.

    Loggers write the metrics of one step in several calls. A row with the same metrics again is another attempt.
    """
    last: ImportedStep | None = None
    for row in rows:
        if last is not None and last.step == row.step and _fit(last.metrics, row.metrics):
            last.metrics |= row.metrics
            last.wall_time = row.wall_time if last.wall_time is None else last.wall_time
            continue
        if last is not None:
            if last.step == row.step:
                notes.add(
                    "A step has several rows beside each other and each is kept as an attempt", f"step {row.step}"
                )
            yield last
        last = row
    if last is not None:
        yield last


def side_by_side(streams: list[Iterator[ImportedStep]], notes: Notes) -> Iterator[ImportedStep]:
    """Steps of several writers of one training, the lowest step first, those of one step as one."""

    def lowest_first() -> Iterator[ImportedStep]:
        heads = [(head, stream) for stream in streams if (head := next(stream, None)) is not None]
        while heads:
            lowest = min(head.step for head, _ in heads)
            yield from (head for head, _ in heads if head.step == lowest)
            following = [(head if head.step != lowest else next(stream, None), stream) for head, stream in heads]
            heads = [(head, stream) for head, stream in following if head is not None]

    return joined(lowest_first(), notes) if len(streams) > 1 else iter(streams[0])


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Key that sorts step_2 before step_10."""
    parts = re.split(r"([0-9]{1,18})", str(path))
    return [(0, int(part)) if index % 2 else (1, part) for index, part in enumerate(parts)]


def _fit(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    if first.keys() == second.keys():
        return False
    return all(_same(first[name], second[name]) for name in first.keys() & second.keys())


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)
