"""Weights & Biases: the log of an offline run (run-ID.wandb), and CSV files that its web page exports.

The log holds messages; field numbers are those of Record, HistoryRecord and HistoryItem in wandb_internal.proto.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collectors.importers import leveldb, packed, wire
from collectors.importers.names import UNKNOWN
from collectors.importers.rows import STEP_KEYS, StepOf, joined, natural, wall_time
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import number, numbers, step_number
from mhpo_core.errors import StoreError

_START = b":W&B\xe1\xbe\x00"
_HISTORY = 2
_PLACES = ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb")
_EXTREMES = ("__MIN", "__MAX")
_BETWEEN = " - "


class Wandb:
    """One file is one run; a run that was resumed has several files of one name."""

    name = "wandb"
    title = "W&B offline run or exported CSV"
    framework = UNKNOWN

    def find(self, path: Path) -> list[Path]:
        """The file, or the logs in the folder, in its run folders, or in those of its folder wandb."""
        if path.is_file():
            return [path] if _is_log(path) or _columns(path) else []
        found = {
            file.resolve(): file for place in _PLACES for file in path.glob(place) if "latest-run" not in str(file)
        }
        return sorted((file for file in found.values() if file.is_file() and _is_log(file)), key=natural)

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """The steps of the history; a training step that was logged counts, W&B's own only without one.

        Raises:
            StoreError: the files are of several runs, or there is no step.
        """
        if len({file.name for file in files}) > 1:
            named = ", ".join(str(file) for file in files[:10])
            raise StoreError(f"import: {len(files)} W&B runs: {named}. Give the file of one of them.")
        count = 0
        for file in files:
            rows = _history(file, notes) if _is_log(file) else _exported(file, notes)
            for step in joined(rows, notes):
                count += 1
                yield step
        if not count:
            raise StoreError(f"import: {files[0]} holds no step of a history. Give a run that logged some.")


def _is_log(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_START)) == _START
    except OSError:
        return False


def _history(path: Path, notes: Notes) -> Iterator[ImportedStep]:
    step_of = StepOf()
    for index, record in enumerate(leveldb.records(path, len(_START), notes), 1):
        try:
            rows = [_row(history, notes) for history in wire.messages(record, _HISTORY)]
        except wire.WireError:
            notes.add("A record is damaged and is left out", f"record {index} of {path.name}")
            continue
        for row in rows:
            step = step_of(row)
            if step is None:
                notes.add("A row has no training step and is left out", f"record {index} of {path.name}")
                continue
            metrics = {n: value for n, value in row.items() if n not in STEP_KEYS and not n.startswith("_")}
            if metrics:
                yield ImportedStep(step, metrics, wall_time=wall_time(row)[1])


def _row(history: bytes, notes: Notes) -> dict[str, float]:
    """The numbers of one row of a history."""
    given: dict[str, Any] = {}
    media: set[str] = set()
    for field, _, value in wire.fields(history):
        if field == 1 and isinstance(value, bytes):
            name, found = _item(value, notes)
            given[name] = found
            if name.endswith("/_type") or (isinstance(found, dict) and "_type" in found):
                media.add(name.removesuffix("/_type"))
        elif field == 2 and isinstance(value, bytes):
            counts = [wire.signed(n) for inner, _, n in wire.fields(value) if inner == 1 and isinstance(n, int)]
            given.setdefault("_step", counts[-1] if counts else 0)
    return numbers({n: v for n, v in given.items() if not any(n == m or n.startswith(f"{m}/") for m in media)})


def _item(data: bytes, notes: Notes) -> tuple[str, Any]:
    keys: list[str] = []
    nested: list[str] = []
    text = "null"
    for field, _, value in wire.fields(data):
        if isinstance(value, bytes):
            if field == 1:
                keys.append(wire.text(value))
            elif field == 2:
                nested.append(wire.text(value))
            elif field == 16:
                text = wire.text(value)
    name = "/".join(nested or keys)
    try:
        return name, json.loads(text)
    except (ValueError, RecursionError):
        notes.add("A value is no JSON and is left out", name[:60])
        return name, None


def _columns(path: Path) -> tuple[str, list[str]] | None:
    """Delimiter and names of an exported CSV, None if the file is none."""
    return packed.header(packed.first_line(path), _is_export)


def _is_export(names: list[str]) -> bool:
    metrics = [name for name in names[1:] if _BETWEEN in name]
    extremes = [name for name in metrics if name.endswith(_EXTREMES)]
    return len(metrics) == len(names) - 1 and len(extremes) * 3 == len(metrics) * 2


def _exported(path: Path, notes: Notes) -> Iterator[ImportedStep]:
    found = _columns(path)
    if found is None:
        raise StoreError(
            f"import: {path} is no CSV that W&B exports. Export the chart again, or give the run-*.wandb file."
        )
    delimiter, names = found
    if names[0] not in STEP_KEYS:
        raise StoreError(
            f"import: {path} counts in {names[0][:60]!r}, allowed is Step. Set the x axis of the chart to Step."
        )
    wanted = {
        index: name.rsplit(_BETWEEN, 1) for index, name in enumerate(names[1:], 1) if not name.endswith(_EXTREMES)
    }
    runs = list(dict.fromkeys(run for run, _ in wanted.values()))
    if len(runs) > 1:
        named = ", ".join(repr(run[:60]) for run in runs[:10])
        raise StoreError(
            f"import: {path} holds {len(runs)} runs ({named}), allowed is one. Export the chart of one run."
        )
    metrics = {index: name for index, (_, name) in wanted.items() if not name.startswith("_")}
    for line, row in packed.csv_rows(path, delimiter, names, notes):
        step = step_number(row[0])
        if step is None:
            notes.add("A row has no step and is left out", f"row {line} of {path.name}")
            continue
        if _stands_for_several(row, names):
            notes.add(
                "A row stands for several steps; its mean is taken, minimum and maximum are left out", f"step {step}"
            )
        given = {name: value for index, name in metrics.items() if (value := number(row[index])) is not None}
        if given:
            yield ImportedStep(step, given)


def _stands_for_several(row: list[str], names: list[str]) -> bool:
    of = dict(zip(names, row, strict=True))
    return any(of[name] != of.get(name.removesuffix("__MIN") + "__MAX") for name in names if name.endswith("__MIN"))


FORMAT = Wandb()
