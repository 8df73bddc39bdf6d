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
# table and costs 10 % of size. A group is read whole for one completion: twice the rows take twice as long and are no
# smaller, half of them are 4 % larger. zstd above level 1 is slower and not smaller here.
_OPTIONS: dict[str, Any] = {
    "row_group_size": 131_072,
    "max_rows_per_page": 131_072,
    "write_batch_size": 131_072,  # a row group at a time; pyarrow's default of 1024 costs 5 % more time
    "store_schema": False,
}
# minimum and maximum of a column that nobody filters by only make the footer larger
_FILTERED = ("step", "sequence_id", "log_ratio")


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
    # that a column is all NULL is told by its statistics, and then it need not be read
    told = [f.name for f in rows.schema if f.name in _FILTERED or rows[f.name].null_count == len(rows)]
    options["write_statistics"] = told or False
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
        columns: default: all.
    """
    with storage.filesystem.open_input_file(storage.location(name)) as source:
        # what a dictionary stands for is looked up for the rows that are wanted, not for whole groups
        texts = _LAYOUTS[layout.TOKENS].dictionary if name.startswith(f"{layout.TOKENS}/") else None
        file = pq.ParquetFile(source, read_dictionary=texts)
        schema = pa.schema([_as_read(field) for field in file.schema_arrow if columns is None or field.name in columns])
        index = {file.schema.column(i).path: i for i in range(len(file.schema))}
        found = []
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if _may_hold(group, index, wanted):
                found.append(_rows_of_group(file, number, wanted, schema, _known(group, index, wanted)))
    return pa.concat_tables([schema.empty_table(), *found])


def _as_read(field: pa.Field) -> pa.Field:
    decoded = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, decoded)


def _rows_of_group(
    file: pq.ParquetFile, number: int, wanted: dict[str, int], schema: pa.Schema, known: dict[str, int | None]
) -> pa.Table:
    keys = [column for column in wanted if column not in known]
    others = [column for column in schema.names if column not in known and column not in wanted]
    n_rows, place, read = file.metadata.row_group(number).num_rows, None, []
    if keys:
        read.append(file.read_row_group(number, keys, use_threads=False))
        place = pc.indices_nonzero(reduce(pc.and_, [pc.equal(read[0][column], wanted[column]) for column in keys]))
        if not len(place):
            return schema.empty_table()
    if others:
        read.append(file.read_row_group(number, others, use_threads=False))
    if place is not None and len(place) < n_rows:
        n_rows, read = len(place), [rows.take(place) for rows in read]
    given = {name: rows[name] for rows in read for name in rows.column_names}
    arrays = [given[f.name] if f.name in given else pa.repeat(pa.scalar(known[f.name], f.type), n_rows) for f in schema]
    return pa.table(arrays, names=schema.names).cast(schema)


def _may_hold(group: Any, index: dict[str, int], wanted: dict[str, int]) -> bool:
    for column, value in wanted.items():
        found = group.column(index[column]).statistics
        if found is not None and found.has_min_max and not found.min <= value <= found.max:
            return False
    return True


def _known(group: Any, index: dict[str, int], wanted: dict[str, int]) -> dict[str, int | None]:
    """Columns that need not be read: all have the wanted value, or all are NULL."""
    known: dict[str, int | None] = {}
    for column, i in index.items():
        found = group.column(i).statistics
        if found is None or not found.has_null_count:
            continue
        if found.null_count == group.num_rows:
            known[column] = None
        elif column in wanted and found.null_count == 0 and found.has_min_max and found.min == found.max:
            known[column] = wanted[column]
    return known
