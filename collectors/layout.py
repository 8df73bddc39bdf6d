"""Names on disk. The names are the manifest: what is visible under its final name is committed.

    run.json                                            what the run is, written once
    rollup/hot/s000000123.a000.r000.parquet             one step: scalars, histograms, gradient norms, trainer metrics
    rollup/sealed/s000000000-000000255.a000.r000.parquet    many steps in one file
    tokens/…  sequences/…                               the same two levels
    events/e<time>-<pid>.parquet                        started, finished, …
    vocabulary.parquet                                  token_id → text
    writer.lock                                         held by the writing process for as long as it lives

A step is committed when its rollup file is visible; tokens and sequences of a step are written before it.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhpo_core.errors import StoreError

SCHEMA_VERSION = 2
MANIFEST, LOCK, VOCABULARY, EVENTS = "run.json", "writer.lock", "vocabulary.parquet", "events"
ROLLUP, TOKENS, SEQUENCES = "rollup", "tokens", "sequences"
STEP_TABLES = (TOKENS, SEQUENCES, ROLLUP)
"""In the order in which the files of one step are written."""

HOT, SEALED = "hot", "sealed"
_NAME = re.compile(r"s(\d{9,})(?:-(\d{9,}))?\.a(\d{3,})\.r(\d{3,})\.parquet")


@dataclass(frozen=True, order=True)
class StepFile:
    """A committed Parquet file that holds steps first … last of one attempt."""

    first: int
    last: int
    attempt: int
    rank: int
    path: str


def hot_name(step: int, attempt: int, rank: int = 0) -> str:
    """File name of a single step."""
    return f"s{step:09d}.a{attempt:03d}.r{rank:03d}.parquet"


def sealed_name(first: int, last: int, attempt: int, rank: int = 0) -> str:
    """File name of a range of steps of one attempt."""
    return f"s{first:09d}-{last:09d}.a{attempt:03d}.r{rank:03d}.parquet"


def parse_name(directory: str, name: str) -> StepFile | None:
    """The step file of that name, or None for anything else: temporary files, strangers."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    first, last, attempt, rank = found.groups()
    return StepFile(int(first), int(last or first), int(attempt), int(rank), os.path.join(directory, name))


def list_table(run: Path, table: str) -> list[StepFile]:
    """Committed files of a table, each step in exactly one of them, ordered by step.

    `hot` is listed before `sealed`, so that a step which is moved between the two listings is seen twice and never
    missed; the sealed copy then wins.
    """
    hot = list_hot(run / table / HOT)
    sealed = list_directory(run / table / SEALED)
    covered = Coverage(sealed)
    return sorted(sealed + [f for f in hot if not covered.holds(f)])


def list_committed(run: Path, table: str, rollup: list[StepFile]) -> list[StepFile]:
    """Files of a table whose steps are all committed, that is, are covered by the given rollup files."""
    committed = Coverage(rollup)
    # a sealed file is written only after every step in it was committed
    return [f for f in list_table(run, table) if f.first != f.last or committed.holds(f)]


class Coverage:
    """Which steps a set of files holds; files of one attempt never overlap."""

    def __init__(self, files: list[StepFile]) -> None:
        self._ranges: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for file in sorted(files):
            firsts, lasts = self._ranges.setdefault((file.attempt, file.rank), ([], []))
            firsts.append(file.first)
            lasts.append(file.last)

    def holds(self, file: StepFile) -> bool:
        """True if every step of the file is in the set."""
        firsts, lasts = self._ranges.get((file.attempt, file.rank), ([], []))
        index = bisect_right(firsts, file.first) - 1
        return index >= 0 and file.last <= lasts[index]


def list_hot(directory: Path) -> list[StepFile]:
    """Single steps up to one moment, none missing.

    A folder that changes while it is read can show a step and hide the one committed just before it. Whatever a first
    reading has shown is complete in a second one, up to its newest step.
    """
    newest = max(((f.attempt, f.first) for f in list_directory(directory)), default=(-1, -1))
    return [f for f in list_directory(directory) if (f.attempt, f.first) <= newest]


def list_directory(directory: Path) -> list[StepFile]:
    """Step files under their final names in one folder, in no order."""
    try:
        with os.scandir(directory) as entries:
            return [f for e in entries if (f := parse_name(str(directory), e.name))]
    except FileNotFoundError:
        return []


def is_run(path: Path) -> bool:
    """True if the folder holds a run."""
    return (path / MANIFEST).is_file()


def read_manifest(run: Path) -> dict[str, Any]:
    """The contents of run.json.

    Raises:
        StoreError: the folder is not a run, its run.json is damaged, or another version of mhpo wrote it.
    """
    path = run / MANIFEST
    try:
        str(run).encode()
    except UnicodeEncodeError:
        raise StoreError(
            f"open_run: {str(run)!r} is not UTF-8, DuckDB cannot open its files. Rename the folder."
        ) from None
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"open_run: {run} is not a run folder, it has no {MANIFEST}. "
            "Give the folder of one run; `mhpo runs FOLDER` lists them."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise StoreError(f"open_run: {path} cannot be read ({error}). Restore it from a copy of the run.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema_version"), int):
        raise StoreError(f"open_run: {path} has no schema_version. Restore it from a copy of the run.")
    if not isinstance(manifest.get("objective") or {}, dict):
        raise StoreError(f"open_run: objective in {path} is not a mapping. Restore it from a copy of the run.")
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise StoreError(
            f"open_run: {run} has schema version {manifest['schema_version']}, this program reads up to "
            f"{SCHEMA_VERSION}. Open it with a newer version of mhpo."
        )
    if manifest["schema_version"] < SCHEMA_VERSION:
        raise StoreError(
            f"open_run: {run} has schema version {manifest['schema_version']}, of a version of mhpo that was never "
            f"released; this program reads {SCHEMA_VERSION}. Record it again."
        )
    return manifest
