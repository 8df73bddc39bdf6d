"""Values of an Arrow column as text and as JSON, whatever their type."""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow as pa

# DuckDB's infinite dates and times
_INFINITE = {2**31 - 1: "infinity", 1 - 2**31: "-infinity", 2**63 - 1: "infinity", 1 - 2**63: "-infinity"}


def python_values(column: pa.Array) -> list[Any]:
    """The column as Python values, None for NULL; text where Python has no such value."""
    kind = column.type
    if pa.types.is_float32(kind):
        # 0.1 as 32 bits is 0.1 to whoever wrote it, not 0.10000000149011612
        return [None if text is None else float(text) for text in column.cast(pa.string()).to_pylist()]
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        # needs no time zone database, which a small container has not
        values = python_values(column.cast(pa.timestamp(kind.unit)))
        return [v.replace(tzinfo=UTC) if isinstance(v, datetime) else v for v in values]
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError):  # the year 294246, or infinity as a date
        return [_value(v) for v in column]


def in_text(value: Any, nan: str, infinity: str) -> str:
    """A value that is not NULL as one text."""
    if isinstance(value, float) and not math.isfinite(value):
        return nan if math.isnan(value) else infinity if value > 0 else f"-{infinity}"
    if isinstance(value, bool | list | dict):
        return json.dumps(in_json(value), ensure_ascii=False, allow_nan=False)
    if isinstance(value, datetime):
        return value.isoformat(" ")
    return str(in_json(value)) if not isinstance(value, float | Decimal) else _digits(value)


def in_json(value: Any) -> Any:
    """A value as `json.dumps` takes it; NaN and infinities as text, which strict JSON has no numbers for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else in_text(value, "NaN", "Infinity")
    if isinstance(value, Decimal):
        return _number(value)
    if isinstance(value, dict):
        return {str(key): in_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [in_json(item) for item in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _number(value: Decimal) -> int | float | str:
    """Sums of integers are decimals too; text where a float would change the value."""
    if value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else format(value, "f")


def _digits(value: float | Decimal) -> str:
    return format(value, "f") if isinstance(value, Decimal) else repr(value)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError):
        return _INFINITE.get(getattr(scalar, "value", None), "out of range")
