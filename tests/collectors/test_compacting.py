"""Compaction changes files and no answer, can be cut short anywhere, and brings an older store to today's schema."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest

from app.cli import main
from collectors import StoreError, compaction, open_run
from collectors.compaction import compact
from collectors.integrity import verify
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from mhpo_core import objectives
from tests.collectors.support import column, everything, new_recorder, record_steps, rows, token_batch
from tests.collectors.writer import PROCESSES, writing

OLD = Path(__file__).parent / "data" / "schema-2"
TABLES = ("steps", "steps_all", "tokens", "sequences", "gradients", "metrics", "histograms", "events")
KILLS = 12


def files(run: Path) -> int:
    return len([p for p in run.rglob("*.parquet") if p.parent.name in ("hot", "sealed", "ring", "pinned")])


def many_steps(run: Path, **options) -> None:
    with new_recorder(run, **options) as recorder:
        for step in (*range(30), *range(25, 40)):
            recorder.record(step, token_batch(step, 40))


@pytest.mark.parametrize("options", [{"tokens": "all"}, {"tokens": "flight:9"}, {"precision": "compact"}], ids=str)
def test_the_answers_stay_and_the_files_become_few(tmp_path, seal_after, options):
    seal_after(7)
    run = tmp_path / "run"
    many_steps(run, **options)
    before, count = everything(run, TABLES), files(run)
    done = compact(LocalStorage(run), wait=0.0)
    assert everything(run, TABLES) == before and verify(LocalStorage(run)).findings == []
    assert (done.files_before, done.files_after) == (count, files(run)) and files(run) <= 14 < count
    again = compact(LocalStorage(run), wait=0.0)
    assert again.files_before == again.files_after == files(run)
    record_steps(run, [40, 41], **options)  # the next writer goes on
    assert column(run, "SELECT step FROM steps") == list(range(42))


def _compact(run: Path) -> None:
    compact(LocalStorage(run), wait=0.0, file_bytes=60_000)


def test_a_compaction_that_is_killed_changes_nothing_and_the_next_one_finishes(tmp_path):
    chance = random.Random(1)
    template = tmp_path / "template"
    many_steps(template)
    expected = everything(template, TABLES)
    unfinished = 0
    for kill in range(KILLS):
        run = Path(shutil.copytree(template, tmp_path / f"run{kill}"))
        process = PROCESSES.Process(target=_compact, args=(run,), daemon=True)
        process.start()
        time.sleep(chance.uniform(0.02, 0.6))
        process.kill()
        process.join()
        unfinished += process.exitcode != 0
        assert everything(run, TABLES) == expected
        _compact(run)
        assert everything(run, TABLES) == expected and verify(LocalStorage(run)).findings == []
        shutil.rmtree(run)
    assert unfinished > KILLS // 3


def test_a_damaged_file_stays_where_it_is_and_costs_no_other(tmp_path):
    run = tmp_path / "run"
    many_steps(run)
    path = sorted((run / "tokens" / "hot").iterdir())[10]
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    shutil.rmtree(run / "tokens" / "sealed")
    path.write_bytes(content)
    done = compact(LocalStorage(run), wait=0.0)
    assert done.skipped == (str(path.relative_to(run)),) and path.exists()
    assert column(run, "SELECT count(*) FROM steps") == [40]
    assert len(column(run, "SELECT DISTINCT step FROM tokens")) >= 39


def test_a_live_run_is_compacted_beside_its_writer(tmp_path):
    run = tmp_path / "run"
    with writing(run, seal_after=4, grace=20.0) as writer:
        writer.wait_for_steps(24)
        done = compact(LocalStorage(run), wait=0.0)
        assert done.live
        writer.wait_for_steps(12)
        writer.kill()
    steps = column(run, "SELECT step FROM steps")
    assert steps == list(range(len(steps))) and len(steps) >= 24
    assert column(run, "SELECT count(DISTINCT step) FROM tokens") == [len(steps)]
    assert verify(LocalStorage(run)).findings == []


def test_the_command_tells_what_it_did(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compaction, "_SECONDS_FOR_READERS", 0.0)
    monkeypatch.setattr(compact, "__kwdefaults__", compact.__kwdefaults__ | {"wait": 0.0})
    many_steps(tmp_path / "run")
    assert main(["compact", str(tmp_path / "run")]) == 0
    assert " files of " in capsys.readouterr().out
    assert main(["compact", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_an_older_store_says_which_command_upgrades_it_and_that_does(tmp_path):
    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    with pytest.raises(StoreError, match=r"schema version 2, .* Upgrade it with `mhpo compact .*run`") as raised:
        open_run(run)
    assert "\n" not in str(raised.value)
    compact(LocalStorage(run), wait=0.0)
    assert verify(LocalStorage(run)).findings == []
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, attempt FROM steps") == [(s, int(s == 6)) for s in range(8)]
        assert column(opened, "SELECT count(*) FROM steps_all") == [9]
        assert [k for k in column(opened, "SELECT kind FROM events")] == ["started", "rewound", "finished"]
        for step in (0, 6, 7):
            batch = token_batch(60 if step == 6 else step, 3)
            terms = objectives.create("mhpo").terms(batch)
            found = opened.sql(f"FROM tokens WHERE step = {step} ORDER BY sequence_id, position").fetchnumpy()
            assert found["logp_new"].tolist() == batch.logp_new[batch.mask].tolist()
            assert found["hazard"].tolist() == pytest.approx(terms.hazard[batch.mask].tolist(), rel=1e-6)
            assert set(found["kept_because"]) == {"all"}
        assert column(opened, "SELECT token FROM tokens WHERE token_id = 7 LIMIT 1") in (["t7"], [])
    tail = RunTail(run, ["loss"])
    tail.poll()
    assert tail.state.name == "finished" and tail.last.step == 6
    record_steps(run, [7, 8])
    assert column(run, "SELECT max(step) FROM steps") == [8]


def _upgrade(run: Path) -> None:
    compact(LocalStorage(run), wait=0.0)


def test_an_upgrade_that_is_killed_leaves_the_old_store_or_the_new_one(tmp_path):
    chance = random.Random(2)
    expected = None
    for kill in range(8):
        run = Path(shutil.copytree(OLD, tmp_path / f"run{kill}"))
        process = PROCESSES.Process(target=_upgrade, args=(run,), daemon=True)
        process.start()
        time.sleep(chance.uniform(0.01, 0.4))
        process.kill()
        process.join()
        assert json.loads((run / "run.json").read_text())["schema_version"] in (2, 3)
        _upgrade(run)
        found = everything(run, TABLES)
        expected = expected or found
        assert found == expected and verify(LocalStorage(run)).findings == []
