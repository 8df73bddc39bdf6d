"""Text of tables, plain or gzip'd, in memory of one line: its lines, and CSV rows under their header."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from collectors.importers.steps import Notes
from mhpo_core.errors import StoreError

LONGEST = 1 << 24
"""Characters; a longer line is no row of a table. What a small archive unpacks to stays below this in memory."""

_GZIP = b"\x1f\x8b"
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_DELIMITERS = (",", ";", "\t")


def first_line(path: Path) -> str:
    """The first line with text that is no comment; empty if there is none, or it is longer than a header is."""
    try:
        with _opened(path) as file:
            for _ in range(100):
                line = file.readline(1 << 20)
                if not line.endswith(("\n", "\r")) and file.read(1):
                    return ""
                if not line or (line.strip() and not line.startswith("#")):
                    return "" if "\x00" in line else line
    except (OSError, EOFError, zlib.error):
        pass
    return ""


def header(line: str, wanted: Callable[[list[str]], bool]) -> tuple[str, list[str]] | None:
    """Delimiter and names of a header line, if there is a delimiter with which the names are wanted."""
    for delimiter in _DELIMITERS:
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            continue
        if len(names) > 1 and wanted(names):
            return delimiter, names
    return None


def csv_rows(path: Path, delimiter: str, names: list[str], notes: Notes) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row below the header; a row with another number of cells is left out."""
    reader = csv.reader((line for _, line, _ in lines(path, notes) if not line.startswith("#")), delimiter=delimiter)
    below = False
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            notes.add("A row cannot be read and is left out", f"row {reader.line_num} of {path.name}, {error}")
            continue
        if not below:
            below = True
        elif len(row) == len(names):
            yield reader.line_num, row
        elif row:
            told = f"row {reader.line_num} of {path.name}, {len(row)} of {len(names)}"
            notes.add("A row has another number of cells than the header and is left out", told)


def lines(path: Path, notes: Notes) -> Iterator[tuple[int, str, bool]]:
    """Number from 1, text with its end, and whether it has one, of every line that is not empty.

    Raises:
        StoreError: the file cannot be read, or a line is longer than LONGEST.
    """
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(LONGEST):
                number += 1
                ends = line.endswith(("\n", "\r"))
                if len(line) >= LONGEST and not ends:
                    raise StoreError(
                        f"import: line {number} of {path} is longer than {LONGEST:,} characters, the most a row of a "
                        "table may have. Give a table with one row per step."
                    )
                if "�" in line:
                    notes.add("Bytes that are not UTF-8 are shown as �", f"line {number} of {path.name}")
                if line.strip():
                    yield number, line, ends
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        notes.add("The compressed file is damaged or cut off and is read up to there", f"{path.name}, {error}")
    except OSError as error:
        raise StoreError(f"import: {path} cannot be read ({error}). Check the path and its permissions.") from None


def _opened(path: Path) -> io.TextIOWrapper:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    raw = io.BufferedReader(gzip.GzipFile(path)) if packed else path.open("rb")
    try:
        start = raw.peek(4)
    except (OSError, EOFError, zlib.error):
        raw.close()
        raise
    encoding = next((name for bom, name in _BOMS.items() if start.startswith(bom)), "utf-8")
    return io.TextIOWrapper(cast(BinaryIO, raw), encoding, "replace", newline="")
