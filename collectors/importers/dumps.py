"""What the readers of per-step dumps share: files by number, arrays of tokens, groups.

Shape letters: B sequences, T response tokens (padded).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from collectors.importers.arrays import Numbers, rows_of
from collectors.importers.steps import Notes
from collectors.importers.text import first_object, head, number, objects
from mhpo_core.batch import TokenBatch
from mhpo_core.errors import StoreError

LARGEST_BATCH = 1 << 28
"""B·T; more is no step of a training, and its padding would take gigabytes for each column."""

REQUIRED = ("mask", "logp_new", "logp_old", "advantage")
TokenRow = dict[str, NDArray[Any]]
"""Field of TokenBatch → one value per token of a sequence, all of one length."""

_HEAD = 1 << 20
_Read = TypeVar("_Read")
_LARGEST_SINGLE = float(np.finfo(np.float32).max)


class Refused(StoreError):
    """A file that would do harm; it stops the import, where one that is only damaged is left out."""


def numbered(folder: Path, name: str) -> list[Path]:
    """Entries of a folder whose whole name fits a pattern, in the order of the number in its first group."""
    try:
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(name, path.name))]
    except OSError:
        return []
    return [path for _, path in sorted(found)]


def number_in(name: str, pattern: str) -> int | None:
    """The number in the first group of a pattern that fits the whole name."""
    match = re.fullmatch(pattern, name)
    return int(match[1]) if match else None


def has_keys(path: Path, *names: str) -> bool:
    """True if the first line is an object with these keys; of a line longer than 1 MB, if its beginning names them."""
    if found := first_object(path):
        return all(name in found for name in names)
    beginning = head(path, _HEAD).strip()
    cut_off = beginning.startswith("{") and "\n" not in beginning and len(beginning) > _HEAD // 4
    return cut_off and all(f'"{name}"' in beginning for name in names)


def each(files: Sequence[Path], read: Callable[[Path], _Read], notes: Notes) -> Iterator[tuple[Path, _Read]]:
    """Each file with what is read of it; one that cannot be read is noted and left out.

    Raises:
        Refused: a file would do harm.
        StoreError: no file can be read.
    """
    done, failed = 0, None
    for file in files:
        try:
            found = read(file)
        except Refused:
            raise
        except StoreError as error:
            notes.add("A file cannot be read and is left out", file.name)
            failed = error
            continue
        done += 1
        yield file, found
    if failed is not None and not done:
        raise failed


def rows_by_file(
    files: Sequence[Path], notes: Notes, fields: Mapping[str, pa.DataType] | None = None
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The objects of each file of JSON lines, see `each`.

    Args:
        fields: all that is read of an object, see `arrays.rows_of`, which then gives each list as `Numbers` if it can.
    """

    def read(file: Path) -> list[dict[str, Any]]:
        found = None if fields is None else rows_of(file, fields)
        return [row for _, row in objects(file, notes)] if found is None else found

    yield from each(files, read, notes)


def token_row(given: Mapping[str, object], notes: Notes, where: str, nan: Collection[str] = ()) -> TokenRow | None:
    """The tokens of one sequence; None if its arrays do not fit together, which is noted.

    Args:
        given: field of TokenBatch → a list or array, None where the source has none; one advantage may stand for all.
        nan: fields whose null is a number that is not finite. In the others null is unknown, and its token is left out.
    """
    mask = floats(given.get("mask"))
    read = {name: _read(name, value, mask) for name, value in given.items() if value is not None}
    if mask is None or any(read.get(name) is None for name in REQUIRED):
        notes.add("A sequence lacks a per-token array, its tokens are left out", where)
        return None
    length = len(mask[0])
    fits = {name: one for name, one in read.items() if one is not None and len(one[0]) == length}
    if any(name not in fits for name in REQUIRED):
        notes.add("Per-token arrays of a sequence have different lengths, its tokens are left out", where)
        return None
    for name in read.keys() - fits.keys():
        notes.add(f"A sequence has {name} that does not fit its tokens, it is left out", where)
    trains = (mask[0] != 0) & ~np.isnan(mask[0])
    unknown = np.zeros(length, bool)
    for name, (_, null) in fits.items():
        if name not in nan:
            unknown |= null
    if (trains & unknown).any():
        notes.add("A token that lacks a number is left out", where)
    return {name: values for name, (values, _) in fits.items()} | {"mask": trains & ~unknown}


