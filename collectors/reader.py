"""open_run: a run folder as DuckDB views."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from collectors import layout
from collectors.layout import StepFile
from collectors.views import base_view, public_views

_ATTEMPTS = 5  # at a consistent listing; the second one succeeds unless files were deleted by hand


class Run:
    """A stored run, live or finished, as DuckDB views. Make one with `open_run`.

    The views are steps, steps_all, histograms, tokens, sequences, gradients, metrics, events. NULL means not
    computed; NaN and ±Inf are stored as they are.

    Args:
        path: the run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.manifest: dict[str, Any] = layout.read_manifest(self.path)
        self.connection = duckdb.connect(":memory:")
        self._seen: object = None
        self.refresh()

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """The query as a DuckDB relation over everything that is committed now."""
        self.refresh()
        return self.connection.sql(query)

    def refresh(self) -> bool:
        """Look for newly committed files; True if the views changed."""
        rollup, steps = self._list_steps()
        others = {layout.EVENTS: _parquet_files(self.path / layout.EVENTS), layout.VOCABULARY: self._vocabulary()}
        seen = (rollup, steps, others)
        if seen == self._seen:
            return False
        for name, table, paths in (
            ("raw_rollup", layout.ROLLUP, [f.path for f in rollup]),
            ("raw_tokens", layout.TOKENS, [f.path for f in steps[layout.TOKENS]]),
            ("raw_sequences", layout.SEQUENCES, [f.path for f in steps[layout.SEQUENCES]]),
            ("events", layout.EVENTS, others[layout.EVENTS]),
            ("vocabulary", layout.VOCABULARY, others[layout.VOCABULARY]),
        ):
            self.connection.execute(base_view(name, table, paths))
        for statement in public_views(self.manifest, rollup):
            self.connection.execute(statement)
        self._seen = seen
        return True

    def _list_steps(self) -> tuple[list[StepFile], dict[str, list[StepFile]]]:
        """Files of rollup, and of the other tables for the same steps and no later ones."""
        for _ in range(_ATTEMPTS):
            rollup = layout.list_table(self.path, layout.ROLLUP)
            steps = {t: layout.list_committed(self.path, t, rollup) for t in (layout.TOKENS, layout.SEQUENCES)}
            committed = layout.Coverage(rollup)
            # a file that was sealed since rollup was listed also holds steps that the listing has not
            sealed = [f for files in steps.values() for f in files if f.first != f.last]
            if all(committed.holds(replace(f, first=f.last)) for f in sealed):
                break
        return rollup, steps

    def _vocabulary(self) -> list[str]:
        path = self.path / layout.VOCABULARY
        return [str(path)] if path.is_file() else []

    def close(self) -> None:
        """Close the DuckDB connection."""
        self.connection.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def open_run(path: str | Path) -> Run:
    """Open a stored run.

    Raises:
        StoreError: the folder is not a run or was written by a newer version.
    """
    return Run(Path(path))


def _parquet_files(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(e.path for e in entries if e.name.endswith(".parquet"))
    except FileNotFoundError:
        return []
