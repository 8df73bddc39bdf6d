"""The protobuf wire format: fields of a message by number, without knowing its schema."""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}

Field = tuple[int, int, int | bytes]
"""Number, wire type, and what the field holds: an unsigned integer for VARINT, bytes for the others."""


class WireError(ValueError):
    """Bytes are no protobuf message."""


def fields(data: bytes) -> Iterator[Field]:
    """Every field of a message in the order of the bytes.

    Raises:
        WireError: the bytes end inside a field, or a field has a wire type that no writer uses any more.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, kind, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise WireError(f"wire type {kind} at byte {at}")
        if size > len(data) - at:
            raise WireError(f"a field of {size} bytes where {len(data) - at} are left")
        yield number, kind, data[at : at + size]
        at += size


def messages(data: bytes, wanted: int) -> Iterator[bytes]:
    """The bytes of every field of that number that holds bytes: inner messages, or texts."""
    for number, kind, value in fields(data):
        if number == wanted and kind == BYTES:
            assert isinstance(value, bytes)
            yield value


def text(value: bytes) -> str:
    """A text; bytes that are not UTF-8 become �."""
    return value.decode("utf-8", "replace")


def signed(value: int, bits: int = 64) -> int:
    """The two's complement that an int32 or int64 is written as."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def varints(kind: int, value: int | bytes) -> list[int]:
    """The unsigned integers of one occurrence of a repeated field, packed or not."""
    if isinstance(value, int):
        return [value]
    if kind != BYTES:
        raise WireError(f"integers with wire type {kind}")
    found, at = [], 0
    while at < len(value):
        one, at = _varint(value, at)
        found.append(one)
    return found


def reals(value: int | bytes, code: str) -> list[float]:
    """The floats ("f") or doubles ("d") of one occurrence of a field, packed or not."""
    size = struct.calcsize(f"<{code}")
    if isinstance(value, int) or len(value) % size:
        raise WireError(f"no whole number of {size}-byte numbers")
    return list(struct.unpack(f"<{len(value) // size}{code}", value))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise WireError("the bytes end inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise WireError("a number of more than 10 bytes")
