"""`mhpo sql RUN "SELECT …" [--format table|csv|json|parquet]`"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.cells import in_json, in_text, python_values
from app.text import visible
from collectors import open_run
from mhpo_core.errors import MhpoError, StoreError

_MAX_ROWS = 10_000
_MAX_WIDTH = 80
_PLAN = ["explain_key", "explain_value"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of one run, or s3://bucket/folder")
    parser.add_argument("query", metavar="QUERY", help='such as "SELECT step, loss FROM steps"; - reads standard input')
    parser.add_argument("--format", choices=sorted(_WRITERS), default="table", help="of the output (table)")
    parser.add_argument("--limit-seconds", metavar="S", type=float, default=60.0, help="running time at most (60)")
    parser.add_argument("--memory", metavar="SIZE", default="1GB", help="memory of the query at most (1GB)")


def run(options: argparse.Namespace) -> int:
    if options.format == "parquet" and sys.stdout.isatty():
        raise MhpoError("--format parquet writes bytes, and not to a terminal. Add > FILE.parquet.")
    query = _standard_input() if options.query == "-" else options.query
    with (
        open_run(options.run_folder) as stored,
        stored.console(memory=options.memory, seconds=options.limit_seconds) as console,
    ):
        _WRITERS[options.format](console.stream(query))
        sys.stdout.flush()  # a closed pipe shows here, where the command line expects it
    return 0


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise MhpoError("standard input is not UTF-8 text, allowed is a query. Convert it.") from None


def _write_table(result: pa.RecordBatchReader) -> None:
    if result.schema.names == _PLAN:
        _write_plan(result)
        return
    rows: list[list[str]] = []
    more = 0
    for batch in result:
        shown = batch.slice(0, _MAX_ROWS - len(rows))
        columns = [[_cell(v) for v in python_values(column)] for column in shown.columns]
        rows += [list(row) for row in zip(*columns, strict=True)]
        more = batch.num_rows - shown.num_rows
        if more:
            break
    _print_aligned([_cell(name) for name in result.schema.names], rows, [_is_number(f.type) for f in result.schema])
    if more:
        sys.stdout.flush()  # counting takes a while
        print(f"… {_count(result, more)} more rows. Add a LIMIT, or --format csv for all of them.")


def _count(result: pa.RecordBatchReader, counted: int) -> str:
    try:
        return f"{counted + sum(batch.num_rows for batch in result):,}"
    except StoreError:
        return "many"


def _write_plan(result: pa.RecordBatchReader) -> None:
    for plan in result.read_all()["explain_value"].to_pylist():
        for line in plan.splitlines():
            print(visible(line))


def _print_aligned(names: list[str], rows: list[list[str]], numbers: list[bool]) -> None:
    widths = [max(map(_width, cells)) for cells in zip(names, *rows, strict=True)]
    for row in [names, *rows]:
        padded = [
            " " * (width - _width(cell)) + cell if number else cell + " " * (width - _width(cell))
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ]
        print("  ".join(padded).rstrip())


def _cell(value: Any) -> str:
    return "NULL" if value is None else visible(in_text(value, "nan", "inf"), _MAX_WIDTH)


def _width(text: str) -> int:
    """Columns of a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _write_csv(result: pa.RecordBatchReader) -> None:
    """RFC 4180 in UTF-8; NULL is an empty field, and an empty text is a quoted one."""
    # a terminal would execute what a model wrote
    shown: Callable[[str], str] = (lambda text: visible(text, len(text))) if sys.stdout.isatty() else str
    _write_bytes(_csv_line(result.schema.names, shown))
    for batch in result:
        columns = [python_values(column) for column in batch.columns]
        for row in zip(*columns, strict=True):
            _write_bytes(_csv_line(row, shown))


def _csv_line(row: Any, shown: Callable[[str], str]) -> str:
    fields = ["" if value is None else _csv_field(shown(in_text(value, "NaN", "Infinity"))) for value in row]
    # a line with nothing on it is no row to most readers
    return ('""' if fields == [""] else ",".join(fields)) + "\r\n"


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if not text or set(text) & set(',"\r\n') else text


def _write_json(result: pa.RecordBatchReader) -> None:
    names = _distinct(result.schema.names)
    separator = "[\n "
    for batch in result:
        columns = [[in_json(v) for v in python_values(column)] for column in batch.columns]
        for row in zip(*columns, strict=True):
            sys.stdout.write(separator + json.dumps(dict(zip(names, row, strict=True)), allow_nan=False))
            separator = ",\n "
    sys.stdout.write("[]\n" if separator == "[\n " else "\n]\n")


def _write_parquet(result: pa.RecordBatchReader) -> None:
    names = _distinct(result.schema.names)
    schema = pa.schema([field.with_name(name) for field, name in zip(result.schema, names, strict=True)])
    try:
        with pq.ParquetWriter(sys.stdout.buffer, schema, compression="zstd") as writer:
            for batch in result:
                writer.write_batch(batch.rename_columns(names))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"--format parquet cannot hold a column: {visible(reason)}. Cast it to VARCHAR.") from None


def _distinct(names: list[str]) -> list[str]:
    """The names, with _1, _2, … after those that came before."""
    found: list[str] = []
    for name in names:
        number, free = 0, name
        while free in found:
            number += 1
            free = f"{name}_{number}"
        found.append(free)
    return found


def _write_bytes(text: str) -> None:
    sys.stdout.buffer.write(text.encode())


_WRITERS: dict[str, Callable[[pa.RecordBatchReader], None]] = {
    "table": _write_table, "csv": _write_csv, "json": _write_json, "parquet": _write_parquet,
}  # fmt: skip
