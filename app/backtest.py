"""What other thresholds would have done: the alarms of stored runs under two settings, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from collectors.alarms import engine_for, summaries_of
from collectors.reader import open_run
from mhpo_core.alarms import CRITICAL, Alarm, Settings
from mhpo_core.errors import ConfigError

HEALTHY, COLLAPSED = "healthy", "collapsed"


@dataclass(frozen=True)
class Label:
    """What a person says about a run.

    Args:
        label: "healthy", "collapsed", or anything else, which counts for nothing.
        onset_step: where it collapsed.
    """

    label: str
    onset_step: int | None = None


@dataclass(frozen=True)
class Outcome:
    """One run under both settings."""

    run: str
    label: Label
    steps: int
    now: tuple[Alarm, ...]
    then: tuple[Alarm, ...]


@dataclass(frozen=True)
class Score:
    """Critical alarms over all labelled runs.

    Args:
        detected: collapses with a critical alarm no later than their onset.
        healthy_alarmed: healthy runs with a critical alarm.
        leads: steps from the first critical alarm to the onset, of the detected ones.
    """

    collapsed: int
    detected: int
    healthy: int
    healthy_alarmed: int
    leads: tuple[int, ...]


def read_labels(path: Path) -> dict[str, Label]:
    """Labels from a JSON file: {"runs": [{"id": …, "label": …, "onset_step": …}, …]}.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["runs"]
        found = {}
        for row in rows:
            onset = row.get("onset_step")
            found[str(row["id"])] = Label(str(row["label"]), None if onset is None else int(onset))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"labels {path}: not readable as labels ({error!r:.100}), allowed is JSON "
            '{"runs": [{"id": "my-run", "label": "healthy" or "collapsed", "onset_step": 120}]}. Correct it.'
        ) from None
    return found


def backtest(
    runs: Mapping[str, str | Path],
    then: Settings,
    now: Settings | None = None,
    labels: Mapping[str, Label] | None = None,
) -> list[Outcome]:
    """The alarms of every run, under the settings of now and those to be tried.

    Args:
        runs: name → where it lies.
        labels: by name of run.

    Raises:
        StoreError: a run cannot be opened.
    """
    found = []
    for name, path in runs.items():
        raised: tuple[list[Alarm], list[Alarm]] = ([], [])
        steps = 0
        with open_run(path) as opened:
            engines = (engine_for(opened, now), engine_for(opened, then))
            for s in summaries_of(opened):
                steps += 1
                for engine, alarms in zip(engines, raised, strict=True):
                    alarms += engine.observe(s.step, s.scalars, s.layers).alarms
        label = (labels or {}).get(name, Label("unlabelled"))
        found.append(Outcome(name, label, steps, tuple(raised[0]), tuple(raised[1])))
    return found


def first_critical(alarms: Iterable[Alarm]) -> int | None:
    """Step of the first critical alarm."""
    return next((a.step for a in alarms if a.severity == CRITICAL), None)


def score(outcomes: Iterable[Outcome], which: str) -> Score:
    """How one of the two settings did on the labelled runs.

    Args:
        which: "now" or "then".
    """
    firsts = [(o, first_critical(getattr(o, which))) for o in outcomes]
    healthy = [first for o, first in firsts if o.label.label == HEALTHY]
    collapsed = [(o.label.onset_step, first) for o, first in firsts if o.label.label == COLLAPSED]
    leads = [onset - first for onset, first in collapsed if onset is not None and first is not None and first <= onset]
    return Score(len(collapsed), len(leads), len(healthy), sum(f is not None for f in healthy), tuple(leads))
