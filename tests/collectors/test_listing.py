"""What a folder of runs looks like: the state of each, its newest numbers, and damage that hides no other run."""

from __future__ import annotations

import json
import os
import shutil
import threading

import pytest

from collectors import Recorder, StoreError
from collectors.integrity import verify
from collectors.layout import SCHEMA_VERSION
from collectors.listing import list_runs, run_folders
from collectors.state import RunState, run_state
from collectors.storage import LocalStorage
from tests.collectors.support import record_steps, step_files, token_batch, wait_for
from tests.collectors.writer import writing


def end(path, kind, detail=""):
    recorder = Recorder(path, objective="grpo", fsync=False)
    recorder.record(3, token_batch(3), loss=1.0, reward=[1.0, 0.0, 0.0, 0.0])
    recorder.close(kind, detail)


def test_every_state_is_told_apart(tmp_path):
    for kind in ("finished", "stopped", "failed"):
        end(tmp_path / kind, kind, f"it {kind}")
    Recorder(tmp_path / "empty", objective="mhpo", fsync=False).close()
    with writing(tmp_path / "killed") as writer:
        writer.wait_for_steps(12)
        writer.kill()
    running = Recorder(tmp_path / "running", objective="mhpo", fsync=False)
    running.record(0, token_batch(0))
    running.event("warm_start", "20 steps")
    wait_for(running)
    found = {s.run_id: s for s in list_runs(tmp_path)}
    running.close()
    assert {n: s.state.name for n, s in found.items()} == {n: n for n in found if n != "empty"} | {"empty": "finished"}
    assert found["failed"].state == RunState("failed", "it failed", "failed")
    assert found["running"].state == RunState("running", "20 steps", "warm_start")
    assert (found["empty"].health, found["empty"].last_step, found["empty"].last_time) == ("no data", None, None)
    assert [(s.objective, s.last_step, s.reward, s.health) for s in (found["failed"], found["running"])] == [
        ("ppo_clip", 3, 0.25, "ok"), ("mhpo", 0, None, "ok")
    ]  # fmt: skip
    assert all(s.problem == "" and s.size > 0 for s in found.values()) and len(found) == 6


def test_a_run_that_was_killed_before_its_first_event(tmp_path):
    record_steps(tmp_path / "run", [0])
    shutil.rmtree(tmp_path / "run" / "events")
    assert run_state(LocalStorage(tmp_path / "run")) == RunState("killed", "", "")


def test_a_resumed_run_is_judged_by_its_last_writer(tmp_path):
    Recorder(tmp_path / "run", objective="mhpo", fsync=False).close("failed", "first")
    storage = LocalStorage(tmp_path / "run")
    with writing(tmp_path / "run") as writer:
        assert run_state(storage).name in ("failed", "running")
        writer.wait_for_steps(12)
        assert run_state(storage).name == "running"
        writer.kill()
        assert run_state(storage).name == "killed"


def test_a_run_whose_newest_event_is_damaged_is_judged_by_the_one_before(tmp_path):
    storage = LocalStorage(tmp_path / "run")
    end(tmp_path / "run", "failed", "first")
    end(tmp_path / "run", "stopped", "second")
    assert run_state(storage) == RunState("stopped", "second", "stopped")
    last = max((tmp_path / "run" / "events").iterdir())
    content = last.read_bytes()
    for damaged in (content[:-1], b"\0" * len(content)):  # of another size, of other bytes
        last.write_bytes(damaged)
        state = run_state(storage)
        assert (state.name, state.phase) == ("killed", "rewound")


def test_health_is_that_of_the_newest_step(tmp_path):
    nan = float("nan")
    for name, losses in (("nan", [1.0, nan]), ("was-nan", [nan, 1.0]), ("inf", [float("-inf")]), ("none", [None])):
        with Recorder(tmp_path / name, objective="mhpo", fsync=False) as recorder:
            for step, loss in enumerate(losses):
                recorder.record(step, token_batch(step), loss=loss)
    with Recorder(tmp_path / "tokens", objective="mhpo", fsync=False) as recorder:
        recorder.record(0, token_batch(0, entropy=None, logp_new=token_batch(0).logp_new * nan), loss=0.0)
    health = {s.run_id: s.health for s in list_runs(tmp_path)}
    bad = "non-finite"
    assert health == {"nan": bad, "was-nan": "ok", "inf": bad, "none": "ok", "tokens": bad}


