"""`mhpo backtest`: the same runs under two settings, scored by labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import main
from collectors import Recorder

ONSET = 30


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose gradient norm rises fifty-fold before its reward is gone, and one with a harmless rise."""
    folder = tmp_path_factory.mktemp("runs")
    for name, factor in (("broken", 50.0), ("fine", 20.0)):
        with Recorder(folder / name, objective="grpo", alarms=None, by_segment=True) as recorder:
            for step in range(40):
                grown = factor if step >= ONSET - 5 else 1.0
                reward = 0.0 if step >= ONSET and name == "broken" else 0.8
                recorder.record(step, None, grad_norm=grown * (1 + 0.1 * (step % 3)), columns={"reward_mean": reward})
    runs = [{"id": "broken", "label": "collapsed", "onset_step": ONSET}, {"id": "fine", "label": "healthy"}]
    (folder / "labels.json").write_text(json.dumps({"runs": runs}))
    return folder


def tried(runs: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    given = ["backtest", str(runs / "broken"), str(runs / "fine"), "--labels", str(runs / "labels.json")]
    assert main([*given, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_lower_threshold_alarms_on_the_healthy_run_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tried(runs, capsys, "--set", "gradient_factor=10")
    assert found["now"] == {"collapsed": 1, "detected": 1, "healthy": 1, "healthy_alarmed": 0, "leads": [3]}
    assert found["then"] == {"collapsed": 1, "detected": 1, "healthy": 1, "healthy_alarmed": 1, "leads": [3]}
    assert [a["step"] for a in found["runs"]["fine"]["then"] if a["severity"] == "critical"] == [ONSET - 3]


def test_a_higher_one_misses(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tried(runs, capsys, "--set", "gradient_factor=100", "--set", "critical=9")
    assert found["then"]["detected"] == 0 and found["then"]["healthy_alarmed"] == 0


def test_people_read_both_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(runs), "--set", "gradient_factor=10", "--labels", str(runs / "labels.json")]
    assert main(["backtest", *arguments]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("broken: 40 steps, collapsed at 30; ") and "3 steps before it" in out[0]
    assert out[1] == "fine: 40 steps, healthy; nothing critical → 1 critical from step 27"
    assert out[-1].endswith("1 of 1 healthy runs are alarmed.")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"runs": [{"id": 1}]}', '{"runs": [{"id": "a", "label": "x", "onset_step": "y"}]}']
)
def test_labels_that_are_none(tmp_path: Path, runs: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(text)
    assert main(["backtest", str(runs), "--set", "drift=2", "--labels", str(labels)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
