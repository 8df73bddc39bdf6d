"""TensorBoard event files, read without TensorBoard: the scalars of their summaries.

A file is a row of records (length, CRC of the length, an Event message, CRC of the message). Field numbers are those of
tensorflow/core/util/event.proto, framework/summary.proto and framework/tensor.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

from collectors.importers import wire
from collectors.importers.steps import Notes
from mhpo_core.errors import StoreError

_LARGEST = 1 << 26
"""Bytes; a larger record holds an image or a graph, and is passed over."""
_CASTAGNOLI = 0x82F63B78
_REALS = {1: ("f", 5), 2: ("d", 6)}
"""dtype → code of struct, field number of the values; DT_FLOAT and DT_DOUBLE."""
_INTEGERS = {3: ("i", 7), 4: ("B", 7), 5: ("h", 7), 6: ("b", 7), 9: ("q", 10), 10: ("?", 11)}
"""The same of the integers and of booleans."""


def is_event_file(path: Path) -> bool:
    """True if the file begins with a record."""
    try:
        with path.open("rb") as file:
            header = file.read(12)
    except OSError:
        return False
    return len(header) == 12 and _has_its_crc(header)


def scalars(path: Path, notes: Notes) -> Iterator[tuple[int, str, float, float | None]]:
    """Step, tag, value and wall time of every scalar, in the order of the file."""
    for index, record in enumerate(_records(path, notes), 1):
        try:
            yield from _of_event(record, notes)
        except (wire.WireError, struct.error):
            notes.add("A record is damaged and is left out", f"record {index} of {path.name}")


def _records(path: Path, notes: Notes) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            at = 0
            while header := file.read(12):
                at += len(header)
                if len(header) == 12 and not _has_its_crc(header):
                    if at == 12:
                        raise StoreError(
                            f"import: {path} is no event file (its first record has another checksum). Give one."
                        )
                    notes.add("An event file is damaged and is read up to there", f"byte {at - 12} of {path.name}")
                    return
                length = int.from_bytes(header[:8], "little")
                if len(header) < 12 or length + 4 > size - at:
                    notes.add("The last record is cut off and is left out", path.name)
                    return
                at += length + 4
                if length <= _LARGEST:
                    yield file.read(length)
                else:
                    notes.add("A record of more than 64 MB is left out", f"byte {at - length - 16} of {path.name}")
                file.seek(at)
    except OSError as error:
        raise StoreError(f"import: {path} cannot be read ({error}). Check the path and its permissions.") from None


def _of_event(data: bytes, notes: Notes) -> list[tuple[int, str, float, float | None]]:
    wall, step, summaries = None, 0, []
    for number, kind, value in wire.fields(data):
        if (number, kind) == (1, wire.FIXED64):
            (wall,) = wire.reals(value, "d")
        elif (number, kind) == (2, wire.VARINT):
            assert isinstance(value, int)
            step = wire.signed(value)
        elif (number, kind) == (5, wire.BYTES):
            assert isinstance(value, bytes)
            summaries.append(value)
    found = []
    for inner in (inner for summary in summaries for inner in wire.messages(summary, 1)):
        tag, scalar = _of_value(inner)
        if scalar is None:
            notes.add("A summary that is no scalar is left out", f"step {step}, {tag[:60]!r}")
        elif step < 0:
            notes.add("A scalar of a step below 0 is left out", f"step {step}, {tag[:60]!r}")
        else:
            found.append((step, tag, scalar, wall))
    return found


def _of_value(data: bytes) -> tuple[str, float | None]:
    tag, scalar = "", None
    for number, kind, value in wire.fields(data):
        if number == 1 and isinstance(value, bytes):
            tag = wire.text(value)
        elif (number, kind) == (2, wire.FIXED32):
            (scalar,) = wire.reals(value, "f")
        elif number == 8 and isinstance(value, bytes):
            scalar = _of_tensor(value)
    return tag, scalar


def _of_tensor(data: bytes) -> float | None:
    """The element of a tensor of one number, None if it is anything else."""
    parts = list(wire.fields(data))
    dtype = next((value for number, kind, value in parts if (number, kind) == (1, wire.VARINT)), 0)
    if dtype not in (*_REALS, *_INTEGERS) or _elements(parts) != 1:
        return None
    code, values_at = (_REALS | _INTEGERS)[int(dtype)]
    found: list[float] = []
    for number, kind, value in parts:
        if number == 4 and isinstance(value, bytes):
            found += [float(one) for (one,) in struct.iter_unpack(f"<{code}", value)]
        elif number == values_at and dtype in _REALS:
            found += wire.reals(value, code)
        elif number == values_at:
            found += [float(wire.signed(one)) for one in wire.varints(kind, value)]
    return found[0] if len(found) == 1 else None


def _elements(parts: list[wire.Field]) -> int:
    """The product of the sizes in TensorShapeProto; 1 without one."""
    shapes = [value for number, _, value in parts if number == 2 and isinstance(value, bytes)]
    sizes = [_size(dimension) for shape in shapes for dimension in wire.messages(shape, 2)]
    return math.prod(sizes[:8]) if len(sizes) <= 8 else 0


def _size(dimension: bytes) -> int:
    return next(
        (wire.signed(value) for number, _, value in wire.fields(dimension) if number == 1 and isinstance(value, int)), 0
    )


def _has_its_crc(header: bytes) -> bool:
    crc = _crc32c(header[:8])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == int.from_bytes(header[8:], "little")


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
    return value


_TABLE = tuple(_entry(value) for value in range(256))
