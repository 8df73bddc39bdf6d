"""The alarm engine on a run: live, as steps are measured, and over a stored one. Both feed it the same numbers.

What the engine makes of a step is stored with the step, as metrics named alarm/…: the view `evaluations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collectors.alarm_files import alarm_file
from collectors.incidents import Incidents, tell
from collectors.reader import Run
from collectors.schema import TRAINER_METRIC, StepKey
from mhpo_core.alarms import Alarm, AlarmEngine, Evaluation, Settings
from mhpo_core.alarms.readings import NAMES
from mhpo_core.alarms.tail import pareto_k
from mhpo_core.metrics import METRICS

PREFIX = "alarm/"
_LEVELS = {"": 0.0, "warning": 1.0, "critical": 2.0}
_COLUMNS = tuple(name for name in METRICS if name in NAMES)
_RATIO = "log_ratio"
COLUMNS = ("step", *_COLUMNS, "metrics", "gradients", "histograms")
"""Of a row of rollup that a summary needs."""

_BATCH = 4096


@dataclass(frozen=True)
class Summary:
    """What the engine is given of a step."""

    step: int
    scalars: dict[str, float | None]
    layers: dict[str, float]


def summary_of(row: dict[str, Any]) -> Summary:
    """The summary of a row of rollup."""
    metrics = {m["name"]: m["value"] for m in row["metrics"] or [] if not m["name"].startswith(PREFIX)}
    layers = {g["parameter"]: g["grad_norm"] for g in row["gradients"] or [] if g["grad_norm"] is not None}
    columns = {name: row[name] for name in _COLUMNS if row[name] is not None}
    shape = _tail_shape([h for h in row["histograms"] or [] if h["quantity"] == _RATIO])
    return Summary(row["step"], metrics | columns | ({} if shape is None else {"k_hat": shape}), layers)


def _tail_shape(histogram: list[dict[str, Any]]) -> float | None:
    """k̂ of the importance ratios, all signs of the advantage together."""
    low, high = ([h[edge] for h in histogram] for edge in ("bin_low", "bin_high"))
    edges, place = np.unique(np.array([low, high], dtype=np.float64), axis=1, return_inverse=True)
    count = np.zeros(edges.shape[1])
    np.add.at(count, place.ravel(), [h["count"] for h in histogram])
    return pareto_k(edges[0], edges[1], count)


def summaries_of(run: Run, before: int | None = None, after: int = -1) -> Iterator[Summary]:
    """Summaries of a run's steps in their order, of the latest attempt at each.

    Args:
        before: only earlier steps.
        after: only later ones.
    """
    # of the histograms only one is needed, and they are most of a row
    names = ", ".join(name for name in COLUMNS if name != "histograms")
    names += f", list_filter(histograms, lambda h: h.quantity = '{_RATIO}') AS histograms"
    where = f"WHERE step > {int(after)}" + ("" if before is None else f" AND step < {int(before)}")
    found = run.sql(f"SELECT {names} FROM latest_rollup {where} ORDER BY step")
    for batch in found.to_arrow_reader(_BATCH):
        yield from map(summary_of, batch.to_pylist())


def engine_for(run: Run, settings: Settings | None = None) -> AlarmEngine:
    """A new engine for the steps of a run."""
    return AlarmEngine(settings, updates_of(run.manifest))


def updates_of(manifest: Mapping[str, Any]) -> int:
    """Optimizer steps per batch of rollouts, as run.json has them."""
    return max(1, int(manifest.get("updates_per_iteration") or 1))


def check(
    run: Run,
    settings: Settings | None = None,
    incidents: Incidents | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> tuple[list[Alarm], AlarmEngine]:
    """Every alarm of a stored run, as a live engine would have raised them, and the engine at its end.

    Args:
        incidents: told of every evaluation.
        progress: called with the number of steps judged so far.
    """
    engine = engine_for(run, settings)
    alarms: list[Alarm] = []
    for number, s in enumerate(summaries_of(run), start=1):
        progress(number)
        found = engine.observe(s.step, s.scalars, s.layers)
        alarms += found.alarms
        if incidents is not None:
            incidents.observe(found)
    return alarms, engine


class LiveAlarms:
    """Watches the steps of a recorder in the order in which they are measured.

    Args:
        past: summaries of the steps before one, as they are stored now; asked when a run continues or is rewound.
        begins: the run has no steps yet.
        updates_per_iteration: optimizer steps per batch of rollouts.
        told: called with each alarm, in the thread that measures.
        incidents: told of every evaluation, in that thread.
    """

    def __init__(
        self,
        settings: Settings | None,
        past: Callable[[int], Iterator[Summary]],
        *,
        begins: bool,
        updates_per_iteration: int = 1,
        told: Callable[[Alarm], None] = lambda alarm: None,
        incidents: Sequence[Incidents] = (),
    ) -> None:
        self._settings, self._past, self._told, self._incidents = settings, past, told, incidents
        self._updates = updates_per_iteration
        self._engine = AlarmEngine(settings, self._updates) if begins else None
        self._last_step = -1

    def watch(self, key: StepKey, rollup: pa.Table) -> tuple[pa.Table, tuple[Alarm, ...]]:
        """The step's row with what the engine made of it, and the alarms it raised."""
        if self._engine is None or key.step <= self._last_step:
            self._engine = AlarmEngine(self._settings, self._updates)
            for incidents in self._incidents:
                incidents.restart()
            for s in self._past(key.step):
                self._follow(self._engine.observe(s.step, s.scalars, s.layers), past=True)
        self._last_step = key.step
        row = {name: rollup[name][0].as_py() for name in COLUMNS if name != "histograms"}
        histograms = rollup["histograms"].combine_chunks().flatten()
        row["histograms"] = histograms.filter(pc.equal(histograms.field("quantity"), _RATIO)).to_pylist()
        summary = summary_of(row)
        found = self._engine.observe(summary.step, summary.scalars, summary.layers)
        for alarm in found.alarms:
            tell(self._told, alarm)
        self._follow(found, past=False)
        return _with_evaluation(rollup, row["metrics"], found), found.alarms

    def _follow(self, found: Evaluation, *, past: bool) -> None:
        for incidents in self._incidents:
            incidents.observe(found, past=past)


def _with_evaluation(rollup: pa.Table, metrics: list[dict[str, Any]], found: Evaluation) -> pa.Table:
    scores = {"level": _LEVELS[found.level], "score": found.score} | found.signals
    added = [{"name": f"{PREFIX}{name}", "value": value} for name, value in scores.items()]
    column = pa.array([[*metrics, *added]], pa.list_(TRAINER_METRIC))
    index = rollup.schema.get_field_index("metrics")
    return rollup.set_column(index, rollup.schema.field(index), column)


def store(run: Run, alarms: list[Alarm]) -> None:
    """Put the alarms of a check into the run.

    Raises:
        OSError: it cannot be written.
    """
    attempts = dict(run.sql("SELECT step, max(attempt) FROM steps_all GROUP BY step").fetchall())
    for alarm in alarms:
        name, data = alarm_file(run.storage, alarm, attempts.get(alarm.step, 0))
        run.storage.write(name, data, fsync=True)
