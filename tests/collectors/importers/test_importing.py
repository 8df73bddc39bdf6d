"""Importing as a whole: what a run gets, what a second import adds, what bad input leaves behind."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.cli import main
from collectors import open_run, store
from collectors.alarms import check
from collectors.importers import FORMATS, import_run
from collectors.importers.merging import merged
from collectors.importers.mhpo_run import copy_run
from collectors.importers.steps import ImportedStep
from collectors.integrity import verify
from collectors.storage import LocalStorage
from mhpo_core.errors import StoreError
from tests.collectors.support import column, everything, record_steps, rows

DATA = Path(__file__).parent / "data"


def write_state(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps({"global_step": 1, "log_history": records}))
    return path


def test_a_history_of_trl_becomes_columns_and_keeps_its_own_names(tmp_path):
    state = write_state(
        tmp_path / "trainer_state.json",
        [
            {"step": 1, "loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-6, "reward": 0.25, "kl": "NaN", "note": "x"},
            {"step": 2, "loss": 0.0, "grad_norm": math.nan, "reward": None, "completions/mean_length": 7},
            {"step": 2, "eval_reward": 0.75},
            {"step": 3, "loss": math.inf},
            {"loss": 3.0},
        ],
    )
    done = import_run([state], tmp_path / "runs", name="old")
    assert (done.framework, done.formats, done.steps) == ("trl", ["trl-state"], 3)
    assert done.unmapped == ["kl", "eval_reward"]
    assert sorted(done.notes) == [
        "A loss of 0.0 beside a gradient norm of NaN is taken for NaN, which transformers logs as 0.0 (first: step 2).",
        "A record without a step number is left out (first: {'loss': 3.0} in trainer_state.json).",
    ]
    with open_run(tmp_path / "runs" / "old") as run:
        found = rows(run, "SELECT step, loss::VARCHAR, lr, reward_mean, length_mean, isnan(grad_norm) FROM steps")
        assert found == [
            (1, "0.5", 1e-6, 0.25, None, False), (2, "nan", None, None, 7.0, True), (3, "inf", None, None, None, None),
        ]  # fmt: skip
        assert rows(run, "SELECT value FROM metrics WHERE step = 2 AND name = 'eval_reward'") == [(0.75,)]
        assert column(run, "SELECT isnan(value) FROM metrics WHERE name = 'kl'") == [True]
        assert run.manifest["config"]["import"]["framework"] == "trl"
    possible = {one.name: one.how for one in done.diagnostics}
    assert possible["loss and reward curves"] == "" and "adapters.trl" in possible["engine mismatch"]


def test_a_log_that_grows_adds_only_what_is_new(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": s, "loss": s / 8, "mine": s}) + "\n" for s in range(6)]
    log.write_text("".join(lines[:3]) + '{"step": 3, "lo')
    first = import_run([log], tmp_path / "runs")
    assert first.steps == 3 and "cut off" in first.notes[0]
    before = everything(tmp_path / "runs" / "log", ["steps_all"])
    assert import_run([log], tmp_path / "runs").steps == 0
    assert everything(tmp_path / "runs" / "log", ["steps_all"]) == before
    log.write_text("".join(lines[:5]))
    assert import_run([log], tmp_path / "runs").steps == 2
    # the newest step gets more afterwards
    log.write_text("".join(lines[:4]) + '{"step": 4, "loss": 0.5, "mine": 4, "late": 1}\n' + lines[5])
    assert import_run([log], tmp_path / "runs").steps == 2
    with open_run(tmp_path / "runs" / "log") as run:
        assert rows(run, "SELECT step, loss FROM steps") == [(s, s / 8) for s in range(6)]
        assert rows(run, "SELECT step, attempt FROM steps_all WHERE step > 3") == [(4, 0), (4, 1), (5, 1)]
        assert column(run, "SELECT count(*) FROM metrics WHERE name = 'late'") == [1]
    assert import_run([log], tmp_path / "runs").steps == 0
    assert verify(LocalStorage(tmp_path / "runs" / "log")).findings == []


def test_sources_of_one_training_are_merged_by_step(tmp_path):
    state = write_state(tmp_path / "trainer_state.json", [{"step": s, "loss": s / 4} for s in (1, 2, 3)])
    (tmp_path / "more.csv").write_text("step,mine\n2,5\n3,6\n4,7\n")
    done = import_run([state, tmp_path / "more.csv"], tmp_path / "runs", name="both")
    assert done.steps == 4 and done.formats == ["trl-state", "tables"]
    with open_run(tmp_path / "runs" / "both") as run:
        assert rows(run, "SELECT step, loss FROM steps") == [(1, 0.25), (2, 0.5), (3, 0.75), (4, None)]
        assert rows(run, "SELECT step, value FROM metrics WHERE name = 'mine'") == [(2, 5.0), (3, 6.0), (4, 7.0)]


def test_merging_keeps_repeated_and_falling_steps_of_one_source():
    one = [ImportedStep(s, {"a": i}) for i, s in enumerate([0, 1, 2, 1, 2])]
    two = [ImportedStep(s, {"b": s}) for s in (1, 3)]
    found = [(m.step, m.metrics) for m in merged([iter(one), iter(two)])]
    assert found == [(0, {"a": 0}), (1, {"a": 1, "b": 1}), (2, {"a": 2}), (1, {"a": 3}), (2, {"a": 4}), (3, {"b": 3})]
    assert list(merged([])) == []


BAD = {
    "empty": ("a.jsonl", b""),
    "noise": ("a.bin", bytes(range(256)) * 20),
    "prose": ("a.txt", b"nothing to see\n" * 5),
    "no step": ("a.csv", b"loss,reward\n1,2\n"),
    "half": ("trainer_state.json", b'{"log_history": [{"step": 1, "loss"'),
    "no records": ("trainer_state.json", b'{"log_history": []}'),
}


@pytest.mark.parametrize("name, content", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert main(["import", str(tmp_path / name), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mhpo import: ") and "Traceback" not in error
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_wrong_arguments_say_what_is_allowed(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("step,loss\n1,2\n")
    with pytest.raises(StoreError, match="format 'xml' is unknown, allowed are auto, mhpo, trl-state"):
        import_run([log], tmp_path / "runs", format="xml")
    with pytest.raises(StoreError, match="is in no format that can be read; tried slime"):
        import_run([log], tmp_path / "runs", format="slime")
    with pytest.raises(StoreError, match="does not exist"):
        import_run([tmp_path / "nothing"], tmp_path / "runs")
    for name in ("", "..", "a/b", ".hidden"):
        with pytest.raises(StoreError, match="allowed is the name of one folder"):
            import_run([log], tmp_path / "runs", name=name)
    record_steps(tmp_path / "runs" / "mine", [0])
    with pytest.raises(StoreError, match="was recorded by a training, not imported. Give another --name"):
        import_run([log], tmp_path / "runs", name="mine")


def test_a_run_of_ours_is_copied_without_loss(tmp_path):
    source, out = tmp_path / "source", tmp_path / "runs"
    record_steps(source, [*range(6), 4, 5], vocabulary={1: "one"})
    done = import_run([source], out, name="copy")
    assert done.formats == ["mhpo"] and done.steps == 8
    assert everything(out / "copy") == everything(source) and verify(LocalStorage(out / "copy")).findings == []
    record_steps(source, [6])
    assert import_run([source], out, name="copy").steps == 1
    assert everything(out / "copy", ["steps", "tokens"]) == everything(source, ["steps", "tokens"])
    assert copy_run(source, out / "copy") == 0
    record_steps(tmp_path / "other", [0])
    with pytest.raises(StoreError, match="is another run. Give another --name"):
        import_run([tmp_path / "other"], out, name="copy")


def _import_slowly(log: Path, out: Path) -> None:
    import_run([log], out, name="log", progress=lambda steps: time.sleep(0.01))


def test_an_import_that_is_killed_leaves_no_run_and_the_next_one_works(tmp_path):
    log, out = tmp_path / "log.csv", tmp_path / "runs"
    log.write_text("step,loss\n" + "".join(f"{s},0.5\n" for s in range(400)))
    for wait in (0.4, 1.2):
        process = multiprocessing.get_context("spawn").Process(target=_import_slowly, args=(log, out))
        process.start()
        time.sleep(2.0 + wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not (out / "log").exists()
    assert import_run([log], out, name="log").steps == 400
    shutil.rmtree(out / "log")


def test_json_and_text_tell_the_same(tmp_path, capsys):
    state = write_state(tmp_path / "trainer_state.json", [{"step": 1, "loss": 0.5, "own\x1b[31m": 1}])
    assert main(["import", str(state), "--out", str(tmp_path / "a"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], told["framework"], told["unmapped"]) == (1, "trl", ["own\x1b[31m"])
    assert main(["import", str(state), "--out", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "Added 1 steps." in out and "engine mismatch" in out and "\x1b" not in out


def test_every_format_has_a_name_of_its_own_and_a_title():
    assert len(FORMATS) == 12 and all(name == one.name and one.title for name, one in FORMATS.items())


def test_following_takes_what_is_added_until_it_is_stopped(tmp_path):
    log, out = tmp_path / "log.jsonl", tmp_path / "runs"
    lines = [json.dumps({"step": s, "loss": s / 8}) + "\n" for s in range(4)]
    log.write_text("".join(lines[:2]))
    command = [sys.executable, "-m", "app.cli", "import", str(log), "--out", str(out), "--follow"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "read as" in process.stdout.readline()
        log.write_text("".join(lines))
        told = [process.stdout.readline()]
        while told[-1] and "2 steps more." not in told[-1]:
            told.append(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors) == (130, "") and "2 steps more." in told[-1]
    assert column(out / "log", "SELECT step FROM steps_all") == [0, 1, 2, 3]


def test_a_disk_that_is_full_leaves_no_half_of_a_run(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log.csv"
    log.write_text("step,loss\n" + "".join(f"{s},0.5\n" for s in range(600)))
    write, room = LocalStorage.write, [2]

    def full(self, name, data, *, fsync):
        if "/sealed/" in name:
            room[0] -= 1
            if room[0] < 0:
                raise OSError(28, "No space left on device")
        write(self, name, data, fsync=fsync)

    monkeypatch.setattr(LocalStorage, "write", full)
    assert main(["import", str(log), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Free disk space, then import again." in error
    assert list((tmp_path / "runs").iterdir()) == []
    monkeypatch.undo()
    assert import_run([log], tmp_path / "runs").steps == 600
    run = tmp_path / "runs" / "log"
    assert len(list((run / "rollup" / "sealed").iterdir())) == 3 and not list((run / "rollup").glob("hot/*"))
    assert verify(LocalStorage(run)).findings == []


def test_tokens_of_several_segments_and_attempts_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SEAL_AFTER_STEPS", 3)
    export = tmp_path / "token_exports"
    for step in range(8):
        shutil.copytree(DATA / "prime-rl" / "token_exports" / "step_3", export / f"step_{step}")
        for file in (export / f"step_{step}").glob("*.jsonl"):
            file.write_text(file.read_text().replace('"step":3', f'"step":{step}'))
    assert import_run([export], tmp_path / "runs").tokens == 80
    with open_run(tmp_path / "runs" / "token_exports") as run:
        assert rows(run, "SELECT step, n_tokens FROM steps") == [(s, 10) for s in range(8)]
        assert rows(run, "SELECT step, count(*) FROM tokens GROUP BY step ORDER BY step") == [(s, 10) for s in range(8)]
        assert column(run, "SELECT count(DISTINCT sequence_id) FROM sequences") == [16]


def test_what_an_earlier_import_gave_still_counts_and_the_run_keeps_it(tmp_path):
    state = write_state(tmp_path / "trainer_state.json", [{"step": 1, "loss": 0.5, "grad_norm": 2.0}])
    first = import_run([state], tmp_path / "runs", name="x")
    write_state(state, [{"step": 1, "loss": 0.5, "grad_norm": 2.0}, {"step": 2, "loss": 0.25}])
    second, third = import_run([state], tmp_path / "runs", name="x"), import_run([state], tmp_path / "runs", name="x")
    assert (second.steps, third.steps) == (1, 0)
    assert first.diagnostics == second.diagnostics == third.diagnostics
    assert any(not one.missing for one in first.diagnostics)
    details = column(tmp_path / "runs" / "x", "SELECT detail FROM events WHERE kind = 'imported'")
    assert len(details) == 2, "none where nothing was new"
    for told in map(json.loads, details):
        assert [(d["name"], tuple(d["missing"]), d["how"]) for d in told["diagnostics"]] == [
            (d.name, d.missing, d.how) for d in first.diagnostics
        ]
        assert (told["framework"], told["formats"]) == ("trl", ["trl-state"])


def test_an_imported_run_is_called_like_its_folder_and_has_its_alarms(tmp_path):
    """Metrics alone are enough for an alarm; it is found while the log is imported, and again by a check."""
    rows = [{"step": s, "grad_norm": (1 + 0.1 * (s % 3)) * (500 if s >= 20 else 1)} for s in range(30)]
    source = tmp_path / "history.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = import_run([source], tmp_path / "runs", name="mine")
    with open_run(done.path) as run:
        assert run.manifest["run_id"] == "mine"
        stored = run.sql("SELECT id, severity, step, onset_step FROM alarms").fetchall()
        found, _ = check(run)
    assert stored == [(a.id, a.severity, a.step, a.onset_step) for a in found]
    assert ("gradient-explosion@22", "critical", 22, 20) in stored
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["mine"]
