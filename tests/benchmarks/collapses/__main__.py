"""`python -m tests.benchmarks.collapses FOLDER [--seeds N] [--runs ID…] [--slim]`"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging

from tests.benchmarks.collapses.generate import generate, write_manifest
from tests.benchmarks.collapses.labels import Label
from tests.benchmarks.collapses.modes import Case, cases


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.collapses", description=__doc__)
    parser.add_argument("folder", type=Path, help="runs that are there are not trained again")
    parser.add_argument("--seeds", type=int, default=3, help="faulty runs per mode, and as many twins (default: 3)")
    parser.add_argument("--runs", metavar="ID", nargs="+", help="only these, for instance nan-0 or nan-twin-0")
    parser.add_argument("--slim", action="store_true", help="stores of some 100 kB: tokens of every 20th iteration")
    options = parser.parse_args()
    torch.set_num_threads(1)  # runs repeat bit for bit, and leave the other cores alone
    logging.disable_progress_bar()
    every = cases(options.seeds)
    wanted = [c for c in every if options.runs is None or c.id in options.runs]
    print("| run | label | peak | end | onset step | fault step |\n|---|---|---|---|---|---|")
    for case in generate(options.folder, wanted, slim=options.slim):
        found = write_manifest(options.folder, every)
        print(row(case, next(label for c, label in found if c == case)), flush=True)


def row(case: Case, label: Label) -> str:
    """One line of the table."""
    cells = [case.id, label.label, f"{label.peak:.2f}", f"{label.end:.2f}", label.onset_step, case.fault_step]
    return "| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    main()
