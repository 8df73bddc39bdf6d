"""Many small files become few large ones; every query gives the same answer before, during and after.

A larger file covers the smaller ones, which readers then pass over, so the smaller ones can go at any later moment.
Wherever this is interrupted, the run is whole; the next compaction goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from collectors import layout
from collectors.encoding import encode, read_rows
from collectors.integrity import is_intact
from collectors.layout import StepFile
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
    live = bool(has_writer(storage))
    if not live:
        upgrade(storage)
    layout.read_manifest(storage)
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


def _files(storage: Storage) -> list[StepFile]:
    return [
        file
        for table, levels in layout.LEVELS.items()
        for level in levels
        for file in layout.list_level(storage, table, level)
    ]


def _groups(storage: Storage, live: bool, file_bytes: int) -> Iterator[tuple[str, str, list[StepFile]]]:
    """Table, target level and the neighbouring files that become one."""
    rollup = layout.list_table(storage, layout.ROLLUP)
    for table in layout.STEP_TABLES:
        chosen = {layout.SEALED: rollup if table == layout.ROLLUP else layout.list_committed(storage, table, rollup)}
        if table != layout.ROLLUP:
            ring = layout.list_ring(storage, table, rollup)
            chosen |= {layout.PINNED: ring[layout.PINNED]} | ({} if live else {layout.RING: ring[layout.RING]})
        for level, files in chosen.items():
            # hot files belong to a living writer, which seals them itself
            usable = [f for f in files if not (live and f"/{layout.HOT}/" in f.name)]
            ordered = sorted(usable, key=lambda f: (f.attempt, f.rank, f.first))
            for _, alike in groupby(ordered, key=lambda f: (f.attempt, f.rank)):
                yield from ((table, level, g) for g in _cut(list(alike), table, file_bytes) if len(g) > 1)


def _cut(files: list[StepFile], table: str, file_bytes: int) -> Iterator[list[StepFile]]:
    group: list[StepFile] = []
    size, steps = 0, FILE_STEPS.get(table, 1 << 60)
    for file in files:
        if group and (size + file.size > file_bytes or file.last - group[0].first >= steps):
            yield group
            group, size = [], 0
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
    """Delete the files that a larger one covers; first those of rollup, without which no step is visible."""
    spare = []
    for table in layout.STEP_TABLES:
        everywhere = [layout.list_level(storage, table, level) for level in (layout.HOT, layout.SEALED)]
        kept = {f.name for f in layout.without_covered([f for files in everywhere for f in files])}
        spare += [f for files in everywhere for f in files if f.name not in kept and not (live and _is_hot(f))]
        if table != layout.ROLLUP:
            for level in (layout.RING, layout.PINNED):
                files = layout.list_level(storage, table, level)
                kept = {f.name for f in layout.without_covered(files)}
                spare += [f for f in files if f.name not in kept and not live]
    if spare and wait:
        time.sleep(wait)
    for file in spare:
        storage.delete(file.name)


def _is_hot(file: StepFile) -> bool:
    return f"/{layout.HOT}/" in file.name
