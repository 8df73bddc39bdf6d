"""verl's file logger (`trainer.logger=["file"]`): JSON lines {"step": N, "data": {…}}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from collectors.importers.rows import joined, natural, wall_time
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import first_object, numbers, objects, step_number
from mhpo_core.errors import StoreError


class VerlFile:
    """One file is one experiment; verl puts it at <root>/<project>/<experiment>.jsonl."""

    name = "verl-file"
    title = "verl file logger (JSON lines of step and data)"
    framework = "verl"

    def find(self, path: Path) -> list[Path]:
        """The file, or those in the folder and in the folders in it."""
        if path.is_file():
            return [path] if _is_ours(path) else []
        found = [*path.glob("*.jsonl"), *path.glob("*/*.jsonl")]
        return sorted((file for file in found if file.is_file() and _is_ours(file)), key=natural)

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """One step per number; lines of one step that hold different metrics are one.

        Raises:
            StoreError: the files are of several experiments, or hold no step.
        """
        if len(files) > 1:
            named = ", ".join(str(file) for file in files[:10])
            raise StoreError(f"import: {len(files)} experiments of verl: {named}. Give the file of one of them.")
        count = 0
        for step in joined(_rows(files[0], notes), notes):
            count += 1
            yield step
        if not count:
            raise StoreError(f'import: {files[0]} holds no line {{"step": N, "data": {{…}}}}. Give a log of verl.')


def _is_ours(path: Path) -> bool:
    first = first_object(path)
    return "step" in first and isinstance(first.get("data"), dict)


def _rows(path: Path, notes: Notes) -> Iterator[ImportedStep]:
    for line, row in objects(path, notes):
        step, data = step_number(row.get("step")), row.get("data")
        where = f"line {line} of {path.name}"
        if step is None:
            notes.add("A line has no step number and is left out", where)
        elif not isinstance(data, dict):
            notes.add("A line has no data and is left out", where)
        else:
            yield ImportedStep(step, numbers(data), wall_time=wall_time(row)[1])


FORMAT = VerlFile()
