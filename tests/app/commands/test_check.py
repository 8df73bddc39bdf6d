"""`mhpo check`: real collapses are found and explained, JSON is what the contract says, nothing is changed in vain."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from app.cli import main
from collectors import Recorder, open_run
from collectors.notify import Outcome
from tests.app.runs import token_batch

HEALTHY, STEPS = 15, 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy run, and one whose ratios and gradient explode and end in NaN."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("healthy", "broken"):
        with Recorder(folder / name, objective="grpo", alarms=None) as recorder:
            for step in range(STEPS):
                bad = name == "broken" and step >= HEALTHY
                norm = math.nan if bad and step > STEPS - 4 else (1 + 0.1 * math.sin(step)) * (1000 if bad else 1)
                batch = token_batch(step, 3.0 if bad else 0.02)
                reward = [0.1 if bad else 0.8] * batch.n_sequences
                recorder.record(step, batch, loss=0.5, reward=reward, grad_norm=norm)
    return folder


def alarms_of(runs: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, list[dict]]]:
    status = main(["check", *(str(runs / name) for name in ("healthy", "broken")), "--json", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_is_one_list_of_alarms_per_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = alarms_of(runs, capsys)
    assert status == 0 and list(found) == ["healthy", "broken"]
    assert [a for a in found["healthy"] if a["severity"] == "critical"] == []
    critical = [a for a in found["broken"] if a["severity"] == "critical"]
    assert HEALTHY <= critical[0]["step"] <= HEALTHY + 3 and critical[0]["onset_step"] == HEALTHY
    for alarm in found["broken"]:
        assert sorted(alarm) == [
            "advice", "evidence", "id", "message", "mode", "onset_step", "rule", "severity", "step", "threshold",
            "value",
        ]  # fmt: skip
        assert alarm["advice"] and (alarm["evidence"]["last_good_step"] == HEALTHY - 1 or alarm["mode"] == "non-finite")
    token = critical[0]["evidence"]["tokens"][0]
    with open_run(runs / "broken") as run:
        largest = run.sql(f"SELECT max(abs(log_ratio)) FROM tokens WHERE step = {critical[0]['step']}").fetchall()[0][0]
    assert abs(token["log_ratio"]) == largest and critical[0]["evidence"]["sequences"][0]["largest_shift"] == largest
    assert "nan" in {str(a["value"]) for a in found["broken"]}


def test_exit_status_says_what_was_found(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert alarms_of(runs, capsys, "--fail-on", "critical")[0] == 1
    assert main(["check", str(runs / "healthy"), "--fail-on", "critical"]) == 0
    assert main(["check", str(runs), "--fail-on", "warning"]) == 1, "a folder of runs is checked run by run"


def test_people_read_mode_cause_rollback_and_advice(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(runs / "broken")]) == 0
    out = capsys.readouterr().out
    assert f"Last step before the first sign: {HEALTHY - 1}." in out
    assert "Not judged for lack of data: " in out and "eval_reward" in out


def test_thresholds_can_be_moved_and_are_listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "anywhere", "--thresholds"]) == 0
    listed = dict(line.split("=") for line in capsys.readouterr().out.splitlines())
    assert float(listed["drift"]) == 1.5
    quiet = ["--set", "critical=99", "--set", "gradient_factor=1e9", "--set", "nonfinite_rows=20"]
    _, found = alarms_of(runs, capsys, *quiet)
    assert [a for a in found["broken"] if a["severity"] == "critical"] == []
    for wrong in ("critcal=1", "critical=abc", "critical"):
        assert main(["check", str(runs / "healthy"), "--set", wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_is_found_is_kept_once(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        _, found = alarms_of(runs, capsys)
    with open_run(runs / "broken") as run:
        assert run.sql("SELECT id FROM alarms").fetchall() == [(a["id"],) for a in found["broken"]]


def test_a_run_that_is_being_written_is_checked_and_left_alone(tmp_path: Path) -> None:
    with Recorder(tmp_path / "live", objective="grpo", alarms=None) as recorder:
        for step in range(12):
            recorder.record(step, token_batch(step), grad_norm=math.inf if step == 11 else 1.0)
        assert recorder.flush(30)
        assert main(["check", str(tmp_path / "live"), "--fail-on", "critical"]) == 1
        assert not (tmp_path / "live" / "alarms").exists()


def test_addresses_are_told_once_per_incident(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    outcomes = iter([Outcome("address 1 of 1 did not take it", 1), Outcome("", 1)])
    monkeypatch.setattr("collectors.notify.deliver", lambda title, body: sent.append(title) or next(outcomes))
    monkeypatch.setattr("collectors.notify._unready", lambda: "")
    monkeypatch.delenv("MHPO_NOTIFY", raising=False)
    assert main(["check", str(runs / "broken"), "--notify"]) == 2
    assert "MHPO_NOTIFY is not set" in capsys.readouterr().err and sent == []
    monkeypatch.setenv("MHPO_NOTIFY", "json://127.0.0.1/secret")
    for failed in (1, 0, 0):
        assert main(["check", str(runs), "--notify", "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) and "secret" not in captured.err
        assert captured.err.count("mhpo check: broken: the notification failed: address 1 of 1") == failed
    assert sent == [f"Critical alarm in broken at step {sent[0].split()[-1]}"] * 2


def test_what_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
