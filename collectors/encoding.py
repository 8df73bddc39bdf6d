"""How a table becomes the bytes of a Parquet file: encodings and page sizes as measured on token telemetry."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collectors import layout
from collectors.schema import TOKEN_ENCODINGS
from collectors.storage import Storage

# One page per column and row group: pyarrow's default of 20 000 rows a page makes four byte streams share one Huffman
# table and costs 10 % of size. Larger groups are read whole for one completion. zstd above level 1 is slower and not
# smaller here.
_OPTIONS: dict[str, Any] = {
    "row_group_size": 262_144,
    "max_rows_per_page": 262_144,
    "write_batch_size": 262_144,  # a row group at a time; pyarrow's default of 1024 costs 5 % more time
    "store_schema": False,
    # minimum and maximum of a column that nobody filters by only make the footer larger
    "write_statistics": ["step", "sequence_id", "log_ratio"],
}


@dataclass(frozen=True)
class _Layout:
    dictionary: list[str] = field(default_factory=list)
    encodings: dict[str, str] = field(default_factory=dict)


_KEY_COLUMNS = ["step", "attempt", "rank"]
_LAYOUTS = {
    layout.TOKENS: _Layout(["kept_because"], TOKEN_ENCODINGS),
    layout.SEQUENCES: _Layout([*_KEY_COLUMNS, "group_id", "prompt"]),
    layout.ROLLUP: _Layout(_KEY_COLUMNS),
}


def encode(rows: pa.Table, table: str = "", *, fast: bool = False) -> pa.Buffer:
    """The Parquet file of some rows.

    Args:
        table: whose encodings to use; any other table has none of its own, and a checksum in every page.
        fast: lz4 in place of zstd, half the time for files of one step, which are merged soon anyway.
    """
    chosen = _LAYOUTS.get(table, _Layout())
    options = _OPTIONS | {
        "use_dictionary": chosen.dictionary or False, "column_encoding": chosen.encodings or None,
        "write_page_checksum": not table,  # files of steps have theirs in their names
        "compression": "lz4" if fast else "zstd", "compression_level": None if fast else 1,
    }  # fmt: skip
    rows = _required(rows)
    # one allocation of about the right size; a stream that grows copies what it has again and again
    buffer = pa.allocate_buffer(int(rows.nbytes * 1.05) + (1 << 18))
    try:
        with pa.FixedSizeBufferWriter(buffer) as sink:
            pq.write_table(rows, sink, **options)
            return buffer.slice(0, sink.tell())
    except OSError:  # it did not fit
        growing = pa.BufferOutputStream()
        pq.write_table(rows, growing, **options)
        return growing.getvalue()


def _required(rows: pa.Table) -> pa.Table:
    """The same rows, with columns that hold no NULL declared so: nothing is written of what could be missing."""
    fields = [pa.field(f.name, f.type, nullable=rows[f.name].null_count > 0) for f in rows.schema]
    return pa.table(rows.columns, schema=pa.schema(fields))


def read_rows(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The rows of a Parquet file that is in memory; on the thread that asks, which is the trainer's neighbour."""
    rows = pq.read_table(pa.BufferReader(data), columns=columns, use_threads=False)
    # a column without NULL is declared so in its file; rows of several files are put together
    return pa.table(rows.columns, schema=pa.schema([f.with_nullable(True) for f in rows.schema]))


def read_where(storage: Storage, name: str, wanted: dict[str, int], columns: list[str] | None = None) -> pa.Table:
    """The rows of a stored file with these values, opening only the row groups that can hold them.

    Args:
        wanted: column → value.
    """
    with storage.filesystem.open_input_file(storage.location(name)) as source:
        file = pq.ParquetFile(source)
        index = {file.schema_arrow.names[i]: i for i in range(len(file.schema_arrow.names))}
        groups = [g for g in range(file.num_row_groups) if _may_hold(file.metadata.row_group(g), index, wanted)]
        rows = file.read_row_groups(groups, columns=columns, use_threads=False)
    rows = pa.table(rows.columns, schema=pa.schema([f.with_nullable(True) for f in rows.schema]))
    return rows.filter(reduce(pc.and_, [pc.equal(rows[column], value) for column, value in wanted.items()]))


def _may_hold(group: Any, index: dict[str, int], wanted: dict[str, int]) -> bool:
    for column, value in wanted.items():
        found = group.column(index[column]).statistics
        if found is not None and found.has_min_max and not found.min <= value <= found.max:
            return False
    return True
