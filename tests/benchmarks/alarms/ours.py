"""Our engine on a labelled run: critical alarms only."""

from __future__ import annotations

from collections.abc import Mapping

from collectors import open_run
from collectors.alarms import check
from mhpo_core.alarms import CRITICAL, AlarmEngine
from tests.benchmarks.alarms.labelled import LabelledRun

OURS = "mhpo"
WITHOUT_TOKENS = "mhpo, from the table of means alone"


_NAMES = {"true_reward": "true_reward_mean"}


def ours(run: LabelledRun) -> dict[str, list[int]]:
    """Rows of the critical alarms: with a run folder from its measured steps, else, and besides, from the table."""
    found = {}
    if run.store is not None:
        alarms, _ = check(open_run(str(run.store)))
        found[OURS] = sorted({run.row_of(alarm.step) for alarm in alarms if alarm.severity == CRITICAL})
    if run.table:
        engine = AlarmEngine()
        evaluations = [
            engine.observe(int(step), _named(row)) for step, row in zip(run.steps.tolist(), run.rows, strict=True)
        ]
        rows = [i for i, e in enumerate(evaluations) if any(a.severity == CRITICAL for a in e.alarms)]
        found[WITHOUT_TOKENS if run.store is not None else OURS] = rows
    return found


def _named(row: Mapping[str, float]) -> dict[str, float]:
    """Columns of a table under names that a reading has."""
    return {_NAMES.get(name, name): value for name, value in row.items()}
