"""JSON lines whose long arrays are read by Arrow, several times as fast as by Python; all others are left to Python.

A file is read here only if every line of it would be one object to Python too, and every field is of the type that is
expected of it. Else None says that `text.objects` has to read it, which knows what to say about odd lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
from numpy.typing import NDArray

from collectors.importers.text import LONGEST_LINE

INTEGER, TEXT, NOTHING = pa.int64(), pa.string(), pa.list_(pa.null())
NUMBERS, TRUTHS = pa.list_(pa.float64()), pa.list_(pa.bool_())

_BLOCK = 1 << 26


@dataclass(frozen=True)
class Numbers:
    """A list of numbers.

    Args:
        values: null as NaN, true as 1.
        null: where null was.
    """

    values: NDArray[np.float64]
    null: NDArray[np.bool_]


def rows_of(path: Path, fields: Mapping[str, pa.DataType]) -> list[dict[str, Any]] | None:
    """The objects of a file with these fields alone, null where one is missing; None if Python has to read it.

    Args:
        fields: name → INTEGER, TEXT, NUMBERS, TRUTHS or NOTHING (which stands for null, and for an empty list).
    """
    schema, found = pa.schema(list(fields.items())), []
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                if not block.endswith(b"\n"):
                    block += file.readline(LONGEST_LINE)
                found += _rows(_table(block, schema))
    except (OSError, ValueError, pa.ArrowException):  # UnicodeDecodeError is a ValueError
        return None
    return found


def _table(block: bytes, schema: pa.Schema) -> pa.Table:
    block.decode("utf-8")
    if b"Inf" in block and block.count(b"Inf") != block.count(b"Infinity"):
        raise ValueError("Inf, which Arrow takes for a number and Python does not")
    lines = [line for line in map(bytes.strip, block.split(b"\n")) if line]
    table = pj.read_json(
        pa.BufferReader(block),
        pj.ReadOptions(use_threads=False, block_size=len(block) + 1),
        pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    if len(lines) != len(table) or not all(line[:1] == b"{" and line[-1:] == b"}" for line in lines):
        raise ValueError("lines and objects are not the same")
    return table


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    columns = {
        name: _lists(column.combine_chunks()) if pa.types.is_list(column.type) else column.to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _lists(column: pa.ListArray) -> list[Numbers | None]:
    flat = column.values
    null = np.zeros(len(flat), bool)
    if flat.null_count:
        null = flat.is_null().to_numpy(zero_copy_only=False)
    values = flat.cast(pa.float64()).to_numpy(zero_copy_only=False)
    ends, known = column.offsets.to_numpy(), column.is_valid().to_pylist()
    return [
        Numbers(values[a:b], null[a:b]) if given else None
        for a, b, given in zip(ends[:-1], ends[1:], known, strict=True)
    ]
