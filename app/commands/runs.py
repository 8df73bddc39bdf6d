"""`mhpo runs RUNS [--json]`"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from app.text import human_bytes, human_duration, visible
from collectors.listing import RunSummary, list_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUNS", type=Path, help="folder that holds the run folders")
    parser.add_argument("--json", action="store_true", help="print JSON alone")


def run(options: argparse.Namespace) -> int:
    summaries = list_runs(options.runs)
    if options.json:
        print(json.dumps([_as_json(s) for s in summaries], indent=2))
    elif not summaries:
        print(f"No run in {options.runs}. `mhpo train --out {options.runs}` makes one.")
    else:
        _print_table([_as_row(s) for s in summaries])
    return 0


def _as_json(summary: RunSummary) -> dict[str, Any]:
    return {
        "run": summary.run_id, "path": str(summary.path), "state": summary.state.name, "health": summary.health,
        "objective": summary.objective, "last_step": summary.last_step, "last_time": summary.last_time,
        "reward_mean": summary.reward, "bytes": summary.size, "problem": summary.problem or None,
    }  # fmt: skip


def _as_row(summary: RunSummary) -> dict[str, str]:
    return {
        "run": visible(summary.run_id),
        "state": summary.state.name,
        "health": summary.problem and visible(summary.problem) or summary.health,
        "objective": visible(summary.objective),
        "step": "–" if summary.last_step is None else f"{summary.last_step:,}",
        "reward": "–" if summary.reward is None else f"{summary.reward:.3f}",
        "newest data": "–" if summary.last_time is None else f"{human_duration(time.time() - summary.last_time)} ago",
        "size": human_bytes(summary.size),
    }


def _print_table(rows: list[dict[str, str]]) -> None:
    widths = {name: max(len(name), *(len(r[name]) for r in rows)) for name in rows[0]}
    for row in [{name: name for name in rows[0]}, *rows]:
        print("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip())
