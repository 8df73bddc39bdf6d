"""TRL and transformers: the log_history of trainer_state.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import head, numbers, step_number
from mhpo_core.errors import StoreError

_NAME = "trainer_state.json"
_LARGEST = 1 << 30
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class TrainerState:
    """`trainer_state.json`, or the folder of a training: every checkpoint has the history so far, the last one all."""

    name, title, framework = "trl-state", "TRL or transformers trainer_state.json", "trl"

    def find(self, path: Path) -> list[Path]:
        """The file, the one in the folder, or that of the newest checkpoint."""
        if path.is_file():
            return [path] if path.suffix == ".json" and '"log_history"' in head(path) else []
        if (path / _NAME).is_file():
            return [path / _NAME]
        found = [(int(m[1]), p / _NAME) for p in path.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(p.name))]
        return [file for _, file in sorted(found) if file.is_file()][-1:]

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """One step per number; what is logged of one step at several times is put together."""
        for file in files:
            history = [(_step_of(record, notes, file), record) for record in _history(file)]
            known = [(step, record) for step, record in history if step is not None]
            for step, records in groupby(known, key=lambda pair: pair[0]):
                metrics: dict[str, float] = {}
                for _, record in records:
                    metrics |= numbers({k: v for k, v in record.items() if k != "step"})
                yield ImportedStep(step, metrics)


def _history(file: Path) -> list[Any]:
    try:
        if file.stat().st_size > _LARGEST:
            raise StoreError(f"import: {file} is larger than 1 GB. Is it a trainer_state.json?")
        found = json.loads(file.read_bytes().decode("utf-8-sig", "replace"))
    except OSError as error:
        raise StoreError(f"import: {file} cannot be read ({error}). Check the path and its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"import: {file} is no whole JSON ({str(error)[:80]}). Take that of another checkpoint."
        ) from None
    history = found.get("log_history") if isinstance(found, dict) else None
    if not isinstance(history, list):
        raise StoreError(f"import: {file} has no list log_history. Give a trainer_state.json of transformers.")
    return history


def _step_of(record: Any, notes: Notes, file: Path) -> int | None:
    step = step_number(record.get("step")) if isinstance(record, dict) else None
    if step is None:
        notes.add("A record without a step number is left out", f"{str(record)[:60]} in {file.name}")
    return step


FORMAT = TrainerState()
