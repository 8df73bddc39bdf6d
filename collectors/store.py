"""The writing side of a run folder: commit a step, seal many steps into one file, note events. No threads here."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from collectors import layout
from collectors.commit import remove_temporary_files, write_json, write_parquet
from collectors.lock import WriterLock
from collectors.schema import (
    EVENT_SCHEMA,
    TOKEN_DICTIONARY,
    TOKEN_ENCODINGS,
    VOCABULARY_SCHEMA,
    StepKey,
    utf8,
)
from mhpo_core.errors import StoreError

SEAL_AFTER_STEPS = 256
SEAL_AFTER_BYTES = 64 << 20
# A reader that listed a hot file before its steps were sealed still opens it this long afterwards.
GRACE_SECONDS = 60.0

_KEY_COLUMNS = ["step", "attempt", "rank"]
_WRITE_OPTIONS: dict[str, dict[str, Any]] = {
    layout.TOKENS: {"dictionary": TOKEN_DICTIONARY, "encodings": TOKEN_ENCODINGS},
    layout.SEQUENCES: {"dictionary": [*_KEY_COLUMNS, "group_id", "prompt"]},
    layout.ROLLUP: {"dictionary": _KEY_COLUMNS},
}


class StoreWriter:
    """Owns a run folder for as long as it lives.

    Args:
        run: the folder; created with its parents, or continued if it holds a run already.
        manifest: what run.json says; ignored when the run exists, so that a resumed run keeps its identity.
        vocabulary: token id → text; ignored when the run has one.
        fsync: reach the disk at every commit.

    Raises:
        StoreError: the folder cannot be created or written, holds something else, or another process writes it.
    """

    def __init__(
        self, run: Path, manifest: Mapping[str, Any], vocabulary: Mapping[int, str] | None = None, *, fsync: bool = True
    ) -> None:
        self.run = run
        self._fsync = fsync
        self._expired: deque[tuple[float, list[str]]] = deque()
        self._open: dict[str, _Segment] = {}
        try:
            self._create_folders()
            self._lock = WriterLock(run)
        except OSError as error:
            raise _cannot_be_written(run, error) from error
        try:
            self._begin(manifest, vocabulary)
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise _cannot_be_written(run, error) from error
            raise

    def _begin(self, manifest: Mapping[str, Any], vocabulary: Mapping[int, str] | None) -> None:
        self.resumed = layout.is_run(self.run)
        if self.resumed:
            _require_same_objective(self.run, layout.read_manifest(self.run), manifest)
        remove_temporary_files(self.run)
        if not self.resumed:
            self._write_manifest(manifest)
        if vocabulary is not None and not (self.run / layout.VOCABULARY).exists():
            self._write_vocabulary(vocabulary)
        self.last_step, self.attempt = self._last_committed()
        self.next_sequence_id = self._next_sequence_id()
        self._clean_up()

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        try:
            write_json(self.run / layout.MANIFEST, {**manifest, "schema_version": layout.SCHEMA_VERSION})
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"Recorder: config cannot be stored ({error}), allowed is what JSON can hold. "
                "Give texts, numbers, lists and mappings."
            ) from error

    def _create_folders(self) -> None:
        if self.run.is_dir() and not layout.is_run(self.run):
            # a writer that was killed at once can leave a temporary file and no run.json
            strangers = [p.name for p in self.run.iterdir() if p.name not in _OWN_NAMES and p.suffix != ".tmp"]
            if strangers:
                raise StoreError(
                    f"Recorder: {self.run} holds {strangers[0]!r} and is not a run, "
                    "allowed is a new, an empty or a run folder. Choose another name."
                )
        for table in layout.STEP_TABLES:
            for level in (layout.HOT, layout.SEALED):
                (self.run / table / level).mkdir(parents=True, exist_ok=True)
        (self.run / layout.EVENTS).mkdir(exist_ok=True)

    def _last_committed(self) -> tuple[int, int]:
        """Newest step of the newest attempt, and that attempt; what earlier attempts hold beyond it is given up."""
        files = layout.list_table(self.run, layout.ROLLUP)
        attempt, last = max(((f.attempt, f.last) for f in files), default=(0, -1))
        return last, attempt

    def _next_sequence_id(self) -> int:
        files = layout.list_table(self.run, layout.SEQUENCES)
        if not files:
            return 0
        newest = max(files, key=lambda f: (f.attempt, f.last)).path
        try:
            with pa.OSFile(newest) as file:
                rows = pq.read_table(file, columns=["sequence_id"])
        except pa.ArrowException as error:
            raise StoreError(f"Recorder: {newest} is damaged ({error}). Restore it from a copy of the run.") from error
        return int(max(rows["sequence_id"].to_pylist(), default=-1)) + 1

    def _clean_up(self) -> None:
        """Let go of what was sealed already, and of rows whose step was never committed."""
        committed = layout.Coverage(layout.list_table(self.run, layout.ROLLUP))
        for table in layout.STEP_TABLES:
            kept = {f.path for f in layout.list_table(self.run, table)}
            hot = layout.list_directory(self.run / table / layout.HOT)
            # a reader may be about to open the sealed ones; no reader looks at the uncommitted ones
            self._expire([f.path for f in hot if f.path not in kept])
            for file in hot:
                if file.path in kept and not committed.holds(file):
                    os.unlink(file.path)

    def _expire(self, paths: list[str]) -> None:
        self._expired.append((time.monotonic() + GRACE_SECONDS, paths))

    def commit_step(self, key: StepKey, tables: Mapping[str, pa.Table]) -> None:
        """Make one step visible: its tokens and sequences first, its rollup last."""
        name = layout.hot_name(key.step, key.attempt, key.rank)
        try:
            for table in layout.STEP_TABLES:
                if table in tables:
                    self._write(table, layout.HOT, name, tables[table])
        except BaseException:
            # otherwise a sealed file of its neighbours would later pass for the commit of this step
            for table in layout.STEP_TABLES:
                with contextlib.suppress(OSError):
                    os.unlink(self.run / table / layout.HOT / name)
            raise
        for table in layout.STEP_TABLES:
            if table in tables:
                self._buffer(table, key, tables[table])
        self._unlink_expired()

    def _write(self, table: str, level: str, name: str, rows: pa.Table) -> None:
        compression = "lz4" if level == layout.HOT else "zstd"
        path = self.run / table / level / name
        write_parquet(path, rows, fsync=self._fsync, compression=compression, **_WRITE_OPTIONS[table])

    def _buffer(self, table: str, key: StepKey, rows: pa.Table) -> None:
        segment = self._open.get(table)
        if segment and segment.attempt != key.attempt:
            self._seal(table)
            segment = None
        if segment is None:
            segment = self._open[table] = _Segment(key.attempt)
        segment.add(key, rows)
        if segment.is_full():
            self._seal(table)

    def _seal(self, table: str) -> None:
        segment = self._open.pop(table, None)
        if segment is None or len(segment.tables) < 2:
            return
        name = layout.sealed_name(segment.first, segment.last, segment.attempt)
        # where it fails the steps stay as they are, each in its own file
        with contextlib.suppress(OSError, pa.ArrowException):
            self._write(table, layout.SEALED, name, pa.concat_tables(segment.tables))
            self._expire([str(self.run / table / layout.HOT / n) for n in segment.names])

    def seal(self) -> None:
        """Seal what is open; called when the run ends."""
        # tokens and sequences before rollup, so that a sealed rollup never stands for steps without their rows
        for table in layout.STEP_TABLES:
            self._seal(table)

    def _unlink_expired(self) -> None:
        while self._expired and self._expired[0][0] < time.monotonic():
            for path in self._expired.popleft()[1]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def event(self, kind: str, detail: str) -> None:
        """Commit one event."""
        row = {"time": [time.time()], "kind": [utf8(kind)], "detail": [utf8(detail)]}
        rows = pa.table(row, schema=EVENT_SCHEMA)
        name = f"e{time.time_ns():020d}-{os.getpid()}.parquet"
        write_parquet(self.run / layout.EVENTS / name, rows, fsync=self._fsync)

    def _write_vocabulary(self, vocabulary: Mapping[int, str]) -> None:
        ids = sorted(vocabulary)
        texts = [utf8(vocabulary[i]) for i in ids]
        write_parquet(
            self.run / layout.VOCABULARY,
            pa.table({"token_id": ids, "token": texts}, schema=VOCABULARY_SCHEMA),
            fsync=self._fsync,
        )

    def close(self) -> None:
        """Give the folder back. Hot files that were sealed stay for the next writer: a reader may hold their names."""
        self._lock.release()


_OWN_NAMES = {*layout.STEP_TABLES, layout.EVENTS, layout.LOCK, layout.VOCABULARY, "checkpoint"}


def _cannot_be_written(run: Path, error: OSError) -> StoreError:
    return StoreError(
        f"Recorder: {run} cannot be written ({error.strerror or error}). "
        "Free space, fix its rights or choose another folder."
    )


def _require_same_objective(run: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """The stored hyperparameters explain every token of the run, so they cannot change on the way."""
    was, now = stored.get("objective") or {}, given.get("objective") or {}
    before, after = was.get("hyperparameters") or {}, now.get("hyperparameters") or {}
    changed = [f"{n} = {after[n]!r} for {before[n]!r}" for n in before.keys() & after.keys() if before[n] != after[n]]
    if was.get("name", now.get("name")) != now.get("name"):
        changed = [f"{now.get('name')} for {was.get('name')}"]
    if changed:
        raise StoreError(
            f"Recorder: {run} was recorded with another objective ({', '.join(sorted(changed))}), "
            "allowed is the same one. Record into another folder."
        )


class _Segment:
    """Steps of one attempt that wait to be written into one file."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.tables: list[pa.Table] = []
        self.names: list[str] = []
        self.first = self.last = -1
        self._bytes = 0

    def add(self, key: StepKey, rows: pa.Table) -> None:
        self.first = key.step if not self.tables else self.first
        self.last = key.step
        self.tables.append(rows)
        self.names.append(layout.hot_name(key.step, key.attempt, key.rank))
        self._bytes += rows.nbytes

    def is_full(self) -> bool:
        return len(self.tables) >= SEAL_AFTER_STEPS or self._bytes >= SEAL_AFTER_BYTES
