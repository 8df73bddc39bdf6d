"""What a format reads at a path."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest

from collectors import StoreError
from collectors.importers.steps import Format, ImportedStep, Notes

DATA = Path(__file__).parent / "data"


def read(form: Format, path: Path) -> tuple[list[ImportedStep], list[str]]:
    """Steps and notes of what the format finds there."""
    notes = Notes()
    files = form.find(path)
    assert files, f"{form.name} finds nothing at {path}"
    steps = list(form.steps(files, notes))
    return steps, list(notes)


def refused(form: Format, files: Iterable[Path], says: str) -> None:
    with pytest.raises(StoreError, match=says) as raised:
        list(form.steps(list(files), Notes()))
    told = str(raised.value)
    assert told.startswith("import: ") and "\n" not in told and told.endswith(".")


def same(found: dict[str, float], expected: dict[str, float]) -> bool:
    """Equal, NaN with NaN."""
    return found.keys() == expected.keys() and all(
        found[n] == v or (math.isnan(found[n]) and math.isnan(v)) for n, v in expected.items()
    )
