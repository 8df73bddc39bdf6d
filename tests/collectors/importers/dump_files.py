"""What the tests of readers of per-step dumps share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from collectors.importers.steps import Format, ImportedStep, Notes
from mhpo_core.errors import StoreError

DATA = Path(__file__).parent / "data"


def read(form: Format, path: Path) -> tuple[list[ImportedStep], list[str]]:
    files = form.find(path)
    assert files, f"{form.name} does not find {path}"
    notes = Notes()
    steps = list(form.steps(files, notes))
    return steps, list(notes)


def read_one(form: Format, path: Path) -> tuple[ImportedStep, list[str]]:
    steps, notes = read(form, path)
    assert len(steps) == 1
    return steps[0], notes


def refused(form: Format, files: list[Path], says: str) -> None:
    with pytest.raises(StoreError, match=says) as raised:
        list(form.steps(files, Notes()))
    assert str(raised.value).startswith("import: ") and "\n" not in str(raised.value)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + end, "utf-8")
    return path


def trained(step: ImportedStep, field: str) -> list[list[float]]:
    """Values of a field at the trained tokens of each sequence."""
    assert step.batch is not None
    values, mask = getattr(step.batch, field).numpy(), step.batch.mask.numpy()
    return [row[here].tolist() for row, here in zip(values, mask, strict=True)]


def single(values: list[list[float]]) -> list[list[float]]:
    """The same numbers with float32's precision."""
    return [np.asarray(row, np.float32).tolist() for row in values]
