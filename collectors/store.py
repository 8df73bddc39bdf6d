"""The writing side of a run: commit a step, seal many steps into one file, note events. No threads here."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from collectors import layout
from collectors.alarm_files import alarm_file
from collectors.attempts import Attempts
from collectors.creation import adopt_settings, create_run, remove_temporary_files
from collectors.encoding import encode, read_rows
from collectors.events import read_event
from collectors.integrity import is_intact
from collectors.policy import TokenPolicy
from collectors.retention import Retention
from collectors.schema import EVENT_SCHEMA, StepKey, utf8
from collectors.storage import Storage
from collectors.writers import WriterLock
from collectors.zoom import ZoomWriter
from mhpo_core.alarms import Alarm
from mhpo_core.errors import StoreError

SEAL_AFTER_STEPS = 256
SEAL_AFTER_BYTES = 64 << 20
# A reader that listed a hot file before its steps were sealed still opens it this long afterwards.
GRACE_SECONDS = 60.0

EVERY_STEP, WHEN_SEALED, NEVER = "step", "seal", "never"
FSYNC = (EVERY_STEP, WHEN_SEALED, NEVER)
ENDS = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Rows:
    """Rows of one table on one level, to be written as one file of the step."""

    table: str
    level: str
    rows: pa.Table


class StoreWriter:
    """Owns one rank of a run for as long as it lives.

    Args:
        manifest: what run.json says; ignored when the run exists, so that a resumed run keeps its identity.
        rank, world_size: of this writer.
        what: the token policy.
        vocabulary: token id → text; ignored when the run has one.
        limit: bytes that this rank may use; None = no limit.
        fsync: "step" (every commit survives a power cut), "seal" (sealed files do), "never" (a killed process loses
            nothing, a power cut may).
        launch: see WriterLock.
        by_segment: write no file of a single step, so that steps are committed when their segment is.

    Raises:
        StoreError: the place cannot be created or written, holds something else, or the rank has another live writer.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Mapping[str, Any],
        *,
        what: TokenPolicy,
        rank: int = 0,
        world_size: int = 1,
        vocabulary: Mapping[int, str] | None = None,
        limit: int | None = None,
        fsync: str = EVERY_STEP,
        launch: str | None = None,
        by_segment: bool = False,
    ) -> None:
        self._by_segment = by_segment
        self.storage, self.rank, self.world_size = storage, rank, world_size
        self._fsync = fsync
        self._expired: deque[tuple[float, list[str]]] = deque()
        self._open: dict[str, _Segment] = {}
        self.retention = Retention(storage, rank, limit, what, self.event, lambda: GRACE_SECONDS)
        self._seal_bytes = min(SEAL_AFTER_BYTES, SEAL_AFTER_BYTES if limit is None else limit // 40)
        try:
            self.resumed, self.manifest = create_run(storage, manifest, vocabulary, fsync=fsync != NEVER)
            self._lock = WriterLock(storage, rank, world_size, launch)
        except OSError as error:
            raise _cannot_be_written(storage, error) from error
        try:
            if rank == 0:
                self.manifest = adopt_settings(storage, self.manifest, manifest)
            self._begin()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise _cannot_be_written(storage, error) from error
            raise

    def _begin(self) -> None:
        remove_temporary_files(self.storage, self.rank, self.world_size)
        committed = layout.list_table(self.storage, layout.ROLLUP)
        self._numbers = self._next_number()
        self._last_time = self._last_event_time()
        self.attempts = Attempts(self.storage, self.rank, self._lock.launch, committed)
        self.last_attempt, self.last_step = self.attempts.last
        own = [f for f in committed if f.rank == self.rank]
        self.next_sequence_id = self._next_sequence_id()
        self._clean_up(own)
        self.retention.begin(self._own_files())
        self._zoom: ZoomWriter | None = None
        if self.world_size == 1:
            # while another process compacts the run its files go; the coarser levels may then be missing
            with contextlib.suppress(FileNotFoundError):
                self._zoom = ZoomWriter.resume(self.storage, self.last_attempt, self.rank, self._write_zoom)

    def _own_files(self) -> Iterable[tuple[str, int]]:
        """What counts towards this rank's share of the limit; rank 0 answers for what the ranks have in common."""
        for table, levels in layout.LEVELS.items():
            for level in levels:
                for file in layout.list_level(self.storage, table, level):
                    if file.rank == self.rank:
                        yield file.name, file.size
        for folder in (layout.EVENTS, layout.ALARMS):
            for event in layout.list_events(self.storage, folder=folder):
                if event.rank == self.rank:
                    yield event.name, event.size
        if self.rank == 0:
            yield from ((n, s) for n, s in self.storage.list("").items() if n in (layout.MANIFEST, layout.VOCABULARY))
            for folder in (layout.ATTEMPTS, layout.WRITERS):
                yield from ((f"{folder}/{n}", size) for n, size in self.storage.list(folder).items())

    def _next_sequence_id(self) -> int:
        files = [f for f in layout.list_table(self.storage, layout.SEQUENCES) if f.rank == self.rank]
        first = self.rank << 40  # ids of different ranks differ
        for file in sorted(files, key=lambda f: (f.attempt, f.last), reverse=True):
            try:
                ids = read_rows(self.storage.read(file.name), ["sequence_id"])["sequence_id"].to_pylist()
                return int(max([first - 1, *(i for i in ids if i is not None)])) + 1
            except FileNotFoundError:  # compacted by another process; the file before would give ids a second time
                return self._next_sequence_id()
            except (pa.ArrowException, OSError):  # a damaged file is the reader's to report
                continue
        return first

    def _clean_up(self, committed: list[layout.StepFile]) -> None:
        """Let go of what was sealed already, and of rows whose step was never committed."""
        covered = layout.Coverage(committed)
        for table in layout.STEP_TABLES:
            kept = {f.name for f in layout.list_table(self.storage, table)}
            for level in (layout.HOT, layout.RING):
                for file in layout.list_level(self.storage, table, level):
                    if file.rank != self.rank:
                        continue
                    if level == layout.HOT and file.name not in kept:
                        # a reader may be about to open it
                        self._expire([file.name])
                    elif not covered.holds(file):
                        self.storage.delete(file.name)
            for base in self.storage.list(f"{table}/{layout.LEFT}"):
                left = layout.parse_name(f"{table}/{layout.RING}", base)
                if left and left.rank == self.rank:
                    self.storage.delete(left.name)
                    self.storage.delete(f"{table}/{layout.LEFT}/{base}")

    def seal_what_a_dead_writer_left(self) -> None:
        """Merge the single steps of earlier writers: nobody else would, and only what is sealed can be thinned."""
        rollup = layout.list_table(self.storage, layout.ROLLUP)
        for table in layout.STEP_TABLES:
            files = rollup if table == layout.ROLLUP else layout.list_committed(self.storage, table, rollup)
            for group in self._neighbours([f for f in files if f.rank == self.rank]):
                rows = pa.concat_tables([read_rows(self.storage.read(f.name)) for f in group])
                self._write_range(table, layout.SEALED, group[0].first, group[-1].last, group[0].attempt, rows)
                self._expire([f.name for f in group])

    def _neighbours(self, files: list[layout.StepFile]) -> Iterator[list[layout.StepFile]]:
        """Single steps with nothing sealed and nothing damaged between them, as many as a segment holds."""
        group: list[layout.StepFile] = []
        for file in sorted(files, key=lambda f: (f.attempt, f.first)):
            single = layout.is_hot(file) and is_intact(self.storage, file)
            full = len(group) >= SEAL_AFTER_STEPS or sum(f.size for f in group) + file.size > self._seal_bytes
            if group and (not single or full or file.attempt != group[0].attempt):
                yield group
                group = []
            if single:
                group.append(file)
        if group:
            yield group

    def pin_what_a_dead_writer_left(self) -> None:
        """Keep the ring of a run whose last writer of this rank died without a word."""
        if self.resumed and self.last_step >= 0 and self._last_kind not in ENDS:
            self.pin(f"the process died after step {self.last_step}", self.last_step, 0)

    def pin(self, reason: str, step: int, after: int) -> None:
        """Keep the ring's steps, see Retention.pin."""
        self.retention.pin(reason, step, after)

    def commit_step(self, key: StepKey, tables: Iterable[Rows], rollup: pa.Table) -> None:
        """Make one step visible: its tokens and sequences first, its rollup last.

        Raises:
            OSError: it could not be written; nothing of it is visible.
        """
        written: list[tuple[Rows, str]] = []
        try:
            for part in tables:
                name = self._write_step(key, part)
                if name is not None:
                    written.append((part, name))
                elif part.table == layout.TOKENS:
                    rollup = without_tokens(rollup, part.level, len(part.rows))
            self._write_step(key, Rows(layout.ROLLUP, layout.HOT, rollup), always=True)
        except BaseException:
            # otherwise a sealed file of its neighbours would later pass for the commit of this step
            for _, name in written if not self._by_segment else ():
                with contextlib.suppress(OSError):
                    self.storage.delete(name)
                self.retention.removed(name)
            raise
        for part, name in written:
            if part.level == layout.HOT:
                self._buffer(part.table, key, part.rows, name)
        self._buffer(layout.ROLLUP, key, rollup, self._newest_rollup)
        with contextlib.suppress(OSError):  # the step is committed; the next one tries again
            self.retention.expire_ring(key.step)
        self._unlink_expired()

    def _write_step(self, key: StepKey, part: Rows, *, always: bool = False) -> str | None:
        """Name of the file of one step; empty where its segment will be the first, None where there is no room."""
        if self._by_segment and part.level == layout.HOT:
            self._newest_rollup = ""
            return ""
        data = encode(part.rows, part.table, fast=part.level == layout.HOT)
        name = layout.file_name(key.step, key.step, key.attempt, key.rank, data)
        name = f"{part.table}/{part.level}/{name}"
        self._unlink_expired(early=self.retention.is_tight(data.size))
        if not self.retention.fits(name, data.size) and not always:
            return None
        self.storage.write(name, data, fsync=self._fsync == EVERY_STEP)
        self.retention.added(name, data.size)
        if part.table == layout.ROLLUP:
            self._newest_rollup = name
        return name

    def _buffer(self, table: str, key: StepKey, rows: pa.Table, name: str) -> None:
        segment = self._open.get(table)
        if segment and segment.attempt != key.attempt:
            self._seal(table)
            segment = None
        if segment is None:
            segment = self._open[table] = _Segment(key.attempt)
        segment.add(key, rows, name)
        if len(segment.tables) >= SEAL_AFTER_STEPS or segment.size >= self._seal_bytes:
            # tokens and sequences before rollup, so that a sealed rollup never stands for steps without their rows
            for other in layout.STEP_TABLES[: layout.STEP_TABLES.index(table) + 1]:
                self._seal(other)

    def _seal(self, table: str, *, at_end: bool = False) -> None:
        segment = self._open.pop(table, None)
        if segment is None or not segment.tables:
            return
        rows = pa.concat_tables(segment.tables).unify_dictionaries()
        if table == layout.ROLLUP:
            rows = rows.combine_chunks()  # a column of many pieces is read many times as slowly
        # where it fails the steps stay as they are, each in its own file, if they have one
        with contextlib.suppress(*(() if self._by_segment else (OSError, pa.ArrowException))):
            # one step alone, too: only what is sealed can be thinned; the last one is the next writer's to seal
            if len(segment.tables) > 1 or not at_end or self._by_segment:
                self._write_range(table, layout.SEALED, segment.first, segment.last, segment.attempt, rows)
                self._expire([name for name in segment.names if name])
        with contextlib.suppress(OSError, pa.ArrowException):
            if table == layout.ROLLUP and self._zoom is not None:
                self._zoom.add(rows)
        if table == layout.ROLLUP:
            with contextlib.suppress(OSError):
                self.retention.begin(self._own_files())

    def _write_zoom(self, level: str, first: int, last: int, attempt: int, rank: int, rows: pa.Table) -> None:
        self._write_range(layout.ROLLUP, level, first, last, attempt, rows)

    def _write_range(self, table: str, level: str, first: int, last: int, attempt: int, rows: pa.Table) -> None:
        data = encode(rows, table if level == layout.SEALED else "")
        name = f"{table}/{level}/{layout.file_name(first, last, attempt, self.rank, data)}"
        self._unlink_expired(early=self.retention.is_tight(data.size))
        self.retention.fits(name, data.size)
        self.storage.write(name, data, fsync=self._fsync != NEVER)
        self.retention.added(name, data.size)

    def seal(self) -> None:
        """Seal what is open; called when the run ends."""
        for table in layout.STEP_TABLES:
            self._seal(table, at_end=True)
        self._unlink_expired()
        with contextlib.suppress(OSError):
            self.retention.release()

    def _expire(self, names: list[str]) -> None:
        """Remove files later, when no reader can be about to open them, or when their place is needed."""
        self._expired.append((time.monotonic() + GRACE_SECONDS, names))

    def _unlink_expired(self, *, early: bool = False) -> None:
        while self._expired and (early or self._expired[0][0] < time.monotonic()):
            for name in self._expired.popleft()[1]:
                with contextlib.suppress(OSError):
                    self.storage.delete(name)
                self.retention.removed(name)

    def event(self, kind: str, detail: str) -> None:
        """Commit one event. Its number orders it, since a clock can be set back."""
        if self.world_size > 1:
            self._numbers = max(self._numbers, self._next_number())
        self._last_time = max(time.time(), self._last_time + 1e-6)
        row = {
            "number": [self._numbers], "rank": [self.rank], "time": [self._last_time], "kind": [utf8(kind)],
            "detail": [utf8(detail)],
        }  # fmt: skip
        data = encode(pa.table(row, schema=EVENT_SCHEMA))
        name = f"{layout.EVENTS}/{layout.event_name(self._numbers, self.rank, data)}"
        self.storage.write(name, data, fsync=self._fsync == EVERY_STEP)
        self.retention.added(name, data.size)
        self._numbers += 1

    def alarm(self, alarm: Alarm, attempt: int) -> None:
        """Commit one alarm."""
        name, data = alarm_file(self.storage, alarm, attempt, self.rank)
        self.storage.write(name, data, fsync=self._fsync == EVERY_STEP)
        self.retention.added(name, data.size)

    def _next_number(self) -> int:
        return max((_event_number(n) for n in self.storage.list(layout.EVENTS)), default=-1) + 1

    def _last_event_time(self) -> float:
        own = [event for event in layout.list_events(self.storage) if event.rank == self.rank]
        row = next((found for event in reversed(own) if (found := read_event(self.storage, event))), None)
        self._last_kind = "" if row is None else str(row["kind"])
        return 0.0 if row is None else float(row["time"])

    def close(self) -> None:
        """Give the rank back. Hot files that were sealed stay for the next writer: a reader may hold their names."""
        self._lock.release()


def without_tokens(rollup: pa.Table, level: str, count: int) -> pa.Table:
    """A step's summary that says that so many token rows were not stored."""
    column = "ring_tokens" if level == layout.RING else "kept_tokens"
    dropped = (rollup["dropped_tokens"][0].as_py() or 0) + count
    for name, value in ((column, 0), ("dropped_tokens", dropped)):
        field = rollup.schema.field(name)
        rollup = rollup.set_column(rollup.schema.get_field_index(name), field, pa.array([value], field.type))
    return rollup


def _cannot_be_written(storage: Storage, error: OSError) -> StoreError:
    return StoreError(
        f"Recorder: {storage.url} cannot be written ({error.strerror or error}). "
        "Free space, fix its rights or choose another folder."
    )


def _event_number(name: str) -> int:
    found = layout.parse_event(name)
    return -1 if found is None else found.number


class _Segment:
    """Steps of one attempt that wait to be written into one file."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.tables: list[pa.Table] = []
        self.names: list[str] = []
        self.first = self.last = -1
        self.size = 0

    def add(self, key: StepKey, rows: pa.Table, name: str) -> None:
        self.first = key.step if not self.tables else self.first
        self.last = key.step
        self.tables.append(rows)
        self.names.append(name)
        self.size += rows.get_total_buffer_size()
