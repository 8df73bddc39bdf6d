"""LevelDB's log format, as W&B writes it: records in blocks of 32 KiB, each part with a CRC-32.

A part is CRC (4 bytes), length (2), type (1), data; a record that does not fit is cut into parts of types first, middle
and last. The CRC is that of type and data.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from collectors.importers.steps import Notes
from mhpo_core.errors import StoreError

_BLOCK = 1 << 15
_PART = struct.Struct("<IHB")
_DAMAGED, _FULL, _FIRST, _MIDDLE, _LAST = 0, 1, 2, 3, 4
_LARGEST = 1 << 26
"""Bytes; a larger record holds a table or a picture, and is left out."""


def records(path: Path, start: int, notes: Notes) -> Iterator[bytes]:
    """Every whole record.

    Args:
        start: bytes before the first one; they belong to the first block.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            yield from _joined(_parts(file, start, path, notes), path, notes)
    except OSError as error:
        raise StoreError(f"import: {path} cannot be read ({error}). Check the path and its permissions.") from None


def _joined(parts: Iterator[tuple[int, bytes]], path: Path, notes: Notes) -> Iterator[bytes]:
    record: list[bytes] | None = None
    for kind, data in parts:
        if kind == _FULL:
            yield data
            record = None
        elif kind in (_FIRST, _DAMAGED):
            record = [data] if kind == _FIRST else None
        elif record is not None and kind in (_MIDDLE, _LAST):
            record.append(data)
            if len(record) * _BLOCK > _LARGEST:
                notes.add("A record of more than 64 MB is left out", path.name)
                record = None
            elif kind == _LAST:
                yield b"".join(record)
                record = None


def _parts(file: BinaryIO, at: int, path: Path, notes: Notes) -> Iterator[tuple[int, bytes]]:
    """Type and data of every part; after damage the next block is read."""
    while True:
        left = _BLOCK - at % _BLOCK
        block = file.read(left)
        if not block:
            return
        inside = 0
        while len(block) - inside >= _PART.size:
            crc, length, kind = _PART.unpack_from(block, inside)
            end = inside + _PART.size + length
            if end > len(block) and len(block) < left:
                notes.add("The last record is cut off and is left out", path.name)
                return
            if zlib.crc32(block[inside + 6 : end]) != crc or end > len(block):
                if any(block[inside:]):
                    notes.add("A block is damaged and the rest of it is left out", f"byte {at + inside} of {path.name}")
                yield _DAMAGED, b""
                break
            yield kind, block[inside + _PART.size : end]
            inside = end
        at += len(block)
