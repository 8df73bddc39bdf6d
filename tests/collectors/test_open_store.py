"""Who may write a run folder, and what a Recorder says when it cannot begin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from collectors import Recorder, StoreError, open_run, store
from collectors.integrity import verify
from collectors.layout import SCHEMA_VERSION, list_table
from collectors.storage import LocalStorage
from mhpo_core import objectives
from mhpo_core.errors import ObjectiveError
from tests.collectors.support import B, column, everything, new_recorder, record_steps, rows, token_batch


def refused(path: Path, says: str, **options) -> None:
    with pytest.raises(StoreError, match=says) as raised:
        Recorder(path, **{"objective": "mhpo", "fsync": False} | options)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(("Recorder: ", "open_run: "))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("precious")
    refused(tmp_path / "thesis", "holds 'draft.txt' and is not a run")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["draft.txt"]
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "cannot be written")
    refused(tmp_path / "file" / "run", "cannot be written")
    refused(Path("/proc/nowhere/run"), "cannot be written")


LEFTOVERS = [
    "run.json.77.tmp", "vocabulary.parquet.77.tmp", "attempts/a000.s000000000.0123456789ab.json.77.tmp",
    "events/e000000000.r000.00000000.9.parquet.77.tmp", "rollup/hot/s000000000.a000.r000.00000000.9.parquet.77.tmp",
    "writers/r000.lock", "writers/launch.lock", "writers", "rollup", "checkpoint",
]  # fmt: skip


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_a_start_that_was_cut_short_can_be_repeated(tmp_path, leftover):
    run = tmp_path / "run"
    run.mkdir()
    (run / leftover).parent.mkdir(exist_ok=True, parents=True)
    (run / leftover).mkdir() if "." not in leftover else (run / leftover).touch()
    record_steps(run, [0], vocabulary={1: "one"})
    assert rows(run, "FROM vocabulary") == [(1, "one")]
    assert column(run, "SELECT kind FROM events") == ["started", "finished"]
    assert not list(run.rglob("*.tmp"))


def test_a_rank_of_several_leaves_the_temporary_files_of_the_others_alone(tmp_path):
    run = tmp_path / "run"
    record_steps(run, [0])
    others = ["run.json.77.tmp", "tokens/hot/s000000001.a000.r001.00000000.9.parquet.77.tmp"]
    ours = "tokens/hot/s000000001.a000.r000.00000000.9.parquet.77.tmp"
    checkpoint = "checkpoint/state.r000.pt.tmp"
    (run / "checkpoint").mkdir()
    for name in (*others, ours, checkpoint):
        (run / name).touch()
    with new_recorder(run, rank=0, world_size=2):
        assert {str(p.relative_to(run)) for p in run.rglob("*.tmp")} == {*others, checkpoint}
    with new_recorder(run, rank=1, world_size=2):
        assert {str(p.relative_to(run)) for p in run.rglob("*.tmp")} == {others[0], checkpoint}
    with new_recorder(run):
        assert {str(p.relative_to(run)) for p in run.rglob("*.tmp")} == {checkpoint}


def test_a_damaged_or_newer_run_is_not_continued(tmp_path):
    record_steps(tmp_path / "run", [0])
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest | {"schema_version": SCHEMA_VERSION + 1}))
    refused(tmp_path / "run", "newer version")
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest | {"schema_version": SCHEMA_VERSION - 1}))
    refused(tmp_path / "run", "Upgrade it with `mhpo compact")
    (tmp_path / "run" / "run.json").write_text("{")
    refused(tmp_path / "run", "cannot be read")
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    record_steps(tmp_path / "run", [1])  # no refusal kept the lock


def test_damage_in_the_last_sequences_costs_them_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "GRACE_SECONDS", -1.0)
    run = tmp_path / "run"
    for steps in ([0], [1], [2]):  # each a writer, so that each step stays in a file of its own
        record_steps(run, steps)
    expected = everything(run, ["tokens", "steps"])
    _, flipped, truncated = (run / f.name for f in list_table(LocalStorage(run), "sequences"))
    content = flipped.read_bytes()
    flipped.write_bytes(content[:10] + bytes([content[10] ^ 1]) + content[11:-4] + b"XXXX")
    truncated.write_bytes(truncated.read_bytes()[:-1])
    record_steps(run, [3])
    with open_run(run) as opened:
        assert opened.damaged == (str(truncated.relative_to(run)),)
    found = {finding.name for finding in verify(LocalStorage(run)).findings}
    assert found == {str(path.relative_to(run)) for path in (truncated, flipped)}
    for path in (truncated, flipped):
        path.unlink()
    assert everything(run, ["tokens", "steps"])["tokens"][: len(expected["tokens"])] == expected["tokens"]
    with open_run(run) as opened:
        assert column(opened, "SELECT step FROM steps") == [0, 1, 2, 3]
        per_step = "SELECT step, count(*), count(DISTINCT sequence_id) FROM sequences GROUP BY step ORDER BY step"
        assert rows(opened, per_step) == [(0, B, B), (3, B, B)]
        assert column(opened, "SELECT count(DISTINCT sequence_id) FROM sequences") == [2 * B]


def test_a_config_that_is_no_json_is_refused_and_can_be_mended(tmp_path):
    refused(tmp_path / "run", "config cannot be stored .*Path", config={"path": tmp_path})
    loop: dict = {}
    loop["self"] = loop
    refused(tmp_path / "run", "config cannot be stored", config=loop)
    record_steps(tmp_path / "run", [0], config={"path": str(tmp_path)})
    with pytest.raises(ObjectiveError, match="unknown objective 'mpho'"):
        Recorder(tmp_path / "other", objective="mpho")
    assert not (tmp_path / "other").exists()


def test_two_recorders_of_one_process_exclude_each_other(tmp_path):
    with Recorder(tmp_path / "run", objective="mhpo", fsync=False) as first:
        refused(tmp_path / "run", "rank 0 of .*run is being written by another recorder")
        first.record(0, token_batch(0))
    record_steps(tmp_path / "run", [1])
    assert column(tmp_path / "run", "SELECT kind FROM events") == ["started", "finished", "resumed", "finished"]


def test_a_resumed_run_keeps_its_identity_and_its_objective(tmp_path):
    run = tmp_path / "run"
    record_steps(run, [0], config={"seed": 1}, vocabulary={1: "one"})
    identity = (run / "run.json").read_bytes()
    record_steps(run, [1], config={"seed": 2}, vocabulary={1: "other"})
    assert (run / "run.json").read_bytes() == identity
    assert rows(run, "FROM vocabulary") == [(1, "one")]
    refused(run, "another objective .ppo_clip for mhpo", objective="grpo")
    refused(run, "another objective .c = 2.0 for 1.5", objective=objectives.create("mhpo", c=2.0))
    assert (run / "run.json").read_bytes() == identity
    assert column(run, "SELECT step FROM steps") == [0, 1]


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_every_objective_can_be_recorded_and_resumed(tmp_path, name):
    """JSON has no tuples, and the hyperparameters of a resumed run come from there."""
    for kind in ("started", "resumed"):
        new_recorder(tmp_path / "run", objective=objectives.create(name)).close()
        assert kind in column(tmp_path / "run", "SELECT kind FROM events")


@pytest.mark.parametrize(
    ("before", "after", "attempts"),
    [
        ([0, 1, 2], [3, 4], [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]),
        ([0, 1, 2], [2], [(0, 0), (1, 0), (2, 0), (2, 1)]),
        # rewound to 1 and stopped at 2: step 3 goes on from there, although step 4 was reached once
        ([0, 1, 2, 3, 4, 1, 2], [3], [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]),
        ([5], [7, 7], [(5, 0), (7, 0), (7, 1)]),
    ],
)
def test_attempts_go_on_across_writers(tmp_path, before, after, attempts):
    record_steps(tmp_path / "run", before)
    record_steps(tmp_path / "run", after)
    assert rows(tmp_path / "run", "SELECT step, attempt FROM steps_all") == attempts


def test_a_moved_or_copied_run_opens_where_it_is(tmp_path, monkeypatch):
    record_steps(tmp_path / "run", range(3))
    expected = everything(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert everything(tmp_path / "copy") == everything(Path("moved")) == expected


def test_a_run_without_a_step_has_all_its_tables(tmp_path):
    Recorder(tmp_path / "run", objective="mhpo", fsync=False).close()
    with open_run(tmp_path / "run") as run:
        for table in ("steps", "steps_all", "tokens", "sequences", "gradients", "metrics", "histograms"):
            assert rows(run, f"FROM {table}") == [] and "step" in run.sql(f"FROM {table}").columns
        types = dict(rows(run, "SELECT column_name, column_type FROM (DESCRIBE tokens)"))
    record_steps(tmp_path / "full", [0], vocabulary={1: "x"})
    assert types == dict(rows(tmp_path / "full", "SELECT column_name, column_type FROM (DESCRIBE tokens)"))
