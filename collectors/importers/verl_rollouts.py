"""verl's dumps of rollouts: trainer.rollout_data_dir/{step}.jsonl, one line per completion, text only."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from collectors.importers.dumps import groups, has_keys, known, number_in, numbered, rows_by_file
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import number, step_number
from mhpo_core.batch import Sequences

_NAME = r"([0-9]{1,18})\.jsonl"
_UID = re.compile(r"(.+)_[0-9]+_[0-9]+", re.DOTALL)
_OWN = ("input", "output", "score", "step")


class VerlRollouts:
    """One file per step."""

    name = "verl-rollouts"
    title = "verl rollouts (rollout_data_dir/{step}.jsonl)"
    framework = "verl"

    def find(self, path: Path) -> list[Path]:
        """The files by step, in the folder or in one below it whose name tells of rollouts, not of validation."""
        if path.is_file():
            return [path] if _is_dump(path) else []
        try:
            below = sorted(one for one in path.iterdir() if "rollout" in one.name.lower() and one.is_dir())
        except OSError:
            return []
        folders = [[file for file in numbered(one, _NAME) if file.is_file()] for one in (path, *below)]
        return next((files for files in folders if any(_is_dump(file) for file in files)), [])

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """One step per file; its number is that of its lines, else that of its name."""
        for file, rows in rows_by_file(files, notes):
            by_step: dict[int, list[dict[str, Any]]] = {}
            for row in rows:
                own = step_number(row.get("step"))
                step = own if own is not None else number_in(file.name, _NAME)
                if step is None:
                    notes.add("A line without a step is left out", file.name)
                else:
                    by_step.setdefault(step, []).append(row)
            for step, of_step in by_step.items():
                yield ImportedStep(step, sequences=_sequences(of_step))


def _sequences(rows: list[dict[str, Any]]) -> Sequences:
    return Sequences(
        reward=known([number(row.get("score")) for row in rows]),
        group_id=groups([_group(row) for row in rows]),
        prompt=known([_text(row.get("input")) for row in rows]),
        completion=known([_text(row.get("output")) for row in rows]),
        extra=[{name: value for name, value in row.items() if name not in _OWN} or None for row in rows],
    )


def _group(row: dict[str, Any]) -> Hashable:
    """The sample's part of `{sample}_{rollout}_{output}`, else the prompt."""
    match = _UID.fullmatch(str(row.get("uid", "")))
    return ("uid", match[1]) if match else ("input", _text(row.get("input")))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _is_dump(path: Path) -> bool:
    return path.is_file() and has_keys(path, "input", "output", "score")


FORMAT = VerlRollouts()
