"""The commit protocol: write under a temporary name, fsync, rename. Readers never see a half-written file."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# A row group of 131 072 rows is one zstd block per byte stream; pyarrow's default of 20 000 rows a page makes four
# byte streams share one Huffman table and costs 10 % of size. zstd above level 1 is slower and not smaller here.
_OPTIONS: dict[str, Any] = {
    "row_group_size": 131_072,
    "max_rows_per_page": 262_144,
    "store_schema": False,
    "write_page_checksum": True,
    # minimum and maximum of a column that nobody filters by only make the footer larger
    "write_statistics": ["step", "sequence_id", "log_ratio"],
}


def write_parquet(
    path: Path,
    table: pa.Table,
    *,
    fsync: bool,
    dictionary: list[str] | None = None,
    encodings: dict[str, str] | None = None,
    compression: str = "zstd",
) -> None:
    """Commit a table under `path`; after a crash the file is there whole or not at all.

    Args:
        dictionary: columns with few distinct values.
        encodings: Parquet encoding of the other columns.
        compression: "lz4" costs half the time of "zstd" on files of one step, which are merged soon anyway.
        fsync: reach the disk before the rename, so that the file also survives a power cut.
    """
    options = _OPTIONS | {"compression": compression, "compression_level": 1 if compression == "zstd" else None}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink:
            pq.write_table(table, sink, use_dictionary=dictionary or False, column_encoding=encodings, **options)
        _publish(temporary, path, fsync)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, content: object) -> None:
    """Commit a JSON file under `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # a file name or a command line can hold what is not UTF-8; it becomes "?"
    temporary.write_bytes(text.encode("utf-8", "replace"))
    _publish(temporary, path, fsync=True)


def remove_temporary_files(directory: Path) -> None:
    """Delete what a killed writer left behind; only the process that holds the writer's lock may call this."""
    for leftover in directory.rglob("*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _publish(temporary: Path, path: Path, fsync: bool) -> None:
    if fsync:
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    os.replace(temporary, path)
