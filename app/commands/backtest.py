"""`mhpo backtest RUN… --set name=value… [--labels FILE.json] [--json]`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from app.backtest import Outcome, Score, backtest, first_critical, read_labels, score
from app.stored_runs import changes, named_runs
from app.text import visible
from mhpo_core.alarms import CRITICAL, Settings

_SHOWN = {"now": "as it is", "then": "as tried"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of them")
    parser.add_argument(
        "--set", metavar="name=value", dest="changes", action="append", required=True,
        help="threshold to try; `mhpo check RUN --thresholds` lists them",
    )  # fmt: skip
    parser.add_argument(
        "--labels", type=Path, metavar="FILE.json", help="which runs are healthy and which collapsed, where"
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone")


def run(options: argparse.Namespace) -> int:
    then = Settings().changed(changes(options.changes))
    labels = read_labels(options.labels) if options.labels else {}
    outcomes = backtest(named_runs(options.runs), then, labels=labels)
    if options.json:
        print(json.dumps(_as_json(outcomes), indent=2))
        return 0
    for outcome in outcomes:
        print(f"{visible(outcome.run, 80)}: {_run_text(outcome)}")
    for which, title in _SHOWN.items():
        print(f"{title}: {_score_text(score(outcomes, which), outcomes, which)}")
    return 0


def _run_text(outcome: Outcome) -> str:
    parts = [_first_text(outcome, which) for which in _SHOWN]
    label = outcome.label
    known = f"{label.label} at {label.onset_step}" if label.onset_step is not None else label.label
    return f"{outcome.steps:,} steps, {known}; {' → '.join(parts)}"


def _first_text(outcome: Outcome, which: str) -> str:
    alarms = getattr(outcome, which)
    first, onset = first_critical(alarms), outcome.label.onset_step
    if first is None:
        return "nothing critical"
    count = sum(a.severity == CRITICAL for a in alarms)
    lead = (
        "" if onset is None else f", {onset - first} steps before it" if first <= onset else f", {first - onset} late"
    )
    return f"{count} critical from step {first}{lead}"


def _score_text(found: Score, outcomes: list[Outcome], which: str) -> str:
    alarmed = sum(first_critical(getattr(o, which)) is not None for o in outcomes)
    text = f"{alarmed} of {len(outcomes)} runs have a critical alarm"
    if found.collapsed:
        lead = f", median {median(found.leads):g} steps before" if found.leads else ""
        text += f"; {found.detected} of {found.collapsed} collapses were told by their onset{lead}"
    if found.healthy:
        text += f"; {found.healthy_alarmed} of {found.healthy} healthy runs are alarmed"
    return text + "."


def _as_json(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "runs": {
            o.run: {
                "label": o.label.label, "onset_step": o.label.onset_step, "steps": o.steps,
                **{which: [{"id": a.id, "step": a.step, "severity": a.severity, "rule": a.rule, "mode": a.mode}
                           for a in getattr(o, which)] for which in _SHOWN},
            }
            for o in outcomes
        },
        **{which: vars(score(outcomes, which)) for which in _SHOWN},
    }  # fmt: skip
