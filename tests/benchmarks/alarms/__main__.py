"""Score alarm engines on labelled runs and print the table; `--write NAME` also puts it where it is read."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from mhpo_core.errors import ConfigError
from tests.benchmarks.alarms.labelled import COLLAPSED, HEALTHY, LabelledRun, load
from tests.benchmarks.alarms.ours import OURS, ours
from tests.benchmarks.alarms.peers import PEERS, peers
from tests.benchmarks.alarms.rules import logged_by, threshold_rules
from tests.benchmarks.alarms.score import Score, courses, score
from tests.benchmarks.alarms.table import course_table, records, run_table, table

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "tests" / "benchmarks" / "README.md"
FIGURES = ROOT / "app" / "about_alarms.json"
DATA = {
    "real": "RL runs of others, from logs in public repositories, labelled by eye",
    "induced": "runs of the training core with a cause of collapse put there on purpose, and their healthy twins",
}
"""Name for `--write` → what the runs are."""

ENGINES: tuple[Callable[[LabelledRun], dict[str, list[int]]], ...] = (ours, threshold_rules, peers)


def measure(runs: Sequence[LabelledRun]) -> dict[str, dict[str, list[int]]]:
    """Name of each rule → id of each run that it could be asked about → rows at which it raised."""
    found: dict[str, dict[str, list[int]]] = {}
    for i, run in enumerate(runs):
        print(f"\r{i + 1}/{len(runs)} {run.id:.60}\033[K", end="", file=sys.stderr, flush=True)
        for engine in ENGINES:
            for name, rows in engine(run).items():
                found.setdefault(name, {})[run.id] = rows
    print("\r\033[K", end="", file=sys.stderr)
    return found


def report(runs: Sequence[LabelledRun], scores: dict[str, Score], raised: dict[str, dict[str, list[int]]]) -> list[str]:
    """The tables, as Markdown."""
    by = {label: logged_by(runs, label) for label in (COLLAPSED, HEALTHY)}
    logged = {name: f"{n} collapsed, {by[HEALTHY][name]} healthy" for name, n in by[COLLAPSED].items()}
    missing = {peer.package: peer.install for peer in PEERS if peer.missing}
    rows = sum(len(run.rows) for run in runs)
    lines = [
        f"{_described(runs, COLLAPSED)}, {_described(runs, HEALTHY)}; {rows:,} rows. Measured {date.today()}.",
        "",
        *table(scores, logged, missing),
    ]
    found = {name: courses(runs, alarms) for name, alarms in raised.items()}
    if found.get(OURS):
        lines += ["", *course_table(found), "", f"Each of them, {OURS}:", "", *run_table(found[OURS])]
    elif scores[OURS].missed:
        lines += ["", f"{OURS} misses {', '.join(scores[OURS].missed)}."]
    return lines


def _described(runs: Sequence[LabelledRun], label: str) -> str:
    chosen = [run for run in runs if run.label == label]
    repositories = {run.repository for run in chosen if run.repository}
    return f"{len(chosen)} {label} runs" + (f" from {len(repositories)} repositories" if repositories else "")


def write(name: str, lines: Sequence[str], rules: list[dict[str, Any]]) -> None:
    """Put the tables into the guide, between the marks of their name, and the figures into the app.

    Raises:
        ConfigError: the guide has no such marks.
    """
    begin, end = f"<!-- alarms {name} -->\n", f"<!-- end of alarms {name} -->"
    text = GUIDE.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ConfigError(f"bench-alarms: {GUIDE} lacks the marks {begin.strip()} and {end}, each once. Add them.")
    head, tail = text.split(begin)[0], text.split(end)[1]
    GUIDE.write_text(head + begin + "\n" + "\n".join(lines) + "\n\n" + end + tail)
    known: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    known[name] = {"date": str(date.today()), "data": DATA[name], "rules": rules}
    FIGURES.write_text(json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench-alarms", description=__doc__)
    parser.add_argument("runs", type=Path, help="folder with manifest.json")
    parser.add_argument("--write", choices=sorted(DATA), help="what the runs are")
    args = parser.parse_args()
    try:
        runs = list(load(args.runs))
        if not runs:
            raise ConfigError(
                f"bench-alarms: no run of {args.runs} is labelled, allowed are {COLLAPSED} and {HEALTHY}. Label one."
            )
        raised = measure(runs)
        scores = {name: score([r for r in runs if r.id in found], found) for name, found in raised.items()}
        lines = report(runs, scores, raised)
        print("\n".join(lines))
        if args.write:
            write(args.write, lines, records(scores, {name: courses(runs, found) for name, found in raised.items()}))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
