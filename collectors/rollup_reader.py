"""Verified contents of rollup files, as bins: a file whose bytes do not fit its name is skipped and remembered."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collectors.bin_tables import ROLLUP_LEAVES, ROLLUP_TEXTS, bins_from_table, bins_of_steps
from collectors.bins import Bins
from collectors.layout import StepFile
from collectors.rollup_files import RAW, Part
from collectors.storage import Storage
from mhpo_core.errors import StoreError
from mhpo_core.metrics import METRICS

_AT_ONCE = 16


class Unreadable(Exception):
    """A file of a coarser level is damaged or gone; others hold the same steps."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Reader:
    """Reads rollup files as bins; a file whose bytes do not fit its name is left out and named in `damaged`.

    Args:
        metrics: names of METRICS.

    Raises:
        StoreError: there is no such metric.
    """

    def __init__(self, storage: Storage, metrics: Sequence[str]) -> None:
        unknown = [name for name in metrics if name not in METRICS]
        if unknown:
            raise StoreError(
                f"rollup: no metric is called {unknown[0]!r}, allowed are the names of mhpo_core.metrics.METRICS. "
                "Take one of these."
            )
        self._storage = storage
        self.metrics = list(metrics)
        self._columns = ["step", "world_size", "wall_time", *self.metrics, *ROLLUP_LEAVES]
        self.damaged: set[str] = set()
        self.known: Mapping[Part, Bins] = {}
        self._newest: tuple[str, pa.Table | None] = ("", None)

    def bins(self, part: Part) -> Bins:
        """The steps of a part, in bins of its level; taken from `known` if they are there.

        Raises:
            Unreadable: a file of a coarser level cannot be read.
            FileNotFoundError: a raw file is gone, since its steps were sealed. List again.
        """
        if part in self.known:
            return self.known[part]
        found = self._steps(part) if part.level == RAW else self._zoomed(part.files[0])
        inside = np.flatnonzero((found.first >= part.lo) & (found.last < part.hi))
        return found.rows(slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0))

    def world_size(self, files: Iterable[StepFile]) -> int:
        """Ranks that write a step, as the first readable file tells; 1 if none does.

        Raises:
            FileNotFoundError: see `bins`.
        """
        for file in files:
            self._newest = (file.name, self._table(file, self._columns))
            if _has_rows(self._newest[1]):
                return _world_size(self._newest[1])
        return 1

    def _zoomed(self, file: StepFile) -> Bins:
        try:
            data = self._verified(file)
        except FileNotFoundError:
            raise Unreadable(file.name) from None
        try:
            if data is None:
                raise Unreadable(file.name)
            found = bins_from_table(pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False))
        except (pa.ArrowException, OSError, KeyError, ValueError, IndexError):
            self.damaged.add(file.name)
            raise Unreadable(file.name) from None
        return found.select(self.metrics, found.gradients.names)

    def _steps(self, part: Part) -> Bins:
        several = len({f.rank for f in part.files}) > 1
        table = self._rows(part.files, whole=several)
        if not several and _world_size(table) > 1:
            several, table = True, self._rows(part.files, whole=True)
        if several and table.num_rows:
            from collectors.ranks import merge_ranks  # needs torch's part of the telemetry

            inside = pc.and_(pc.greater_equal(table["step"], part.lo), pc.less(table["step"], part.hi))
            table = merge_ranks(table.filter(inside))
        return bins_of_steps(table, self.metrics)

    def _rows(self, files: Sequence[StepFile], *, whole: bool) -> pa.Table:
        """All rows of raw files.

        Args:
            whole: all columns, not only those that bins are made of.
        """
        # dictionaries of several files do not concatenate; a column without NULL is declared so in its file alone
        texts = ROLLUP_TEXTS if len(files) == 1 and not whole else None
        columns = None if whole else self._columns
        if self._storage.local is None:  # a bucket takes its time for every file, and serves many at once
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                found = list(pool.map(lambda file: self._table(file, columns, texts), files))
        else:
            found = [self._table(file, columns, texts) for file in files]
        tables = [table for table in found if _has_rows(table)]
        if not tables:
            return pa.table({"step": pa.array([], pa.int64()), "wall_time": pa.array([], pa.float64())})
        return tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="default").combine_chunks()

    def _table(self, file: StepFile, columns: list[str] | None, texts: list[str] | None = None) -> pa.Table | None:
        if columns is not None and self._newest[0] == file.name:
            return self._newest[1]
        data = self._verified(file)
        if data is None:
            return None
        try:
            parquet = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
            return parquet.read(columns=columns, use_threads=False)
        except (pa.ArrowException, OSError):
            self.damaged.add(file.name)
            return None

    def _verified(self, file: StepFile) -> bytes | None:
        if file.name in self.damaged:
            return None
        data = self._storage.read(file.name)
        if len(data) == file.size and f"{zlib.crc32(data):08x}" == file.crc:
            return data
        self.damaged.add(file.name)
        return None


def _has_rows(table: pa.Table | None) -> bool:
    return table is not None and table.num_rows > 0


def _world_size(table: pa.Table | None) -> int:
    if table is None or not table.num_rows or "world_size" not in table.column_names:
        return 1
    return int(pc.max(table["world_size"]).as_py() or 1)
