"""`mhpo import SRC… --out RUNS [--format auto|NAME] [--name N] [--follow]`"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from app.text import visible
from collectors.importers import FORMATS, Imported, import_run

_POLL_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", metavar="SRC", nargs="+", help="files and folders that one training wrote")
    parser.add_argument("--out", metavar="RUNS", required=True, help="folder of runs")
    parser.add_argument("--format", default="auto", metavar="NAME", help=f"auto, mhpo, {', '.join(FORMATS)}")
    parser.add_argument("--name", help="of the run; default: that of the first source")
    parser.add_argument("--objective", default="ppo_clip", metavar="NAME", help="that trained; default: ppo_clip")
    parser.add_argument("--follow", action="store_true", help="keep taking what the training adds, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print JSON alone")


def run(options: argparse.Namespace) -> int:
    done = _import(options)
    _tell(done, options.json)
    while options.follow:
        time.sleep(_POLL_SECONDS)
        more = _import(options)
        if more.steps and not options.json:
            print(f"{visible(str(more.path), 300)}: {more.steps:,} steps more.", flush=True)
    return 0


def _import(options: argparse.Namespace) -> Imported:
    def progress(steps: int) -> None:
        if steps % 200 == 0:
            sys.stderr.write(f"\r\x1b[Kimport {steps:,} steps")
            sys.stderr.flush()

    terminal = sys.stderr.isatty()
    try:
        return import_run(
            [Path(source) for source in options.sources], Path(options.out), format=options.format, name=options.name,
            objective=options.objective, progress=progress if terminal else lambda steps: None,
        )  # fmt: skip
    finally:
        if terminal:
            sys.stderr.write("\r\x1b[K")


def _tell(done: Imported, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_as_dict(done), indent=2))
        return
    titles = "; ".join(FORMATS[name].title if name in FORMATS else name for name in done.formats)
    print(f"{visible(str(done.path), 300)}: read as {titles}.")
    added = [f"{done.steps:,} steps", f"{done.tokens:,} tokens", f"{done.sequences:,} completions"]
    print(f"Added {', '.join(part for part in added if not part.startswith('0 ')) or 'nothing new'}.")
    for note in done.notes:
        print(f"Note: {visible(note, 300)}")
    if done.unmapped:
        print(f"Kept under their own names: {visible(', '.join(done.unmapped), 2000)}.")
    if possible := [one.name for one in done.diagnostics if not one.missing]:
        print("Possible with this data:")
        print("".join(f"  {name}\n" for name in possible), end="")
    if missing := [one for one in done.diagnostics if one.missing]:
        print("Not possible, and what would add it:")
        for how in dict.fromkeys(one.how for one in missing):
            print("".join(f"  {one.name}\n" for one in missing if one.how == how), end="")
            print(f"    → {how}")


def _as_dict(done: Imported) -> dict[str, object]:
    return {
        "run": str(done.path), "formats": done.formats, "framework": done.framework, "steps": done.steps,
        "tokens": done.tokens, "sequences": done.sequences, "unmapped": done.unmapped, "notes": done.notes,
        "diagnostics": [{"name": d.name, "missing": list(d.missing), "how": d.how} for d in done.diagnostics],
    }  # fmt: skip
