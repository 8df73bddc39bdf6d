"""`mhpo check RUN… [--json] [--fail-on warning|critical] [--set name=value]… [--notify]`"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from app.evidence import with_evidence
from app.stored_runs import changes, named_runs
from app.text import visible
from collectors import alarms as stored_alarms
from collectors import notify
from collectors.incidents import Incidents
from collectors.reader import Run, open_run
from collectors.writers import has_writer
from mhpo_core.alarms import CRITICAL, MODES, WARNING, Alarm, AlarmEngine, Settings

_FINDING = 1
_TOLD_EVERY = 1000
_SEVERITIES = (WARNING, CRITICAL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, folders of them, or s3://bucket/folder")
    parser.add_argument("--json", action="store_true", help="print JSON alone: {run id: [alarm, …]}")
    parser.add_argument("--fail-on", choices=_SEVERITIES, help="exit with 1 if there is such an alarm, or a worse one")
    parser.add_argument(
        "--set", metavar="name=value", dest="changes", action="append", default=[], help="change a threshold"
    )
    parser.add_argument(
        "--notify", action="store_true", help="tell the addresses in MHPO_NOTIFY of incidents they were not told of"
    )
    parser.add_argument("--thresholds", action="store_true", help="print every threshold as name=value, and stop")


def run(options: argparse.Namespace) -> int:
    settings = Settings().changed(changes(options.changes))
    if options.thresholds:
        print("\n".join(f"{name}={value:g}" for name, value in vars(settings).items()))
        return 0
    if options.notify:
        notify.require_ready()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, path in named_runs(options.runs).items():
        with open_run(path) as opened:
            first: list[Alarm] = []
            alarms, engine = stored_alarms.check(
                opened, settings, Incidents(settings.clear, first.append), _progress(name)
            )
            if not options.changes:
                _store(opened, alarms)
            if options.notify:
                _tell(name, opened, first)
            found[name] = [with_evidence(opened, alarm) for alarm in alarms]
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
        if not options.json:
            _print(name, alarms, engine)
    if options.json:
        print(json.dumps(_json(found), indent=2, allow_nan=False))
    failing = _SEVERITIES[_SEVERITIES.index(options.fail_on) :] if options.fail_on else ()
    return _FINDING if any(a["severity"] in failing for alarms in found.values() for a in alarms) else 0


def _progress(name: str) -> Callable[[int], None]:
    """Counts steps on a terminal, and nowhere else."""

    def told(steps: int) -> None:
        if steps % _TOLD_EVERY == 0:
            sys.stderr.write(f"\r\x1b[Kcheck {visible(name, 60)}: {steps:,} steps")
            sys.stderr.flush()

    return told if sys.stderr.isatty() else lambda steps: None


def _store(opened: Run, alarms: list[Alarm]) -> None:
    """Keep what was found with a run that nobody writes and that has no alarms yet; a read-only one stays as it is."""
    with suppress(OSError):
        if not opened.files.names["raw_alarms"] and not has_writer(opened.storage):
            stored_alarms.store(opened, alarms)


def _tell(name: str, opened: Run, incidents: list[Alarm]) -> None:
    outcome = notify.tell_of(visible(name), opened, incidents)
    if outcome is not None and outcome.problem:
        print(f"mhpo check: {visible(name)}: the notification failed: {outcome.problem}", file=sys.stderr)


def _print(name: str, alarms: list[Alarm], engine: AlarmEngine) -> None:
    counts = {s: sum(a.severity == s for a in alarms) for s in _SEVERITIES}
    print(f"{visible(name, 200)}: {counts[CRITICAL]} critical, {counts[WARNING]} warnings")
    for alarm in alarms:
        mark = "✗" if alarm.severity == CRITICAL else "!"
        print(f"  {mark} {visible(alarm.message, 500)}")
        if alarm.severity == CRITICAL:
            mode, good = MODES[alarm.mode], alarm.evidence["last_good_step"]
            print(f"    {mode.title}: {mode.cause}.")
            print(f"    Last step before the first sign: {'none' if good is None else good}.")
            for text in alarm.advice:
                print(f"    - {text}")
    if engine.missing:
        print(f"  Not judged for lack of data: {', '.join(engine.missing)}.")
        for how in sorted(set(engine.missing.values())):
            print(f"    to have more, {how}")


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
