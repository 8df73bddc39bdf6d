"""Text of other programs, line by line: whatever encoding, cut off at the end, with numbers written in many ways."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from collectors.importers.steps import Notes
from mhpo_core.errors import StoreError

LONGEST_LINE = 1 << 28
"""Bytes; a longer one is no line of a log."""

_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_HEAD = 1 << 16


def head(path: Path, size: int = _HEAD) -> str:
    """The beginning of a file as text; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(size)
    except OSError:
        return ""
    return data.decode(_encoding(data), "replace")


def first_object(path: Path) -> dict[str, Any]:
    """The JSON object in the first line that holds one; empty if the first line with text is no whole object."""
    for line in head(path, 1 << 20).splitlines():
        if line.strip():
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                return {}
            return found if isinstance(found, dict) else {}
    return {}


def lines(path: Path, notes: Notes) -> Iterator[tuple[int, str, bool]]:
    """Number from 1, text without its end, and whether the line has an end, of every line that is not empty.

    Raises:
        StoreError: the file cannot be read, or a line has no end for 256 MB.
    """
    try:
        with path.open("rb") as file:
            encoding = _encoding(file.read(4))
            if encoding == "utf-16":
                yield from _of_text(path, encoding)
                return
            file.seek(3 if encoding == "utf-8-sig" else 0)
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    raise StoreError(f"import: line {number} of {path} is longer than 256 MB. Is it a log of lines?")
                text = _decoded(line, path, number, notes).rstrip("\r\n")
                if text.strip():
                    yield number, text, line.endswith(b"\n")
    except OSError as error:
        raise StoreError(f"import: {path} cannot be read ({error}). Check the path and its permissions.") from None


def objects(
    path: Path, notes: Notes, read: Callable[[Path, Notes], Iterator[tuple[int, str, bool]]] = lines
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line of a file of JSON lines; a line that is none is noted and left out.

    Args:
        read: what yields its lines, as `lines` does.

    Raises:
        StoreError: no line holds an object, or the file cannot be read.
    """
    seen, odd = 0, 0
    for number, line, ends in read(path, notes):
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError(f"a {type(found).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            odd += 1
            kind = "A line is no JSON object and is left out" if ends else "The last line is cut off and is left out"
            notes.add(kind, f"line {number} of {path.name}, {str(error)[:80]}")
            continue
        seen += 1
        yield number, found
    if odd and not seen:
        raise StoreError(f"import: no line of {path} is a JSON object. Give a file with one JSON object per line.")


def number(value: object) -> float | None:
    """A number in any of the ways in which it is written; None if it is none. NaN and ±Inf are numbers, null is not."""
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, str) and "_" not in value:  # Python reads 1_000, nobody else writes it
        try:
            return float(value.strip().strip("'\"").replace("Infinity", "inf"))
        except ValueError:
            return None
    if isinstance(value, list) and len(value) == 1:
        return number(value[0])
    return None


def step_number(value: object) -> int | None:
    """A whole number ≥ 0 in any of the ways in which it is written; None if it is none."""
    found = number(value)
    return int(found) if found is not None and math.isfinite(found) and found == int(found) and found >= 0 else None


def numbers(given: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of an object, those of objects in it as "outer/inner"; everything else is left out."""
    found: dict[str, float] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif (as_number := number(value)) is not None:
            found[f"{prefix}{name}"] = as_number
    return found


def _encoding(data: bytes) -> str:
    return next((encoding for bom, encoding in _BOMS.items() if data.startswith(bom)), "utf-8")


def _decoded(line: bytes, path: Path, number: int, notes: Notes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        notes.add("Bytes that are not UTF-8 are shown as �", f"line {number} of {path.name}")
        return line.decode("utf-8", "replace")


def _of_text(path: Path, encoding: str) -> Iterator[tuple[int, str, bool]]:
    with path.open(encoding=encoding, errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\r\n"), line.endswith("\n")
