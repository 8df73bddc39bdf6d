"""The figures of the alarm benchmark on a made-up folder, worked out by hand, and its loader, rules and peers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collectors import Recorder
from mhpo_core import objectives
from mhpo_core.errors import ConfigError
from tests.benchmarks.alarms import __main__ as bench
from tests.benchmarks.alarms.labelled import LabelledRun, load
from tests.benchmarks.alarms.ours import OURS, WITHOUT_TOKENS, ours
from tests.benchmarks.alarms.peers import PEERS, Peer
from tests.benchmarks.alarms.rules import TYPICAL_UNION, threshold_rules
from tests.benchmarks.alarms.score import Score, courses, score, wilson
from tests.benchmarks.alarms.table import records

MHPO = objectives.create("mhpo")

# id, label, rows, steps per row, onset_row
RUNS = (
    ("c1", "collapsed", 60, 5, 40),
    ("c2", "collapsed", 30, 1, 20),
    ("c3", "collapsed", 30, 1, 5),
    ("c4", "collapsed", 30, 1, 28),
    ("h1", "healthy", 50, 1, None),
    ("h2", "healthy", 30, 1, None),
    ("h3", "healthy", 20, 1, None),
    ("a1", "ambiguous", 30, 1, None),
)
ALARMS = {
    "c1": [10, 30],  # row 10 is before 40 − 25 = 15, so 30 counts: (40 − 30) · 5 = 50 steps early
    "c2": [22],  # two rows late: −2 steps
    "c4": [2],  # before 28 − 25 = 3: missed
    "h1": [0, 10, 21],  # 10 − 0 is one episode, 21 − 10 another
    "h2": [29],
    "a1": [1, 15],
}


def folder(path: Path, runs: Sequence[tuple[str, str, int, int, int | None]] = RUNS) -> Path:
    entries = []
    for name, label, n, per_row, onset in runs:
        steps = [per_row * i for i in range(n)]
        pq.write_table(pa.table({"step": steps, "reward": [0.5] * n}), path / f"{name}.parquet")
        entry: dict[str, object] = {"id": name, "file": f"{name}.parquet", "label": label}
        if onset is not None:
            entry |= {"onset_row": onset, "onset_step": steps[onset]}
        entries.append(entry)
    (path / "manifest.json").write_text(json.dumps({"runs": entries}))
    return path


def made_up(rows: Sequence[Mapping[str, float]], label: str = "healthy", **more: float) -> LabelledRun:
    return LabelledRun("run", label, np.arange(len(rows), dtype=float), rows, **more)


def test_figures_are_those_worked_out_by_hand(tmp_path: Path):
    found = score(list(load(folder(tmp_path))), ALARMS)
    # onsets 40, 20, 5, 28 with two rows after them fit 50 rows: all four, alarmed in [15, 42], [-5, 22], [.., 7] and
    # [3, 30]; 30 rows: 20 and 5 (28 + 2 is beyond the last row), none alarmed; 20 rows: 5, none
    assert found == Score(
        collapsed=4, detected=2, early=1, leads=(50.0, -2.0), missed=("c3", "c4"), healthy=3, healthy_alarmed=2,
        false_alarms=3, healthy_rows=100, chance_hits=4, chance_windows=7,
    )  # fmt: skip
    assert found.median_lead == 24.0 and found.false_alarms_per_1000 == 30.0
    assert found.chance_percent == pytest.approx(400 / 7) and found.healthy_percent == pytest.approx(200 / 3)


def test_the_window_has_25_rows_before_the_onset_and_2_after_it(tmp_path: Path):
    runs = list(load(folder(tmp_path, [("c", "collapsed", 60, 1, 40)])))
    assert [score(runs, {"c": [row]}).detected for row in (14, 15, 39, 40, 42, 43)] == [0, 1, 1, 1, 1, 0]
    assert [score(runs, {"c": [row]}).early for row in (39, 40)] == [1, 0]


def test_nothing_to_measure_is_not_zero():
    empty = score([], {})
    assert (empty.median_lead, empty.chance_percent, empty.healthy_percent, empty.false_alarms_per_1000) == (None,) * 4


@pytest.mark.parametrize("part, whole", [(0, 67), (7, 8), (8, 8), (1, 3)])
def test_both_ends_of_an_interval_lie_one_quantile_from_the_share(part: int, whole: int):
    # Wilson: the two π with (p − π)² = z² π (1 − π) / n
    for percent in wilson(part, whole):
        end = percent / 100
        assert (part / whole - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / whole, abs=1e-12)


def test_the_course_of_a_collapse_with_a_known_fault():
    rows: list[dict[str, float]] = [{}] * 100
    run = LabelledRun("r", "collapsed", np.arange(100) * 2.0, rows, 80, 160.0, 40.0)
    (early,) = courses([run], {"r": [3, 30, 90]})
    # the fault is at row 20; row 3 is before it, row 30 is step 60
    assert (early.before, early.delay, early.lead, early.lead_percent) == (True, 20.0, 100.0, 62.5)
    (late,) = courses([run], {"r": [83]})
    assert (late.before, late.alarm, late.lead) == (False, None, None)
    assert courses([made_up(rows)], {}) == []
    (record,) = records({OURS: score([run], {})}, {OURS: [early, late]})
    assert record["after_fault"] == {
        "collapsed": 2, "alarmed": 1, "alarmed_before": 1, "median_delay_steps": 20.0, "median_lead_steps": 100.0,
        "median_lead": 62.5,
    }  # fmt: skip


def test_a_table_keeps_nan_and_leaves_null_out(tmp_path: Path):
    table = pa.table({"step": [0, 1, 2], "kl": [None, math.nan, math.inf], "raw/kl": [1.0, 2.0, 3.0]})
    pq.write_table(table, tmp_path / "r.parquet")
    (tmp_path / "manifest.json").write_text(
        json.dumps({"runs": [{"id": "r", "file": "r.parquet", "label": "healthy"}]})
    )
    (run,) = load(tmp_path)
    assert repr(list(run.rows)) == "[{}, {'kl': nan}, {'kl': inf}]"
    # an infinite KL is critical at once
    assert ours(run) == {OURS: [2]}


@pytest.mark.parametrize("key", ["id", "file", "store"])
def test_an_entry_may_be_a_run_folder(tmp_path: Path, key: str):
    with Recorder(tmp_path / "r", objective=MHPO, fsync=False) as recorder:
        for step in range(4):
            recorder.record(step, None, grad_norm=1.0, metrics={"kl": math.inf if step == 2 else 0.1})
    entry = {"id": "x", "label": "collapsed", "onset_step": 3, "fault_step": 2} | {key: "r"}
    (tmp_path / "manifest.json").write_text(json.dumps({"runs": [entry]}))
    (run,) = load(tmp_path)
    assert run.onset_row == 3 and run.rows[1] == {"grad_norm": 1.0, "kl": 0.1}
    assert ours(run) == {OURS: [2]}


def test_a_run_folder_beside_its_table_is_scored_twice(tmp_path: Path):
    with Recorder(tmp_path / "r", objective=MHPO, fsync=False) as recorder:
        for step in range(3):
            recorder.record(step, None, metrics={"kl": math.inf if step == 1 else 0.1})
    pq.write_table(pa.table({"step": [0, 1, 2], "kl": [0.1] * 3}), tmp_path / "r.parquet")
    entry = {"id": "r", "file": "r.parquet", "store": "r", "label": "healthy"}
    (tmp_path / "manifest.json").write_text(json.dumps({"runs": [entry]}))
    (run,) = load(tmp_path)
    assert ours(run) == {OURS: [1], WITHOUT_TOKENS: []}


@pytest.mark.parametrize(
    "entry, message",
    [
        (None, "has no manifest.json"),
        ({"id": "r", "file": "r.parquet", "label": "healthy"}, "names no file that exists"),
        ({"id": "s", "file": "s.parquet", "label": "collapsed"}, "has no onset_step"),
    ],
)
def test_a_folder_that_cannot_be_scored_is_refused(tmp_path: Path, entry: object, message: str):
    pq.write_table(pa.table({"step": [0], "kl": [0.1]}), tmp_path / "s.parquet")
    if entry:
        (tmp_path / "manifest.json").write_text(json.dumps({"runs": [entry]}))
    with pytest.raises(ConfigError, match=message):
        list(load(tmp_path))


def held(name: str, column: str, values: Sequence[float]) -> list[int]:
    return threshold_rules(made_up([{column: value} for value in values]))[name]


def test_threshold_rules_hold_where_they_say():
    gradient = "gradient norm > 10 × its running median"
    assert held(gradient, "grad_norm", [9.0, *[1.0] * 5, 10.0, 10.1]) == [7]
    assert held(gradient, "grad_norm", [*[0.0] * 6, 1.0]) == []  # ten times nothing is no threshold
    z = "gradient norm, z > 3 over 50 rows"  # of mean 2 and deviation 1
    assert held(z, "grad_norm", [1.0, 3.0] * 5 + [4.9]) == [] and held(z, "grad_norm", [1.0, 3.0] * 5 + [5.1]) == [10]
    assert held("entropy > 2 × its start", "entropy", [1.0] * 4 + [3.0, 2.7, 2.9]) == [6]  # start: 7 / 5 = 1.4
    assert held("reward < 50 % of its running maximum", "reward", [0.2, 1.0, 0.5, 0.49]) == [3]
    assert held("reward < 50 % of its running maximum", "reward", [-2.0, -1.0, -9.0]) == []
    smoothed = "reward, mean of 5, < 50 % of its running maximum"
    assert held(smoothed, "reward", [1.0] * 5 + [0.0, 0.0, 0.0]) == [7]  # means 1, 0.8, 0.6, 0.4
    assert held("mean importance weight outside [0.5, 2]", "is_mean", [1.0, 0.4, 2.1, math.nan]) == [1, 2, 3]
    assert held("NaN or ±Inf in any column", "loss", [1.0, math.nan, -math.inf]) == [1, 2]
    assert held(TYPICAL_UNION, "kl", [0.9, 1.1]) == [1] == held(TYPICAL_UNION, "entropy", [1.0, 0.05])


def test_a_peer_that_is_not_there_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    absent = Peer("nothing", "no_such_module", "pip install nothing", lambda run: {}, {"any": 1})
    monkeypatch.setattr(bench, "PEERS", (absent,))
    runs = [made_up([{"kl": 0.1}] * 3)]
    raised = {OURS: {"run": [1]}}
    lines = bench.report(runs, {OURS: score(runs, raised[OURS])}, raised)
    assert "| nothing | not installed: `pip install nothing` | | | | | | |" in lines
    assert any(
        line.startswith("| mhpo | 0/0 (0–100 %) | 0 | – | – | 1/1, 100.0 % (21–100 %) | 333.33 |") for line in lines
    )


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.package)
def test_a_peer_looks_at_no_later_row(peer: Peer):
    if peer.missing:
        pytest.skip(f"not installed: {peer.install}")
    draw = np.random.default_rng(0)
    rows = [
        {"kl": v, "grad_norm": v, "entropy": 1 / v, "reward": v} for v in np.exp(draw.standard_normal(120)).tolist()
    ]
    whole, part = peer.rows(made_up(rows)), peer.rows(made_up(rows[:100]))
    assert any(whole.values())
    assert {name: [row for row in found if row < 100] for name, found in whole.items()} == part


def test_figures_are_written_where_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    guide, figures = tmp_path / "README.md", tmp_path / "about.json"
    monkeypatch.setattr(bench, "GUIDE", guide)
    monkeypatch.setattr(bench, "FIGURES", figures)
    runs = list(load(folder(tmp_path)))
    rules = records({OURS: score(runs, ALARMS)}, {})
    with pytest.raises(ConfigError, match="lacks the marks"):
        guide.write_text("nothing\n")
        bench.write("real", ["a table"], rules)
    guide.write_text("before\n<!-- alarms real -->\nold\n<!-- end of alarms real -->\nafter\n")
    for _ in range(2):
        bench.write("real", ["a table"], rules)
    assert guide.read_text() == "before\n<!-- alarms real -->\n\na table\n\n<!-- end of alarms real -->\nafter\n"
    (rule,) = json.loads(figures.read_text())["real"]["rules"]
    assert (rule["rule"], rule["detected"], rule["collapsed"], rule["early"], rule["healthy_alarmed"]) == (
        OURS,
        2,
        4,
        1,
        2,
    )
