"""How good alarms are, from the rows at which they were raised.

A collapse is detected when the first alarm not earlier than 25 rows before the onset lies at most 2 rows after it, and
early when it lies strictly before the onset. Chance is the share of such windows that hold an alarm on healthy runs, at
the row numbers of the real onsets. False alarms are episodes on healthy runs: rows at most 10 apart are one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tests.benchmarks.alarms.labelled import COLLAPSED, HEALTHY, LabelledRun

BEFORE, AFTER = 25, 2  # rows around the onset in which an alarm counts
REFRACTORY = 10  # rows
_Z = 1.959964  # of a 95 % interval

Alarms = Mapping[str, Sequence[int]]
"""Id of a run → rows at which something was raised."""


@dataclass(frozen=True)
class Score:
    """Figures of one engine on one set of runs.

    Args:
        leads: steps from the alarm that counts to the onset, of each detected collapse; negative if it came after.
        missed: ids.
        healthy_alarmed: healthy runs with at least one alarm.
        false_alarms: episodes on healthy runs.
        chance_hits, chance_windows: windows on healthy runs with an alarm, and all of them.
    """

    collapsed: int
    detected: int
    early: int
    leads: tuple[float, ...]
    missed: tuple[str, ...]
    healthy: int
    healthy_alarmed: int
    false_alarms: int
    healthy_rows: int
    chance_hits: int
    chance_windows: int

    @property
    def median_lead(self) -> float | None:
        """Steps; None when nothing was detected."""
        return median(self.leads) if self.leads else None

    @property
    def chance_percent(self) -> float | None:
        return _percent(self.chance_hits, self.chance_windows)

    @property
    def healthy_percent(self) -> float | None:
        return _percent(self.healthy_alarmed, self.healthy)

    @property
    def false_alarms_per_1000(self) -> float | None:
        """Episodes per 1000 logged rows of healthy runs."""
        return 1000 * self.false_alarms / self.healthy_rows if self.healthy_rows else None


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def score(runs: Sequence[LabelledRun], alarms: Alarms) -> Score:
    """Score one engine; a run without alarms raised nothing."""
    onsets = [run.onset_row for run in runs if run.label == COLLAPSED and run.onset_row is not None]
    leads, missed, early = [], [], 0
    healthy_alarmed = false_alarms = healthy_rows = hits = windows = 0
    for run in runs:
        rows = sorted(set(alarms.get(run.id, ())))
        if run.label == COLLAPSED:
            hit = detection(rows, run.onset_row or 0)
            if hit is None:
                missed.append(run.id)
                continue
            early += hit < (run.onset_row or 0)
            leads.append((run.onset_step or 0.0) - float(run.steps[hit]))
        elif run.label == HEALTHY:
            healthy_alarmed += bool(rows)
            false_alarms += episodes(rows)
            healthy_rows += len(run.steps)
            fitting = [onset for onset in onsets if onset + AFTER < len(run.steps)]
            windows += len(fitting)
            hits += sum(any(onset - BEFORE <= row <= onset + AFTER for row in rows) for onset in fitting)
    return Score(
        len(leads) + len(missed), len(leads), early, tuple(leads), tuple(missed),
        sum(run.label == HEALTHY for run in runs), healthy_alarmed, false_alarms, healthy_rows, hits, windows,
    )  # fmt: skip


def detection(rows: Sequence[int], onset: int) -> int | None:
    """The alarm that counts for a collapse: the first from BEFORE rows before its onset on, if it is not too late."""
    first = next((row for row in rows if row >= onset - BEFORE), None)
    return first if first is not None and first <= onset + AFTER else None


def episodes(rows: Sequence[int]) -> int:
    """Alarms that are more than REFRACTORY rows from the one before them."""
    return sum(i == 0 or row - rows[i - 1] > REFRACTORY for i, row in enumerate(rows))


def wilson(part: int, whole: int) -> tuple[float, float]:
    """95 % interval of a share, in percent. Source: Wilson 1927, without continuity correction."""
    if not whole:
        return 0.0, 100.0
    p, n, z2 = part / whole, whole, _Z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


@dataclass(frozen=True)
class Course:
    """What one engine said of a collapse whose cause was put there on purpose.

    Args:
        run: id.
        fault, onset: steps.
        alarm: step of the first alarm from the fault on; None if there was none up to AFTER rows after the onset.
        before: it also raised something before the fault.
        length: steps from the start of the run to the onset.
    """

    run: str
    fault: float
    onset: float
    alarm: float | None
    before: bool
    length: float

    @property
    def delay(self) -> float | None:
        """Steps from the fault to the alarm."""
        return None if self.alarm is None else self.alarm - self.fault

    @property
    def lead(self) -> float | None:
        """Steps from the alarm to the onset."""
        return None if self.alarm is None else self.onset - self.alarm

    @property
    def lead_percent(self) -> float | None:
        """Lead as a share of the run's length up to the collapse."""
        return None if self.lead is None else 100 * self.lead / self.length


def courses(runs: Sequence[LabelledRun], alarms: Alarms) -> list[Course]:
    """Of each collapse with a known fault, from the fault on; the window of `score` does not apply."""
    found = []
    for run in runs:
        if run.label != COLLAPSED or run.fault_step is None or run.onset_row is None or run.onset_step is None:
            continue
        rows, fault = sorted(set(alarms.get(run.id, ()))), run.row_of(run.fault_step)
        first = next((row for row in rows if fault <= row <= run.onset_row + AFTER), None)
        found.append(
            Course(
                run.id, run.fault_step, run.onset_step, None if first is None else float(run.steps[first]),
                any(row < fault for row in rows), run.onset_step - float(run.steps[0]),
            )
        )  # fmt: skip
    return found
