"""The usual threshold rules, each alone, and their unions. A rule that holds at a row raises at that row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev

from tests.benchmarks.alarms.labelled import LabelledRun

_LEARNT = 5  # values that a rule relative to the run's own past needs first
_WINDOW = 50  # rows of a z-score

Values = Sequence[float]


@dataclass(frozen=True)
class Threshold:
    """A rule on one column.

    Args:
        name: as people say it.
        columns: read from, the first that a row has.
        holds: told the newest value and the finite ones before it, oldest first.
    """

    name: str
    columns: tuple[str, ...]
    holds: Callable[[float, Values], bool]

    def rows(self, rows: Sequence[Mapping[str, float]]) -> list[int]:
        """Rows at which it holds, knowing nothing later."""
        past: list[float] = []
        found = []
        for i, row in enumerate(rows):
            value = next((row[c] for c in self.columns if c in row), None)
            if value is None:
                continue
            if self.holds(value, past):
                found.append(i)
            if math.isfinite(value):
                past.append(value)
        return found


def _over_median(factor: float) -> Callable[[float, Values], bool]:
    return lambda value, past: len(past) >= _LEARNT and 0 < factor * median(past[-_WINDOW:]) < value


def _z_over(bound: float) -> Callable[[float, Values], bool]:
    def holds(value: float, past: Values) -> bool:
        window = past[-_WINDOW:]
        spread = pstdev(window) if len(window) >= _LEARNT else 0.0
        return spread > 0 and value > fmean(window) + bound * spread

    return holds


def _start(past: Values) -> float:
    return fmean(past[:_LEARNT]) if len(past) >= _LEARNT else math.nan


def _below_best(value: float, past: Values) -> bool:
    best = max(past, default=math.nan)
    return best > 0 and value < 0.5 * best


def _mean_below_best(value: float, past: Values) -> bool:
    values = [*past, value]
    means = [fmean(values[i : i + _LEARNT]) for i in range(len(values) - _LEARNT + 1)]
    best = max(means[:-1], default=math.nan)
    return best > 0 and means[-1] < 0.5 * best


_GRADIENT = Threshold("gradient norm > 10 × its running median", ("grad_norm",), _over_median(10))
_KL = Threshold("KL > 1", ("kl",), lambda value, past: value > 1)
_CLIP = Threshold("clip fraction > 0.3", ("clip_region",), lambda value, past: value > 0.3)
_ENTROPY_UP = Threshold("entropy > 2 × its start", ("entropy",), lambda value, past: value > 2 * _start(past))

TYPICAL = (
    _GRADIENT,
    _KL,
    Threshold("entropy < 0.1", ("entropy",), lambda value, past: value < 0.1),
    _CLIP,
    Threshold("reward < 50 % of its running maximum", ("reward",), _below_best),
)
"""What dashboards and guides name most."""

LENIENT = (_GRADIENT, _KL, _CLIP, _ENTROPY_UP)

OTHERS = (
    Threshold("gradient norm > 5 × its running median", ("grad_norm",), _over_median(5)),
    Threshold("gradient norm, z > 3 over 50 rows", ("grad_norm",), _z_over(3)),
    Threshold("KL > 0.5", ("kl",), lambda value, past: value > 0.5),
    Threshold("entropy < 50 % of its start", ("entropy",), lambda value, past: value < 0.5 * _start(past)),
    _ENTROPY_UP,
    Threshold("reward, mean of 5, < 50 % of its running maximum", ("reward",), _mean_below_best),
    Threshold("groups with equal rewards > 0.9", ("zero_std",), lambda value, past: value > 0.9),
    Threshold("truncated > 0.3", ("trunc",), lambda value, past: value > 0.3),
    Threshold("mean importance weight outside [0.5, 2]", ("is_mean",), lambda value, past: not 0.5 <= value <= 2),
    Threshold("largest difference of log p > 5 nats", ("lpdiff_max",), lambda value, past: value > 5),
)

NOT_FINITE = "NaN or ±Inf in any column"
TYPICAL_UNION = "union of the five most named"
LENIENT_UNION = "union of gradient norm > 10 ×, KL > 1, clip fraction > 0.3, entropy > 2 ×"


def logged_by(runs: Sequence[LabelledRun], label: str) -> dict[str, int]:
    """Name of each rule → runs with that label that log what it reads."""
    chosen = [run for run in runs if run.label == label]
    return {
        rule.name: sum(any(c in row for row in run.rows for c in rule.columns) for run in chosen)
        for rule in (*TYPICAL, *OTHERS)
    }


def threshold_rules(run: LabelledRun) -> dict[str, list[int]]:
    """Name of each rule and union → rows at which it holds."""
    found = {rule.name: rule.rows(run.rows) for rule in (*TYPICAL, *OTHERS)}
    found[NOT_FINITE] = [i for i, row in enumerate(run.rows) if not all(map(math.isfinite, row.values()))]
    found[TYPICAL_UNION] = _union(found[rule.name] for rule in TYPICAL)
    found[LENIENT_UNION] = _union(found[rule.name] for rule in LENIENT)
    return found


def _union(found: Iterable[Iterable[int]]) -> list[int]:
    return sorted({row for rows in found for row in rows})
