"""TensorBoard event files (events.out.tfevents.*) as steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from collectors.importers.names import UNKNOWN
from collectors.importers.rows import natural, side_by_side
from collectors.importers.steps import ImportedStep, Notes, SeveralRuns
from collectors.importers.tfevents import is_event_file, scalars
from mhpo_core.errors import StoreError

_PATTERN = "events.out.tfevents.*"
_DEPTH = 3


@dataclass
class _Pass:
    """What a file says until it says something again: step → its metrics."""

    steps: dict[int, ImportedStep] = field(default_factory=dict)

    def takes(self, step: int, tag: str) -> bool:
        return step not in self.steps or tag not in self.steps[step].metrics

    def add(self, step: int, tag: str, value: float, wall: float | None) -> None:
        found = self.steps.setdefault(step, ImportedStep(step, wall_time=wall))
        found.metrics[tag] = value

    def in_order(self) -> list[ImportedStep]:
        return [self.steps[step] for step in sorted(self.steps)]


class TensorBoard:
    """One folder is one run; its files are those of one writer that was restarted, or of several writers."""

    name = "tensorboard"
    title = "TensorBoard event files"
    framework = UNKNOWN

    def find(self, path: Path) -> list[Path]:
        """The file, or those in the folder, else those in the folders below it."""
        if path.is_file():
            return [path] if is_event_file(path) else []
        for depth in range(_DEPTH + 1):
            found = [file for file in path.glob("*/" * depth + _PATTERN) if file.is_file() and is_event_file(file)]
            if found:
                return sorted(found, key=natural)
        return []

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """The steps of each file in rising order; writers of different tags are merged by step.

        Memory holds the scalars of one file, or of one file of each writer.

        Raises:
            SeveralRuns: the files are of several runs.
            StoreError: one of them is no event file, or there is no scalar.
        """
        folders = dict.fromkeys(file.parent for file in files)
        if len(folders) > 1:
            named = ", ".join(str(folder) for folder in list(folders)[:10])
            raise SeveralRuns(f"import: event files of {len(folders)} runs: {named}. Give the folder of one of them.")
        writers = _writers(files) if len(files) > 1 else [files]
        count = 0
        for step in side_by_side([_in_turn(own, notes) for own in writers], notes):
            count += 1
            yield step
        if not count:
            raise StoreError(f"import: {files[0]} holds no scalar. Give the event file of a training that logs some.")


def _writers(files: list[Path]) -> list[list[Path]]:
    """Files that share a tag are of one writer, one after the other."""
    found: list[tuple[set[str], list[Path]]] = []
    for file in files:
        tags, own = {tag for _, tag, _, _ in scalars(file, Notes())}, [file]
        for other in [one for one in found if one[0] & tags]:
            found.remove(other)
            tags, own = tags | other[0], [*other[1], *own]
        found.append((tags, sorted(own, key=natural)))
    return [own for _, own in found]


def _in_turn(files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
    for file in files:
        current = _Pass()
        for step, tag, value, wall in scalars(file, notes):
            if not current.takes(step, tag):
                yield from current.in_order()
                current = _Pass()
            current.add(step, tag, value, wall)
        yield from current.in_order()


FORMAT = TensorBoard()
