"""The recordings in tests/data/collapses are whole, and are what their manifest says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collectors import open_run
from tests.benchmarks.collapses.modes import MODES
from tests.benchmarks.collapses.table import label_of, step_table

FOLDER = Path(__file__).parents[2] / "data" / "collapses"
RUNS = json.loads((FOLDER / "manifest.json").read_text())["runs"]


@pytest.mark.parametrize("entry", RUNS, ids=lambda e: e["id"])
def test_a_recording_is_what_its_manifest_says(entry):
    run = open_run(FOLDER / entry["store"])
    table = step_table(run)
    found = label_of(table, faulty=not entry["twin"])
    assert not run.damaged and len(table) == entry["n_rows"]
    assert (found.label, found.onset_step) == (entry["label"], entry["onset_step"])
    with_tokens = [row[0] for row in run.sql("SELECT DISTINCT step FROM tokens ORDER BY step").fetchall()]
    every = 20 * entry["updates_per_iteration"]
    assert with_tokens and all(step % every < entry["updates_per_iteration"] for step in with_tokens)


def test_every_mode_has_one_collapse_and_there_are_two_twins():
    assert {e["failure_mode"] for e in RUNS if e["label"] == "collapsed"} == {m.name for m in MODES}
    assert sum(e["label"] == "healthy" for e in RUNS) == 2 == len(RUNS) - len(MODES)
