"""open_run: a run as DuckDB views."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from collectors import layout
from collectors.console import Console
from collectors.encoding import read_rows, read_where
from collectors.events import read_event
from collectors.layout import EventFile, StepFile
from collectors.ranks import merge_ranks
from collectors.schema import TOKEN_SCHEMA
from collectors.storage import Storage, open_storage
from collectors.token_view import TokenView, pinned
from collectors.views import PUBLIC, SCHEMAS, base_view, public_views, read_parquet

_ATTEMPTS = 5  # at a consistent listing; the second one succeeds unless files were deleted by hand


@dataclass(frozen=True)
class RunFiles:
    """What is committed at one moment: relation of `views.SCHEMAS` → names of its files, and the steps of `rollup`."""

    rollup: tuple[StepFile, ...]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    steps: dict[str, tuple[StepFile, ...]] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    events: tuple[EventFile, ...] = ()


class Run:
    """A stored run, live or finished, as DuckDB views. Make one with `open_run`.

    The views are steps, steps_all, histograms, tokens, sequences, gradients, metrics, events, alarms, evaluations.
    NULL means not computed; NaN and ±Inf are stored as they are.

    Args:
        storage: where the run lies.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.manifest: dict[str, Any] = layout.read_manifest(storage)
        self.path: Path | str = storage.url if storage.local is None else storage.local
        self.connection = duckdb.connect(":memory:")
        self.files = RunFiles(())
        self._seen = False
        self._events: dict[str, bool] = {}  # name → its bytes are those that were written
        self._tokens: TokenView | None = None
        self.refresh()

    @property
    def damaged(self) -> tuple[str, ...]:
        """Files that are left out because their size is not the one they were written with; see `mhpo verify`."""
        return self.files.damaged

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """The query as a DuckDB relation over everything that is committed now."""
        self.refresh()
        try:
            return self.connection.sql(query)
        except duckdb.IOException:  # of a file that went since the listing
            self.refresh()
            return self.connection.sql(query)

    def refresh(self) -> bool:
        """Look for newly committed files; True if the views changed.

        Raises:
            FileNotFoundError, duckdb.IOException: files vanish faster than they are listed.
        """
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(FileNotFoundError, duckdb.IOException):
                return self._refresh()
        return self._refresh()

    def _refresh(self) -> bool:
        found = self._without_odd_events(list_run(self.storage))
        if self._seen and found == self.files:
            return False
        for name in SCHEMAS:
            self.connection.execute(base_view(name, self._source(name, found.names[name])))
        ranks = _several_ranks(found.rollup)
        if ranks:
            self.connection.register("merged_rollup", self._merged(found.rollup))
        for statement in public_views(self.manifest, attempts=_several_attempts(found.rollup), ranks=ranks):
            self.connection.execute(statement)
        self.files, self._seen = found, True
        return True

    def _without_odd_events(self, found: RunFiles) -> RunFiles:
        """An event is small enough to be checked before it is trusted, once."""
        for event in (e for e in found.events if e.name not in self._events):
            self._events[event.name] = read_event(self.storage, event) is not None
        odd = {e.name for e in found.events if not self._events[e.name]}
        if not odd:
            return found
        names = found.names | {
            table: tuple(n for n in found.names[table] if n not in odd) for table in ("raw_events", "raw_alarms")
        }
        return replace(found, names=names, damaged=tuple(sorted({*found.damaged, *odd})))

    def _source(self, name: str, files: tuple[str, ...]) -> str | None:
        if not files:
            return None
        if self.storage.local is not None:
            return read_parquet([self.storage.location(f) for f in files])
        self.connection.register(f"files_{name}", self._dataset(name, files))
        return f"files_{name}"

    def _dataset(self, name: str, files: tuple[str, ...]) -> Any:
        if not files:
            return SCHEMAS[name].empty_table()
        paths = [self.storage.location(f) for f in files]
        return pads.dataset(paths, schema=SCHEMAS[name], format="parquet", filesystem=self.storage.filesystem)

    def _merged(self, rollup: tuple[StepFile, ...]) -> pa.Table:
        rows = [read_rows(self.storage.read(f.name)) for f in rollup]
        return merge_ranks(pa.concat_tables(rows))

    def console(self, *, memory: str = "1GB", seconds: float = 60.0, threads: int = 2) -> Console:
        """A DuckDB for anything a user types: it can read the views of now, and nothing else, and write nothing."""
        self.refresh()
        sources = {f"files_{name}": self._dataset(name, files) for name, files in self.files.names.items()}
        views = [base_view(name, f"files_{name}") for name in SCHEMAS]
        ranks = _several_ranks(self.files.rollup)
        if ranks:
            sources["merged_rollup"] = self._merged(self.files.rollup)
        views += public_views(self.manifest, attempts=_several_attempts(self.files.rollup), ranks=ranks)
        return Console(sources, views, PUBLIC, memory=memory, seconds=seconds, threads=threads)

    def tokens_of(self, step: int, sequence_id: int | None = None) -> pa.Table:
        """The retained tokens of one step, or of one completion of it, opening only the files that hold the step.

        Returns:
            The columns of `tokens`, ordered by sequence and position.
        """
        self.refresh()
        if self._tokens is None:
            known = self.files.names["vocabulary"]
            self._tokens = TokenView(self.manifest, read_rows(self.storage.read(layout.VOCABULARY)) if known else None)
        attempt = self._latest_attempt(step)
        wanted = {"step": step} if sequence_id is None else {"step": step, "sequence_id": sequence_id}
        found = [TOKEN_SCHEMA.empty_table()]
        for name in ("raw_tokens", "ring_tokens", "pinned_tokens"):
            for file in self.files.steps[name]:
                if file.first <= step <= file.last and file.attempt == attempt:
                    rows = read_where(self.storage, file.name, wanted)
                    found.append(pinned(rows) if name == "pinned_tokens" else rows)
        return self._tokens.of(pa.concat_tables(found))

    def _latest_attempt(self, step: int) -> int:
        files = sorted((f for f in self.files.rollup if f.first <= step <= f.last), key=lambda f: -f.attempt)
        for file in files[:-1]:
            if len(read_where(self.storage, file.name, {"step": step}, ["step"])):
                return file.attempt
        return files[-1].attempt if files else 0

    def close(self) -> None:
        """Close the DuckDB connection."""
        self.connection.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def open_run(path: str | Path) -> Run:
    """Open a stored run, in a folder or in a bucket.

    Raises:
        StoreError: there is no run, or another version wrote it.
    """
    return Run(open_storage(path))


