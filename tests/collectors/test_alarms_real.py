"""The alarm engine on recorded collapses of real training runs, and on their healthy twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collectors import open_run
from collectors.alarms import check

FOLDER = Path(__file__).parents[1] / "data" / "collapses"
RUNS = json.loads((FOLDER / "manifest.json").read_text())["runs"]
LATE = 2
NAMED = {
    "nan": {"non-finite"}, "reward-hack": {"reward-hacking"}, "length-blowup": {"length-blow-up"},
    "entropy-collapse": {"mode-collapse"}, "mismatch": {"stale-batch"}, "mismatch-growth": {"stale-batch"},
}  # fmt: skip
"""Failure mode of the preset → what an alarm before the onset must call it."""


@pytest.mark.parametrize("entry", RUNS, ids=lambda entry: entry["id"])
def test_a_collapse_is_told_and_named_and_a_healthy_run_is_left_alone(entry: dict[str, Any]) -> None:
    with open_run(FOLDER / entry["store"]) as run:
        critical = [a for a in check(run)[0] if a.severity == "critical"]
    if entry["label"] == "healthy":
        assert critical == []
        return
    told = [a for a in critical if entry["fault_step"] <= a.step <= entry["onset_step"] + LATE]
    assert told and told[0] == critical[0], "nothing is raised before the cause"
    assert {a.mode for a in told} >= NAMED.get(entry["failure_mode"], set())
