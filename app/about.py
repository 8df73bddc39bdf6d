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
    """One set of labelled runs, and how each rule or tool did on it.

    Args:
        title: what the runs are, and when they were scored.
        rows: one per rule, this engine first.
    """

    title: str
    rows: tuple[dict[str, Any], ...]


def about_alarms() -> tuple[About, ...]:
    """How often the alarms were right on labelled runs, beside what is in use; nothing where nobody measured."""
    if not MEASURED.exists():
        return ()
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return tuple(
        About(f"{one['data'][0].upper()}{one['data'][1:]}; {one['date']}", tuple(_row(r) for r in one["rules"]))
        for one in found.values()
    )


def _row(rule: dict[str, Any]) -> dict[str, Any]:
    lead = rule["median_lead_steps"]
    return {
        "rule": rule["rule"],
        "collapses found": f"{rule['detected']} of {rule['collapsed']}",
        "95 % interval": _interval(rule["detected_interval"]),
        "before the onset": rule["early"],
        "median lead, steps": "–" if lead is None else f"{lead:g}",
        "found by chance": f"{rule['chance']:.0f} %" if rule["chance"] is not None else "–",
        "healthy runs alarmed": f"{rule['healthy_alarmed']} of {rule['healthy']}",
        "95 % interval, healthy": _interval(rule["healthy_interval"]),
    }


def _interval(bounds: list[float] | None) -> str:
    return "–" if not bounds else f"{bounds[0]:.0f} to {bounds[1]:.0f} %"