def batch_of(rows: Sequence[TokenRow | None], notes: Notes, where: str) -> TokenBatch | None:
    """One row per sequence, from its first trained token to its last; None if no token trains.

    A field counts if every sequence with tokens has it. float32, or float64 if a finite value is too large for it.
    """
    cut = [_between_ends(row) if row is not None else None for row in rows]
    present = [row for row in cut if row is not None]
    if not present:
        return None
    width = max(len(row["mask"]) for row in present)
    if len(rows) * width > LARGEST_BATCH:
        notes.add("A step with more than 2²⁸ padded tokens has its tokens left out", where)
        return None
    common = set.intersection(*(set(row) for row in present))
    for name in set().union(*present) - common:
        notes.add(f"A step has {name} for some of its sequences only, it is left out", where)
    return TokenBatch(**{name: _padded(name, cut, width) for name in common})


def floats(value: object) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """The numbers of a list, null as NaN, and where null was; None if it is no list of numbers."""
    if isinstance(value, Numbers):
        return value.values, value.null
    if not isinstance(value, list | np.ndarray):
        return None
    try:
        values = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        read = [math.nan if one is None else number(one) for one in value]
        if any(one is None for one in read):
            return None
        values = np.asarray(read, dtype=np.float64)
    if values.ndim != 1:
        return None
    null = [one is None for one in value] if isinstance(value, list) and None in value else np.zeros(len(values), bool)
    return values, np.asarray(null, dtype=bool)


def nulls(value: object) -> NDArray[np.bool_]:
    """Where null is in a list; empty if it is no list."""
    if isinstance(value, Numbers):
        return value.null
    return np.array([one is None for one in value] if isinstance(value, list) else [], dtype=bool)


def groups(keys: Sequence[Hashable]) -> list[int] | None:
    """Number of the group of each sequence, in the order of appearance; None if no two share one."""
    ids: dict[Hashable, int] = {}
    found = [ids.setdefault(key, len(ids)) for key in keys]
    return found if len(ids) < len(keys) else None


def known(values: list[Any]) -> list[Any] | None:
    """The values, or None if none is known."""
    return values if any(value is not None for value in values) else None


def _read(
    name: str, value: object, mask: tuple[NDArray[np.float64], NDArray[np.bool_]] | None
) -> tuple[NDArray[Any], NDArray[np.bool_]] | None:
    if name == "token_id":
        return _token_ids(value)
    single = value.values.tolist() if isinstance(value, Numbers) and len(value.values) == 1 else value
    if name == "advantage" and mask is not None and (one := number(single)) is not None:
        return np.full(len(mask[0]), one), np.zeros(len(mask[0]), bool)
    return floats(value)


def _token_ids(value: object) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
    read = floats(value)
    if read is None or not ((read[0] >= 0) & (read[0] < 1 << 31) & (read[0] == np.floor(read[0]))).all():
        return None
    return read[0].astype(np.int64), read[1]


def _between_ends(row: TokenRow) -> TokenRow | None:
    trained = np.flatnonzero(row["mask"])
    if not len(trained):
        return None
    return {name: values[trained[0] : trained[-1] + 1] for name, values in row.items()}


def _padded(name: str, rows: Sequence[TokenRow | None], width: int) -> torch.Tensor:
    dtype: type = {"mask": np.bool_, "token_id": np.int64}.get(name, np.float32)
    if dtype is np.float32 and any(row is not None and _is_large(row[name]) for row in rows):
        dtype = np.float64
    padded: NDArray[Any] = np.zeros((len(rows), width), dtype)
    for index, row in enumerate(rows):
        if row is not None:
            padded[index, : len(row[name])] = row[name]
    return torch.from_numpy(padded)


def _is_large(values: NDArray[np.float64]) -> bool:
    size = np.abs(values)
    return bool((np.isfinite(size) & (size > _LARGEST_SINGLE)).any())