def test_the_newest_step_is_that_of_the_newest_attempt(tmp_path):
    record_steps(tmp_path / "run", [0, 1, 2, 3, 4, 5, 2, 3])
    assert list_runs(tmp_path)[0].last_step == 3


DAMAGE = {
    "manifest": lambda run: (run / "run.json").write_text("{"),
    "deep manifest": lambda run: (run / "run.json").write_text("[" * 100_000),
    "odd objective": lambda run: (run / "run.json").write_text(
        json.dumps({"schema_version": SCHEMA_VERSION, "objective": "mhpo"})
    ),
    "newer": lambda run: (run / "run.json").write_text('{"schema_version": 99}'),
    "older": lambda run: (run / "run.json").write_text('{"schema_version": 2}'),
    "rollup": lambda run: overwrite(run / "rollup" / "hot", b""),
    "truncated rollup": lambda run: overwrite(run / "rollup" / "hot", b"PAR1"),
    "same size": lambda run: overwrite(run / "rollup" / "hot", None),
}


def overwrite(folder, content):
    path = next(folder.iterdir())
    path.write_bytes(b"\0" * path.stat().st_size if content is None else content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_listed_with_its_problem_and_hides_no_other(tmp_path, kind):
    for name in ("good", "bad"):
        record_steps(tmp_path / name, [0])
    DAMAGE[kind](tmp_path / "bad")
    found = {s.run_id: s for s in list_runs(tmp_path)}
    assert found["good"].problem == "" and found["good"].last_step == 0
    assert found["bad"].problem and "\n" not in found["bad"].problem and found["bad"].health == "no data"


def test_a_damaged_event_is_a_problem_of_a_run_that_still_has_its_numbers(tmp_path):
    record_steps(tmp_path / "run", [0])
    overwrite(tmp_path / "run" / "events", b"PAR1")
    (found,) = list_runs(tmp_path)
    assert (found.health, found.last_step) == ("ok", 0) and found.problem == "1 damaged files, see `mhpo verify`"


def test_the_newest_whole_step_is_shown_beside_a_damaged_one(tmp_path):
    for step in range(3):  # each in a file of its own
        record_steps(tmp_path / "run", [step])
    step_files(tmp_path / "run", "rollup", "hot", 2)[0].write_bytes(b"")
    (found,) = list_runs(tmp_path)
    assert (found.health, found.last_step) == ("ok", 1) and found.problem == "1 damaged files, see `mhpo verify`"


def test_a_file_in_the_place_of_a_folder_hides_no_other_run(tmp_path):
    for name in ("good", "bad"):
        record_steps(tmp_path / name, [0])
    shutil.rmtree(tmp_path / "bad" / "rollup" / "hot")
    (tmp_path / "bad" / "rollup" / "hot").touch()
    found = {s.run_id: s for s in list_runs(tmp_path)}
    assert found["good"].last_step == 0 and (found["bad"].last_step, found["bad"].health) == (None, "no data")
    findings = verify(LocalStorage(tmp_path / "bad")).findings
    assert [(f.kind, f.name) for f in findings] == [("foreign", "rollup/hot")]


def test_only_runs_are_listed_newest_first(tmp_path):
    for age, name in enumerate(("new", "older", "oldest")):
        record_steps(tmp_path / name, [0])
        os.utime(tmp_path / name / "run.json", (1e9 - age, 1e9 - age))
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("x")
    shutil.copytree(tmp_path / "new", tmp_path / ".hidden")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert [p.name for p in run_folders(tmp_path)] == ["new", "older", "oldest"]
    (tmp_path / "none").mkdir()
    assert list_runs(tmp_path / "none") == []
    for stranger in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(StoreError, match="runs: .* cannot be listed"):
            list_runs(stranger)


def test_a_run_that_is_deleted_while_it_is_listed(tmp_path):
    record_steps(tmp_path / "template", [0])
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            shutil.copytree(tmp_path / "template", tmp_path / "other")
            shutil.rmtree(tmp_path / "other")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(40):
            assert "template" in [s.run_id for s in list_runs(tmp_path) if not s.problem]
    finally:
        stop.set()
        thread.join()


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    record_steps(tmp_path / "good", [0])
    try:
        shutil.copytree(tmp_path / "good", tmp_path / os.fsdecode(b"bad\xff"))
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    found = {s.run_id: s.problem for s in list_runs(tmp_path)}
    assert found.pop("good") == "" and "is not UTF-8" in next(iter(found.values()))
