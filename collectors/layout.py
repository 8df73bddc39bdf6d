"""Names in a run's storage. The names are the manifest: what is visible under its final name is committed.

README.md of this package shows the whole tree. A step of a rank is committed when its rollup file is visible; its
tokens and sequences are written before it.
"""

from __future__ import annotations

import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collectors.storage import Storage
from mhpo_core.errors import StoreError

SCHEMA_VERSION = 3
MANIFEST, VOCABULARY, EVENTS, ATTEMPTS, WRITERS = "run.json", "vocabulary.parquet", "events", "attempts", "writers"
ALARMS = "alarms"
CHECKPOINT = "checkpoint"
ROLLUP, TOKENS, SEQUENCES = "rollup", "tokens", "sequences"
STEP_TABLES = (TOKENS, SEQUENCES, ROLLUP)
"""In the order in which the files of one step are written."""

HOT, SEALED, RING, PINNED = "hot", "sealed", "ring", "pinned"
LEFT = "left"
"""Folder of empty files with the names of those that have left the ring: readers that list them pass over them, and
those that had listed them before have time to open them."""

ZOOM = {8: "x8", 64: "x64", 512: "x512"}
"""Steps that one row of a coarser rollup stands for → its level."""

LEVELS = {ROLLUP: (HOT, SEALED, *ZOOM.values()), TOKENS: (HOT, SEALED, RING, PINNED)}
LEVELS[SEQUENCES] = LEVELS[TOKENS]

_CHECKPOINT = re.compile(rf"{CHECKPOINT}(-alarm-\d{{1,18}})?")
_NAME = re.compile(r"s(\d{9,18})(?:-(\d{9,18}))?\.a(\d{3,9})\.r(\d{3,9})\.([0-9a-f]{8})\.(\d{1,15})\.parquet")


@dataclass(frozen=True, order=True)
class StepFile:
    """A committed Parquet file that holds steps first … last of one attempt of one rank.

    Args:
        name: relative to the run.
        crc: CRC-32 of its bytes, as eight hexadecimal digits.
        size: in bytes, as its name says; a listing that finds another size has found a damaged file.
    """

    first: int
    last: int
    attempt: int
    rank: int
    crc: str
    name: str
    size: int

    @property
    def base(self) -> str:
        """The name without its folder."""
        return self.name.rsplit("/", 1)[-1]


def file_name(first: int, last: int, attempt: int, rank: int, data: Any) -> str:
    """Name of a file of these bytes that holds steps first … last."""
    steps = f"s{first:09d}" if first == last else f"s{first:09d}-{last:09d}"
    return f"{steps}.a{attempt:03d}.r{rank:03d}.{zlib.crc32(data):08x}.{len(data)}.parquet"


def is_checkpoint(folder: str) -> bool:
    """True of a folder in which a trainer keeps its checkpoints, those that an alarm asked for too."""
    return _CHECKPOINT.fullmatch(folder.split("/")[0]) is not None


def parse_name(folder: str, name: str) -> StepFile | None:
    """The step file of that name, or None for anything else: temporary files, strangers."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    first, last, attempt, rank, crc, size = found.groups()
    first_step, last_step = int(first), int(last or first)
    if last_step < first_step:
        return None
    return StepFile(first_step, last_step, int(attempt), int(rank), crc, f"{folder}/{name}", int(size))


OUTSIDE = 999_999_999
"""Rank of an event that no writer of the run noted; it says nothing about what the run is doing."""

_EVENT = re.compile(r"e(\d{9,18})\.r(\d{3,9})\.([0-9a-f]{8})\.(\d{1,15})\.parquet")


@dataclass(frozen=True, order=True)
class EventFile:
    """A committed event. Its number orders it among those of all ranks, up to what they wrote at the same moment."""

    number: int
    rank: int
    crc: str
    name: str
    size: int


def event_name(number: int, rank: int, data: Any) -> str:
    """Name of an event's file."""
    return f"e{number:09d}.r{rank:03d}.{zlib.crc32(data):08x}.{len(data)}.parquet"


def parse_event(name: str, folder: str = EVENTS) -> EventFile | None:
    """The event or alarm of that file name, or None for anything else."""
    found = _EVENT.fullmatch(name)
    if not found:
        return None
    return EventFile(int(found[1]), int(found[2]), found[3], f"{folder}/{name}", int(found[4]))


def holds_its_bytes(file: StepFile | EventFile, data: bytes) -> bool:
    """True if these are the bytes that the file was written with."""
    return len(data) == file.size and f"{zlib.crc32(data):08x}" == file.crc


def list_events(storage: Storage, damaged: list[EventFile] | None = None, folder: str = EVENTS) -> list[EventFile]:
    """Whole events, or alarms, in their order."""
    found = []
    for name, size in storage.list(folder).items():
        event = parse_event(name, folder)
        if event and event.size == size:
            found.append(event)
        elif event and damaged is not None:
            damaged.append(event)
    return sorted(found)


def list_level(storage: Storage, table: str, level: str, damaged: list[StepFile] | None = None) -> list[StepFile]:
    """Whole step files of one level under their final names, in no order.

    Args:
        damaged: receives the files whose size is not the one their name tells: truncated, emptied, overwritten.
    """
    folder = f"{table}/{level}"
    found = []
    for name, size in storage.list(folder).items():
        file = parse_name(folder, name)
        if file and file.size == size:
            found.append(file)
        elif file and damaged is not None:
            damaged.append(file)
    return found


