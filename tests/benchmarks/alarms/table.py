"""Figures as Markdown, and as the file from which the app tells what its alarms are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tests.benchmarks.alarms.score import Course, Score, wilson

_HEAD = (
    "| rule | collapses detected | strictly before | median lead, steps | chance | healthy runs alarmed | "
    "false alarms per 1,000 rows | logged by |"
)
_COURSE_HEAD = (
    "| rule | alarm from the fault on | of them after the onset | fault → alarm, steps | alarm → onset, steps | "
    "alarm → onset, of the run's length until then | alarm also before the fault |"
)


def table(scores: Mapping[str, Score], logged: Mapping[str, str], missing: Mapping[str, str]) -> list[str]:
    """One row per engine.

    Args:
        scores: by name.
        logged: name of a rule on one column → how many runs log it.
        missing: name of a peer → command that installs it.
    """
    lines = [_HEAD, "|---|---|---|---|---|---|---|---|"]
    for name, s in scores.items():
        cells = (
            name,
            f"{s.detected}/{s.collapsed} ({_interval(s.detected, s.collapsed)})",
            str(s.early),
            _number(s.median_lead),
            _number(s.chance_percent, " %", 1),
            f"{s.healthy_alarmed}/{s.healthy}, {_number(s.healthy_percent, ' %', 1)} "
            f"({_interval(s.healthy_alarmed, s.healthy)})",
            _number(s.false_alarms_per_1000, "", 2),
            logged.get(name, ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | not installed: `{command}` | | | | | | |" for name, command in missing.items()]
    return lines


def course_table(courses: Mapping[str, Sequence[Course]]) -> list[str]:
    """One row per engine, over the collapses with a known fault; medians with the smallest and the largest."""
    lines = [_COURSE_HEAD, "|---|---|---|---|---|---|---|"]
    for name, found in courses.items():
        caught = [c for c in found if c.alarm is not None]
        cells = (
            name,
            f"{len(caught)}/{len(found)} ({_interval(len(caught), len(found))})",
            str(sum((c.lead or 0) <= 0 for c in caught)),
            _spread([c.delay for c in caught]),
            _spread([c.lead for c in caught]),
            _spread([c.lead_percent for c in caught], " %"),
            str(sum(c.before for c in found)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run_table(courses: Sequence[Course]) -> list[str]:
    """One row per collapse with a known fault, of one engine."""
    lines = ["| run | fault | alarm | onset | alarm → onset |", "|---|---|---|---|---|"]
    for c in courses:
        share = "" if c.lead is None else f"{c.lead:g} steps, {round(c.lead_percent or 0)} %"
        lines.append(f"| {c.run} | {c.fault:g} | {_number(c.alarm)} | {c.onset:g} | {share} |")
    return lines


def records(scores: Mapping[str, Score], courses: Mapping[str, Sequence[Course]]) -> list[dict[str, Any]]:
    """The same figures for a program; None where there is nothing to measure. Shares and intervals are in percent."""
    return [
        {
            "rule": name,
            "detected": s.detected,
            "collapsed": s.collapsed,
            "detected_interval": _rounded(*wilson(s.detected, s.collapsed)),
            "early": s.early,
            "median_lead_steps": s.median_lead,
            "chance": _rounded(s.chance_percent)[0],
            "healthy_alarmed": s.healthy_alarmed,
            "healthy": s.healthy,
            "healthy_interval": _rounded(*wilson(s.healthy_alarmed, s.healthy)),
            "false_alarms_per_1000_rows": _rounded(s.false_alarms_per_1000)[0],
            "after_fault": _after_fault(courses.get(name, ())),
        }
        for name, s in scores.items()
    ]


def _after_fault(courses: Sequence[Course]) -> dict[str, Any] | None:
    if not courses:
        return None
    caught = [c for c in courses if c.alarm is not None]
    return {
        "collapsed": len(courses),
        "alarmed": len(caught),
        "alarmed_before": sum(c.before for c in courses),
        "median_delay_steps": _median([c.delay for c in caught]),
        "median_lead_steps": _median([c.lead for c in caught]),
        "median_lead": _rounded(_median([c.lead_percent for c in caught]))[0],
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None


def _rounded(*values: float | None) -> list[float | None]:
    return [None if v is None else round(v, 2) for v in values]


def _interval(part: int, whole: int) -> str:
    low, high = wilson(part, whole)
    return f"{low:.0f}–{high:.0f} %"


def _number(value: float | None, unit: str = "", digits: int | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:g}{unit}" if digits is None else f"{value:.{digits}f}{unit}"


def _spread(values: Sequence[float | None], unit: str = "") -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    return f"{round(median(known))}{unit} ({round(min(known))} to {round(max(known))})"
