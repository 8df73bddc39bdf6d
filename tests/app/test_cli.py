"""The command line: exit status, one line per error, JSON alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import COMMANDS, main
from collectors import open_run
from tests.app.runs import record_run


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: mhpo {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["runs", "nowhere"], "nowhere cannot be listed"),
        (["dash", "nowhere"], "nowhere is not a folder"),
        (["dash", ".", "--host", "0.0.0.0"], "allowed are 127.0.0.1"),
        (["dash", ".", "--port", "0"], "allowed are 1 to 65535"),
        (["demo", "--preset", "nonsense"], "allowed are demo"),
        (["train", "--preset", "nonsense"], "allowed are demo"),
        (["train", "missing.toml"], "cannot be read"),
        (["train", "--set", "nonsense"], "allowed is key=value"),
        (["train", "--set", "optimizer.lr=-1"], "lr"),
        (["train", "--set", "objective.name=mhop"], "Did you mean 'mhpo'?"),
        (["train", "--name", "../escape"], "allowed are up to 100 letters"),
        (["train", "--resume", "--name", "nothing"], "is not a run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and told in captured.err, captured.err
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["runs"], ["train", "--device", "tpu"]])
def test_bad_usage_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.count("\n") == 1 and "--help" in captured.err


def test_runs_as_json_and_as_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "good", 3)
    (tmp_path / "bad\x1b[31m").mkdir()
    (tmp_path / "bad\x1b[31m" / "run.json").write_text("{")
    (tmp_path / "no run").mkdir()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    listed = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(listed) == {"good", "bad\x1b[31m"}
    good = listed["good"]
    assert (good["state"], good["health"], good["last_step"], good["objective"]) == ("finished", "ok", 2, "mhpo")
    assert good["reward_mean"] == pytest.approx(0.5, abs=1e-7)
    assert "cannot be read" in listed["bad\x1b[31m"]["problem"]
    assert main(["runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "\x1b" not in table and "bad⟨1b⟩[31m" in table and "finished" in table


def test_an_empty_folder_says_how_to_get_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "mhpo train" in capsys.readouterr().out


def test_dry_run_prints_a_configuration_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "mismatch", "--set", "optimizer.lr=1e-5", "--dry-run"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "same.toml").write_text(first)
    assert main(["train", str(tmp_path / "same.toml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == first and "lr = 1e-05" in first


def test_an_objective_of_ones_own_lies_in_the_folder_one_is_in(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from mhpo_core.objectives.clipping import PpoClip\nclass Mine(PpoClip):\n    name = 'mine'\n"
    )
    chosen = ["--preset", "healthy", "--set", "objective.name=mine:Mine", "--dry-run"]
    command = [str(Path(sys.executable).parent / "mhpo"), "train", *chosen]  # unlike -m, it has no folder on its path
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'name = "mine:Mine"' in done.stdout, done.stderr
    command[-2] = "objective.name=mine:Yours"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be imported" in done.stderr


def test_train_then_refuse_then_resume(tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "app.cli", "train", "--preset", "healthy", "--out", str(tmp_path), "--name", "r",
            "--device", "cpu", "--set", "iterations=2", "--set", "warm_start.steps=1", "--set", "rollout.prompts=4",
            *more,
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True)

    assert run().returncode == 0
    again = run()
    assert again.returncode == 2 and "holds a run already" in again.stderr and again.stderr.count("\n") == 1
    resumed = run("--resume")
    assert resumed.returncode == 0, resumed.stderr
    with open_run(tmp_path / "r") as stored:
        assert stored.sql("SELECT count(*), max(attempt) FROM steps_all").fetchall() == [(4, 0)]
        kinds = [k for (k,) in stored.sql("SELECT kind FROM events ORDER BY time").fetchall()]
    assert kinds[0] == "started" and "resumed" in kinds and kinds[-1] == "finished"
