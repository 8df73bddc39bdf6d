"""Tables of metrics: a column that is the step, and columns of numbers, as CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from collectors.importers import packed
from collectors.importers.names import UNKNOWN
from collectors.importers.rows import STEP_KEYS, StepOf, joined, natural, side_by_side, wall_time
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import number, numbers, objects
from mhpo_core.errors import StoreError

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".ndjson.gz")
_STEMS = ("metrics", "history", "progress", "scalars")
"""In a folder, a table is one of metrics if its name says so: others hold a row per completion or per token."""
_BATCH = 1024
_UNKNOWN = ("", "null", "none", "na", "n/a", "<na>")
_TRUTH = {"true": 1.0, "false": 0.0}
_MAGIC = b"PAR1"


class Tables:
    """The fallback for whatever has a step in every row."""

    name = "tables"
    title = "table of metrics (CSV, JSON lines, Parquet)"
    framework = UNKNOWN

    def find(self, path: Path) -> list[Path]:
        """The file if it has a column for the step, or those in the folder that are named after metrics."""
        if path.is_file():
            return [path] if _has_steps(path) else []
        named = (
            f for f in path.glob("*") if f.name.endswith(_SUFFIXES) and any(stem in f.name.lower() for stem in _STEMS)
        )
        return sorted((file for file in named if file.is_file() and _has_steps(file)), key=natural)

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """One step per row; rows beside each other that complement one another are one. Several files go by step.

        Raises:
            StoreError: a file cannot be read, or no row has a step and a number.
        """
        count = 0
        for step in side_by_side([joined(_steps(file, notes), notes) for file in files], notes):
            count += 1
            yield step
        if not count:
            raise StoreError(
                f"import: {files[0]} holds no row with a step and a number, allowed is a table with a column step and "
                "columns of numbers. Check its header."
            )


def _has_steps(path: Path) -> bool:
    if _is_parquet(path):
        try:
            return any(key in pq.read_schema(path).names for key in STEP_KEYS)
        except (OSError, pa.ArrowException):
            return False
    line = packed.first_line(path)
    if line.lstrip().startswith("{"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return any(key in found for key in STEP_KEYS)
    return packed.header(line, _names_a_step) is not None


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def _names_a_step(names: list[str]) -> bool:
    return any(key in names for key in STEP_KEYS)


def _steps(path: Path, notes: Notes) -> Iterator[ImportedStep]:
    step_of = StepOf()
    for where, row in _rows(path, notes):
        step = step_of(row)
        if step is None:
            notes.add("A row has no step and is left out", f"{where} of {path.name}")
            continue
        clock, seconds = wall_time(row)
        taken = {clock, *STEP_KEYS}
        metrics = {name: value for name, value in row.items() if name not in taken and not name.startswith("_")}
        if metrics:
            yield ImportedStep(step, metrics, wall_time=seconds)
        else:
            notes.add("A row has no number but its step and is left out", f"{where} of {path.name}")


def _rows(path: Path, notes: Notes) -> Iterator[tuple[str, dict[str, float]]]:
    """Where a row is, and its numbers."""
    if _is_parquet(path):
        return _of_parquet(path, notes)
    found = packed.header(packed.first_line(path), _names_a_step)
    return _of_json(path, notes) if found is None else _of_csv(path, *found, notes)


def _of_json(path: Path, notes: Notes) -> Iterator[tuple[str, dict[str, float]]]:
    text = _Text(notes)
    for line, row in objects(path, notes, packed.lines):
        for name, value in row.items():
            if isinstance(value, str | list) and number(value) is None:
                text.add(name)
        yield f"line {line}", numbers(row)


def _of_csv(path: Path, delimiter: str, names: list[str], notes: Notes) -> Iterator[tuple[str, dict[str, float]]]:
    text = _Text(notes)
    for line, cells in packed.csv_rows(path, delimiter, names, notes):
        row: dict[str, float] = {}
        for name, cell in zip(names, cells, strict=True):
            value = _of_cell(cell, delimiter)
            if value is not None:
                row.setdefault(name, value)
            elif cell and cell.strip().lower() not in _UNKNOWN:
                text.add(name)
        yield f"row {line}", row


def _of_cell(cell: str, delimiter: str) -> float | None:
    if not cell:
        return None
    try:
        return float(cell)
    except ValueError:
        value = number(cell)
    if value is None and delimiter == ";" and cell.count(",") == 1:
        # where the comma is the decimal point, the semicolon separates
        value = number(cell.replace(",", "."))
    return _TRUTH.get(cell.strip().lower()) if value is None else value


def _of_parquet(path: Path, notes: Notes) -> Iterator[tuple[str, dict[str, float]]]:
    text, done = _Text(notes), 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            wanted = [field.name for field in schema if _holds_numbers(field.type)]
            for field in schema:
                if field.name not in wanted:
                    text.add(field.name)
            for batch in file.iter_batches(_BATCH, columns=wanted, use_threads=False):
                columns = [_floats(column) for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    done += 1
                    given: dict[str, Any] = dict(zip(batch.schema.names, cells, strict=True))
                    yield f"row {done}", {name: value for name, value in given.items() if value is not None}
    except (OSError, pa.ArrowException) as error:
        told = str(error).splitlines()[0][:200]
        raise StoreError(f"import: {path} is no whole Parquet file ({told}). Write it again, or give CSV.") from None


def _holds_numbers(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_integer(kind) or t.is_floating(kind) or t.is_boolean(kind) or t.is_decimal(kind))


def _floats(column: pa.Array) -> list[float | None]:
    return [None if value is None else float(value) for value in column.to_pylist()]


class _Text:
    """Columns that hold no numbers, each noted once."""

    def __init__(self, notes: Notes) -> None:
        self._notes, self._seen = notes, set[str]()

    def add(self, name: str) -> None:
        if name not in self._seen and len(self._seen) < 1000:
            self._seen.add(name)
            self._notes.add("A column holds what is no number, and that is left out", repr(name[:60]))


FORMAT = Tables()
