"""What is known of the alarms' own quality, as the benchmark measured it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "about_alarms.json"
"""Written by `make bench-alarms`, never by hand."""


@dataclass(frozen=True)
class About:
    """Paragraphs, and one row per rule."""

    text: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]


def about_alarms() -> About:
    """How often the alarms were right on labelled runs, beside rules and tools in use."""
    if not MEASURED.exists():
        return About(("Not measured yet: `make bench-alarms RUNS=…` writes the table.",), ())
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    return About(tuple(found["text"]), tuple(found["rows"]))