def list_run(storage: Storage) -> RunFiles:
    """Files of rollup, and of the other tables for the same steps and no later ones."""
    left = layout.list_left(storage)
    for _ in range(_ATTEMPTS):
        damaged: list[StepFile] = []
        rollup = layout.list_table(storage, layout.ROLLUP, damaged)
        steps = {t: layout.list_committed(storage, t, rollup, damaged) for t in (layout.TOKENS, layout.SEQUENCES)}
        committed = layout.Coverage(rollup)
        # a file that was sealed since rollup was listed also holds steps that the listing has not
        sealed = [f for files in steps.values() for f in files if f.first != f.last]
        if all(committed.holds(replace(f, first=f.last)) for f in sealed):
            break
    ring = {t: layout.list_ring(storage, t, rollup, left, damaged) for t in (layout.TOKENS, layout.SEQUENCES)}
    found = {
        "raw_rollup": rollup,
        "raw_tokens": steps[layout.TOKENS],
        "ring_tokens": ring[layout.TOKENS][layout.RING],
        "pinned_tokens": ring[layout.TOKENS][layout.PINNED],
        "raw_sequences": steps[layout.SEQUENCES],
        "raw_texts": [f for files in ring[layout.SEQUENCES].values() for f in files],
    }
    odd: list[layout.EventFile] = []
    names = {name: tuple(f.name for f in files) for name, files in found.items()}
    events = layout.list_events(storage, odd)
    alarms = layout.list_events(storage, odd, layout.ALARMS)
    names |= {"raw_events": tuple(e.name for e in events), "raw_alarms": tuple(e.name for e in alarms)}
    names["vocabulary"] = (layout.VOCABULARY,) if storage.exists(layout.VOCABULARY) else ()
    return RunFiles(
        tuple(rollup),
        names,
        {name: tuple(files) for name, files in found.items()},
        tuple(sorted({f.name for f in damaged} | {e.name for e in odd})),
        (*events, *alarms),
    )


def _several_ranks(rollup: tuple[StepFile, ...]) -> bool:
    return len({f.rank for f in rollup}) > 1


def _several_attempts(rollup: tuple[StepFile, ...]) -> bool:
    return len({f.attempt for f in rollup}) > 1
