"""Many small files become few large ones; every query gives the same answer before, during and after.

A larger file covers the smaller ones, which readers then pass over, so the smaller ones can go at any later moment.
Wherever this is interrupted, the run is whole; the next compaction goes on.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from collectors import layout
from collectors.encoding import encode, read_rows
from collectors.integrity import is_intact
from collectors.layout import StepFile
from collectors.state import run_state
from collectors.storage import Storage
from collectors.upgrade import upgrade
from collectors.writers import has_writer
from collectors.zoom import write_missing

FILE_BYTES = 128 << 20
"""A file grows to about this size."""

FILE_STEPS = {layout.ROLLUP: 1024}
_SECONDS_FOR_READERS = 5.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Compaction:
    """What was done.

    Args:
        files_before, files_after: files of steps.
        bytes_before, bytes_after: their bytes.
        skipped: damaged files, left as they are.
        live: a writer is at work, so that only what it has sealed was touched.
    """

    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    skipped: tuple[str, ...]
    live: bool


def compact(
    storage: Storage,
    *,
    file_bytes: int = FILE_BYTES,
    wait: float = _SECONDS_FOR_READERS,
    progress: Progress = lambda what, done, total: None,
) -> Compaction:
    """Merge the files of a run; a store of an older schema is upgraded first.

    Args:
        file_bytes: size to which files grow.
        wait: seconds between the last new file and the removal of the old ones, for readers that hold their names.

    Raises:
        StoreError: there is no run, or its run.json cannot be read.
        OSError: the place cannot be written; nothing is lost.
    """
    live = _is_live(storage)
    if not live:
        upgrade(storage)
    layout.read_manifest(storage)
    if not live:
        _remove_pinned_from_ring(storage)
    before = _files(storage)
    skipped: list[str] = []
    groups = list(_groups(storage, live, file_bytes))
    for index, (table, level, files) in enumerate(groups):
        progress(f"{table}/{level}", index, len(groups))
        skipped += _merge(storage, table, level, files)
    if not live:
        _complete_zoom(storage)
    _remove_covered(storage, live, wait if groups else 0.0)
    after = _files(storage)
    return Compaction(
        len(before), len(after), sum(f.size for f in before), sum(f.size for f in after), tuple(skipped), live
    )


def _is_live(storage: Storage) -> bool:
    alive = has_writer(storage)
    # a bucket has no locks, so only the writer's last word tells
    return run_state(storage).name == "running" if alive is None else alive


def _remove_pinned_from_ring(storage: Storage) -> None:
    """A dead writer may have left both names of a file; the one of a merged file would not tell that it is there."""
    for table in (layout.TOKENS, layout.SEQUENCES):
        pinned = {file.base for file in layout.list_level(storage, table, layout.PINNED)}
        for file in layout.list_level(storage, table, layout.RING):
            if file.base in pinned:
                storage.delete(file.name)


def _files(storage: Storage) -> list[StepFile]:
    return [
        file
        for table, levels in layout.LEVELS.items()
        for level in levels
        for file in layout.list_level(storage, table, level)
    ]


def _groups(storage: Storage, live: bool, file_bytes: int) -> Iterator[tuple[str, str, list[StepFile]]]:
    """Table, target level and the neighbouring files that become one."""
    left = layout.list_left(storage)
    rollup = layout.list_table(storage, layout.ROLLUP)
    for table in layout.STEP_TABLES:
        for level, files, between in _levels(storage, table, rollup, left, live):
            ordered = sorted(files + between, key=lambda f: (f.attempt, f.rank, f.first))
            for _, alike in groupby(ordered, key=lambda f: (f.attempt, f.rank)):
                groups = _cut(list(alike), set(between), table, file_bytes)
                yield from ((table, level, group) for group in groups if len(group) > 1)


def _levels(
    storage: Storage, table: str, rollup: list[StepFile], left: set[str], live: bool
) -> Iterator[tuple[str, list[StepFile], list[StepFile]]]:
    """Level, its files, and files that no merged one may span, because it would pass for them."""
    damaged: list[StepFile] = []
    if table == layout.ROLLUP:
        files = layout.list_table(storage, table, damaged)
    else:
        files = layout.list_committed(storage, table, rollup, damaged)
    whole = layout.Coverage(files)
    # hot files belong to a living writer, which seals them itself
    apart = {f for f in files if live and layout.is_hot(f)}
    usable = [f for f in files if f not in apart]
    yield layout.SEALED, usable, [*apart, *(f for f in damaged if not whole.holds(f))]
    if table != layout.ROLLUP and not live:
        ring = layout.list_ring(storage, table, rollup, left, damaged := [])
        yield layout.PINNED, ring[layout.PINNED], ring[layout.RING] + damaged
        yield layout.RING, ring[layout.RING], ring[layout.PINNED] + damaged


def _cut(files: list[StepFile], between: set[StepFile], table: str, file_bytes: int) -> Iterator[list[StepFile]]:
    group: list[StepFile] = []
    size, steps = 0, FILE_STEPS.get(table, 1 << 60)
    for file in files:
        if group and (file in between or size + file.size > file_bytes or file.last - group[0].first >= steps):
            yield group
            group, size = [], 0
        if file not in between:
            group.append(file)
            size += file.size
    if group:
        yield group


def _merge(storage: Storage, table: str, level: str, files: list[StepFile]) -> list[str]:
    """Write one file for many; returns the damaged ones, at which the range is cut so that they stay visible."""
    damaged, run = [], []
    for file in files:
        if is_intact(storage, file):
            run.append(file)
            continue
        damaged.append(file.name)
        _write(storage, table, level, run)
        run = []
    _write(storage, table, level, run)
    return damaged


def _write(storage: Storage, table: str, level: str, files: list[StepFile]) -> None:
    if len(files) < 2:
        return
    rows = pa.concat_tables([read_rows(storage.read(f.name)) for f in files])
    data = encode(rows, table)
    first, last = files[0], files[-1]
    name = layout.file_name(first.first, last.last, first.attempt, first.rank, data)
    storage.write(f"{table}/{level}/{name}", data, fsync=True)


def _complete_zoom(storage: Storage) -> None:
    """Coarser rollups of a run whose recorder did not write them; several ranks have none."""
    rollup = layout.list_table(storage, layout.ROLLUP)
    if len({f.rank for f in rollup}) != 1:
        return

    def write(level: str, first: int, last: int, attempt: int, rank: int, rows: pa.Table) -> None:
        data = encode(rows)
        name = f"{layout.ROLLUP}/{level}/{layout.file_name(first, last, attempt, rank, data)}"
        if not storage.exists(name):
            storage.write(name, data, fsync=True)

    write_missing(storage, write)


def _remove_covered(storage: Storage, live: bool, wait: float) -> None:
    """Delete the files that a larger one covers, unless that one is damaged and they are the better copy."""
    spare: list[StepFile] = []
    for table in layout.STEP_TABLES:
        hot, sealed, *others = (layout.list_level(storage, table, level) for level in layout.LEVELS[table][:4])
        spare += [f for f in _covered(storage, hot + sealed) if not (live and layout.is_hot(f))]
        if table != layout.ROLLUP and not live:
            spare += [f for files in others for f in _covered(storage, files)]
    if spare and wait:
        time.sleep(wait)
    for file in spare:
        storage.delete(file.name)


def _covered(storage: Storage, files: list[StepFile]) -> list[StepFile]:
    """The files that an intact one holds."""
    over: dict[tuple[int, int], list[StepFile]] = {}
    for file in layout.without_covered(files):
        over.setdefault((file.attempt, file.rank), []).append(file)
    kept = {file.name for found in over.values() for file in found}
    intact: dict[str, bool] = {}
    spare = []
    for file in files:
        found = over[(file.attempt, file.rank)]
        holder = found[max(bisect_right(found, file.first, key=lambda f: f.first) - 1, 0)]
        if file.name not in kept and holder.first <= file.first and file.last <= holder.last:
            if holder.name not in intact:
                intact[holder.name] = is_intact(storage, holder)
            spare += [file] if intact[holder.name] else []
    return spare