def list_hot(storage: Storage, table: str, level: str = HOT, damaged: list[StepFile] | None = None) -> list[StepFile]:
    """Single steps up to one moment, none missing.

    A folder that changes while it is read can show a step and hide the one committed just before it. Whatever a first
    reading has shown is complete in a second one, up to its newest step.
    """
    newest: dict[int, tuple[int, int]] = {}
    for file in list_level(storage, table, level):
        newest[file.rank] = max(newest.get(file.rank, (-1, -1)), (file.attempt, file.last))
    second = list_level(storage, table, level, damaged)
    return [f for f in second if (f.attempt, f.first) <= newest.get(f.rank, (-1, -1))]


def list_table(storage: Storage, table: str, damaged: list[StepFile] | None = None) -> list[StepFile]:
    """Committed files of a table, each step in exactly one of them, ordered by step.

    `hot` is listed before `sealed`, so that a step which is moved between the two listings is seen twice and never
    missed; the larger file then wins.
    """
    hot = list_hot(storage, table, HOT, damaged)
    return without_covered(hot + list_level(storage, table, SEALED, damaged))


def list_committed(
    storage: Storage, table: str, rollup: Iterable[StepFile], damaged: list[StepFile] | None = None
) -> list[StepFile]:
    """Files of a table whose steps are all committed, that is, are covered by the given rollup files."""
    committed = Coverage(rollup)
    # a sealed file is written only after every step in it was committed
    return [f for f in list_table(storage, table, damaged) if f.first != f.last or committed.holds(f)]


def list_left(storage: Storage) -> set[str]:
    """Names of files that have left the ring but may still be read.

    Listed before the steps, so that a ring of K steps shows K even when more are written between the two listings.
    """
    return {name for table in (TOKENS, SEQUENCES) for name in storage.list(f"{table}/{LEFT}")}


def list_ring(
    storage: Storage,
    table: str,
    rollup: Iterable[StepFile],
    left: Iterable[str],
    damaged: list[StepFile] | None = None,
) -> dict[str, list[StepFile]]:
    """Level → committed files of the flight recorder; one that was pinned is not in its ring any more.

    What was pinned counts as committed: it stays readable even where its step's summary had to go.

    Args:
        left: what `list_left` found before `rollup` was listed.
    """
    committed = Coverage(rollup)
    ring = [f for f in list_hot(storage, table, RING, damaged) if committed.holds(f)]
    pinned = without_covered(list_level(storage, table, PINNED, damaged))
    gone = {f.base for f in pinned} | set(left)
    return {RING: without_covered([f for f in ring if f.base not in gone]), PINNED: pinned}


def without_covered(files: list[StepFile]) -> list[StepFile]:
    """The files that no other one holds, ordered by step; of two for the same steps the sealed one, or the first."""
    kept: list[StepFile] = []
    reached: dict[tuple[int, int], int] = {}
    for file in sorted(files, key=lambda f: (f.first, -f.last, f.attempt, f.rank, is_hot(f), f.crc)):
        key = (file.attempt, file.rank)
        if file.last > reached.get(key, -1):
            kept.append(file)
            reached[key] = file.last
    return kept


def is_hot(file: StepFile) -> bool:
    """True for a file that holds one step until it is sealed."""
    return f"/{HOT}/" in file.name


class Coverage:
    """Which steps a set of files holds; files of one attempt of one rank never overlap."""

    def __init__(self, files: Iterable[StepFile]) -> None:
        self._ranges: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for file in sorted(files):
            firsts, lasts = self._ranges.setdefault((file.attempt, file.rank), ([], []))
            firsts.append(file.first)
            lasts.append(file.last)

    def holds(self, file: StepFile) -> bool:
        """True if every step of the file is in the set."""
        firsts, lasts = self._ranges.get((file.attempt, file.rank), ([], []))
        # a merged file of the ring can begin in one file and end in another; what lies between was committed with it
        indices = (bisect_right(firsts, step) - 1 for step in (file.first, file.last))
        return all(i >= 0 and step <= lasts[i] for i, step in zip(indices, (file.first, file.last), strict=True))


def is_run(folder: Path) -> bool:
    """True if the folder holds a run."""
    return (folder / MANIFEST).is_file()


def read_manifest(storage: Storage, *, versions: tuple[int, ...] = (SCHEMA_VERSION,)) -> dict[str, Any]:
    """The contents of run.json.

    Args:
        versions: schema versions that the caller can work with.

    Raises:
        StoreError: there is no run, its run.json is damaged, or another version of mhpo wrote it.
    """
    run, path = storage.url, f"{storage.url}/{MANIFEST}"
    try:
        manifest = json.loads(storage.read(MANIFEST).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"open_run: {run} is not a run folder, it has no {MANIFEST}. "
            "Give the folder of one run; `mhpo runs FOLDER` lists them."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise StoreError(f"open_run: {path} cannot be read ({error}). Restore it from a copy of the run.") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise StoreError(f"open_run: {path} has no schema_version. Restore it from a copy of the run.")
    for name in ("objective", "store"):
        if not isinstance(manifest.get(name) or {}, dict):
            raise StoreError(f"open_run: {name} in {path} is not a mapping. Restore it from a copy of the run.")
    if version > max(versions):
        raise StoreError(
            f"open_run: {run} has schema version {version}, this program reads up to {SCHEMA_VERSION}. "
            "Open it with a newer version of mhpo."
        )
    if version not in versions:
        raise StoreError(
            f"open_run: {run} has schema version {version}, this program reads {SCHEMA_VERSION}. "
            f"Upgrade it with `mhpo compact {run}`."
        )
    found: dict[str, Any] = manifest
    return found
