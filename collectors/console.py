"""A DuckDB for anything a user types: it reads the tables it was given, for a bounded time, and nothing else.

Two guards, each of which is enough to keep files, the network and the settings out of reach. The database is locked
and was never told a path: data come in as Arrow objects. And a text runs only if `SelectOnly` finds nothing in it but
a query over the public tables.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from collectors.select_only import SelectOnly, one_line
from mhpo_core.errors import StoreError

_T = TypeVar("_T")
_ROWS = 65_536
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b\s*", re.IGNORECASE)
_MAX_SECONDS = 86_400.0
_AGAIN = 0.05  # seconds between interrupts: one that comes before the query has begun is lost
_CLOSING = 100  # of these, for a query that cannot be interrupted
_KIND = re.compile(r"^(?:(?:\w+Exception: )?[A-Z][\w ]*? Error: )+")
_LOCKED = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    "python_enable_replacements": False,
    "python_scan_all_frames": False,
    "temp_directory": "",
}


class Console:
    """Read-only SQL over Arrow data, one query at a time; other threads wait for their turn.

    Args:
        sources: relation name → what it holds, a `pyarrow.Table` or a `pyarrow.dataset.Dataset`.
        views: CREATE VIEW statements over the sources and earlier views; they are trusted.
        public: names that a query may refer to.
        memory: what DuckDB may use, and what the result of `query` may take, such as 1GB. DuckDB does not count a
            single value while a function makes it: repeat('x', 10^9) takes its gigabyte all the same.
        seconds: running time of one query.
        threads: of DuckDB.

    Raises:
        StoreError: `memory`, `seconds` or `threads` is out of range.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        views: Sequence[str],
        public: Sequence[str],
        *,
        memory: str = "1GB",
        seconds: float = 60.0,
        threads: int = 2,
        _locked: bool = True,
        _checked: bool = True,
    ) -> None:
        if not 0 < seconds <= _MAX_SECONDS:
            raise StoreError(
                f"Console: seconds={seconds}, allowed are numbers above 0 up to {_MAX_SECONDS:g}. Give one."
            )
        if threads < 1:
            raise StoreError(f"Console: threads={threads}, allowed are 1 and more. Give one of them.")
        self._seconds = seconds
        self._memory = memory
        self._bytes = _parse_size(memory)
        self._lock = threading.Lock()
        self._open: Generator[Any, None, None] | None = None
        self._closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="console")
        self._connection = _connect(memory, threads, locked=_locked)
        for name, data in sources.items():
            self._connection.register(name, data)
        for statement in views:
            self._connection.execute(statement)
        if _locked:
            self._connection.execute("SET lock_configuration = true")
        self._parser = _connect("100MB", 1, locked=True)
        self._parser.execute("SET lock_configuration = true")
        self._check = SelectOnly(public, self._parser) if _checked else None

    def query(self, sql: str, max_rows: int | None = None) -> pa.Table:
        """The result of a query.

        Args:
            sql: SELECT, WITH, FROM, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES or EXPLAIN.
            max_rows: refuse a result that has more; None for any number.

        Raises:
            StoreError: it is no query over the public tables, it fails, or it takes too much time, memory or rows.
        """
        kept: list[pa.RecordBatch] = []
        rows = size = 0
        with self._turn(), closing(self._begin(sql, _ROWS)) as batches:
            self._end_stream()
            schema = next(batches)
            for batch in batches:
                kept.append(batch)
                rows += batch.num_rows
                size += batch.nbytes
                if max_rows is not None and rows > max_rows:
                    raise StoreError(f"query: more than {max_rows:,} rows, allowed are {max_rows:,}. Add a LIMIT.")
                if size > self._bytes:
                    raise StoreError(
                        f"query: the result takes more than {self._memory}, the memory allowed. Add a LIMIT."
                    )
        return pa.Table.from_batches(kept, schema)

    def stream(self, sql: str, rows: int = _ROWS) -> pa.RecordBatchReader:
        """The same, not held in memory. The next query of this console ends it.

        Only the time in which batches are computed counts, not that of whoever reads them.

        Args:
            sql: as for `query`.
            rows: of one batch, at most.

        Raises:
            StoreError: as `query` does; while reading too.
        """
        with self._turn():
            self._end_stream()
            self._open = self._begin(sql, rows)
            schema = next(self._open)
        return pa.RecordBatchReader.from_batches(schema, self._in_turns(self._open))

    def close(self) -> None:
        """Stop what is running and give the memory back."""
        self._closed = True
        for _ in range(_CLOSING):
            with suppress(duckdb.Error):
                self._connection.interrupt()
            if self._lock.acquire(timeout=_AGAIN):
                self._end_stream()
                self._lock.release()
                break
        self._worker.shutdown(wait=False)
        self._connection.close()
        self._parser.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=self._seconds):
            raise StoreError(f"query: the console is busy, waited {self._seconds:g} s. Wait for the other queries.")
        try:
            if self._closed:
                raise StoreError("query: the console is closed. Open another one.")
            yield
        finally:
            self._lock.release()

    def _begin(self, sql: str, rows: int) -> Generator[Any, None, None]:
        """The schema of the result, then its batches."""
        budget = _Budget(self._connection, self._worker, self._seconds)
        with self._errors(budget):
            statement = sql if self._check is None else self._check.statement(sql)
            reader = budget.run(lambda: self._reader(statement, rows))
        with closing(reader):
            yield reader.schema
            while (batch := self._next(reader, budget)) is not None:
                yield batch

    def _reader(self, statement: str, rows: int) -> pa.RecordBatchReader:
        relation = self._connection.sql(statement)
        # a statement without a result, which only an unchecked console runs
        return pa.table({}).to_reader() if relation is None else relation.to_arrow_reader(rows)

    def _next(self, reader: pa.RecordBatchReader, budget: _Budget) -> pa.RecordBatch | None:
        with self._errors(budget):
            return budget.run(lambda: next(reader, None))

    def _in_turns(self, batches: Generator[Any, None, None]) -> Iterator[pa.RecordBatch]:
        while True:
            with self._turn():
                if self._open is not batches:
                    raise StoreError(
                        "stream: a later query ended it, allowed is one at a time. Read it to its end first."
                    )
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _end_stream(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None

    @contextmanager
    def _errors(self, budget: _Budget) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except (duckdb.Error, pa.ArrowException, OSError, MemoryError, ValueError, RuntimeError) as error:
            raise StoreError(f"query: {self._explained(error, budget)}") from None

    def _explained(self, error: Exception, budget: _Budget) -> str:
        text = str(error)
        if budget.exceeded:
            return f"took longer than {self._seconds:g} s, the time allowed. Ask for fewer steps, or allow more time."
        if isinstance(error, duckdb.OutOfMemoryException | MemoryError) or "Out of Memory Error" in text:
            return f"needs more than {self._memory}, the memory allowed. Ask for fewer steps, or allow more memory."
        return one_line(_KIND.sub("", text)) or type(error).__name__


class _Budget:
    """Running time of one query; stops it when none is left, or when whoever waits for it is interrupted."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, worker: ThreadPoolExecutor, seconds: float) -> None:
        self._connection = connection
        self._worker = worker
        self._left = seconds
        self.exceeded = False

    def run(self, work: Callable[[], _T]) -> _T:
        """The result of a part of the query, or its error. It runs in another thread: this one can be interrupted."""
        started = time.monotonic()
        future = self._worker.submit(work)
        try:
            wait([future], max(0.0, self._left))
            self.exceeded = not future.done()
        finally:
            while not future.done():
                self._connection.interrupt()
                wait([future], _AGAIN)
            self._left -= time.monotonic() - started
        return future.result()


def _connect(memory: str, threads: int, *, locked: bool) -> duckdb.DuckDBPyConnection:
    limits: dict[str, Any] = {"memory_limit": memory, "threads": threads}
    return duckdb.connect(":memory:", config=limits | (_LOCKED if locked else {}))


def _parse_size(memory: str) -> float:
    given = _SIZE.fullmatch(memory)
    size = float(given[1]) * _UNITS[given[2].lower()] if given and given[2].lower() in _UNITS else math.nan
    if not size >= 1e6:
        raise StoreError(f"Console: memory={memory!r}, allowed is a size such as 1GB, from 1MB. Give one.")
    return size
