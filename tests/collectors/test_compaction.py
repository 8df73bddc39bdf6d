"""Compaction and upgrade stopped at every point, beside writers and readers, around damage: no answer changes."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import duckdb
import pytest

from app.cli import main
from collectors import StoreError, compaction, layout, open_run, policy, store
from collectors.compaction import compact
from collectors.integrity import verify
from collectors.retention import pin_ring
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from mhpo_core import Sequences, objectives
from tests.collectors.processes import start
from tests.collectors.support import column, everything, new_recorder, rows, token_batch
from tests.collectors.writer import writing

OLD = Path(__file__).parent / "data" / "schema-2"
WIDE = 24
KILLS = 16
TABLES = (*layout.STEP_TABLES, layout.EVENTS)


def record(path: Path, steps, *, pin_at: int | None = None, **options) -> None:
    with new_recorder(path, **options) as recorder:
        for step in steps:
            texts = Sequences(prompt=["p"] * WIDE, completion=[f"c{step} {i}" for i in range(WIDE)])
            recorder.record(step, token_batch(step, WIDE), sequences=texts, metrics={"lr": 1e-6})
            if step == pin_at:
                recorder.pin("a test", after=1)


def record_ranks(path: Path, steps, **options) -> None:
    recorders = [new_recorder(path, rank=rank, world_size=2, **options) for rank in (0, 1)]
    for step in steps:
        for rank, recorder in enumerate(recorders):
            recorder.record(step, token_batch(100 * rank + step, WIDE))
    for recorder in recorders:
        recorder.close()


def small_run(path: Path, kind: str) -> Path:
    """Two attempts, sealed and single steps, written by two writers."""
    if kind == "ranks":
        record_ranks(path, range(5))
        record_ranks(path, [5, 6, 4, 5])
    else:
        options = {"flight": {"tokens": "flight:3"}, "minimal": {"columns": "minimal", "precision": "compact"}}[kind]
        record(path, range(7), pin_at=3, **options)
        record(path, [7, 8, 6, 7], **options)
    return path


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(store, "SEAL_AFTER_STEPS", 3)


def names(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*.parquet"))


class Stopped(BaseException):
    """Not an error that anything could catch."""


@pytest.fixture
def stop_after(monkeypatch):
    """Let so many changes of the storage happen and none after them."""
    left = {"changes": 1 << 30, "done": 0}

    def counted(change):
        def changed(self, name, *rest, **options):
            if left["changes"] == 0:
                raise Stopped
            left["changes"] -= 1
            left["done"] += 1
            return change(self, name, *rest, **options)

        return changed

    for name in ("write", "create", "copy", "delete"):
        monkeypatch.setattr(LocalStorage, name, counted(getattr(LocalStorage, name)))

    def allow(changes: int = 1 << 30) -> int:
        done, left["changes"], left["done"] = left["done"], changes, 0
        return done

    return allow


def count_files(run: Path) -> int:
    return len([p for p in run.rglob("*.parquet") if p.parent.name in layout.LEVELS[layout.TOKENS]])


@pytest.mark.parametrize("options", [{"tokens": "all"}, {"tokens": "flight:9"}, {"precision": "compact"}], ids=str)
def test_the_answers_stay_and_the_files_become_few(tmp_path, monkeypatch, options):
    monkeypatch.setattr(store, "SEAL_AFTER_STEPS", 7)
    run = tmp_path / "run"
    record(run, (*range(30), *range(25, 40)), **options)
    before, count = everything(run), count_files(run)
    done = compact(LocalStorage(run), wait=0.0)
    assert everything(run) == before and verify(LocalStorage(run)).findings == []
    assert (done.files_before, done.files_after) == (count, count_files(run)) and count_files(run) <= 14 < count
    record(run, [40, 41], **options)  # the next writer goes on
    assert column(run, "SELECT step FROM steps") == list(range(42))


# Stopped anywhere


@pytest.mark.parametrize("kind", ["flight", "ranks", pytest.param("minimal", marks=pytest.mark.slow)])
def test_the_answers_are_the_same_wherever_it_is_stopped(tmp_path, stop_after, kind):
    template = small_run(tmp_path / "template", kind)
    expected = everything(template)
    whole = Path(shutil.copytree(template, tmp_path / "whole"))
    stop_after()
    compact(LocalStorage(whole), wait=0.0, file_bytes=40_000)
    changes = stop_after()
    assert everything(whole) == expected and verify(LocalStorage(whole)).findings == [] and changes > 15
    for allowed in range(0, changes, 1 + changes // 8):
        run = Path(shutil.copytree(template, tmp_path / f"run{allowed}"))
        stop_after(allowed)
        with pytest.raises(Stopped):
            compact(LocalStorage(run), wait=0.0, file_bytes=40_000)
        stop_after()
        assert everything(run) == expected, f"after {allowed} changes"
        compact(LocalStorage(run), wait=0.0, file_bytes=40_000)
        assert names(run) == names(whole), "the next one finishes"
        shutil.rmtree(run)


def _compact_again_and_again(run: Path) -> None:
    for size in (8_000, 30_000, 1 << 30):
        compact(LocalStorage(run), wait=0.0, file_bytes=size)


@pytest.mark.parametrize("kind", ["flight", pytest.param("ranks", marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path, kind):
    chance, unfinished = random.Random(1), 0
    run = small_run(tmp_path / "run", kind)
    expected, template = everything(run), Path(shutil.copytree(run, tmp_path / "template"))
    for _ in range(KILLS // 2):
        process = start(_compact_again_and_again, run)
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        unfinished += process.exitcode != 0
        assert everything(run) == expected
        if process.exitcode == 0 or chance.random() < 0.3:
            shutil.rmtree(run)
            shutil.copytree(template, run)
    assert unfinished > KILLS // 4
    compact(LocalStorage(run), wait=0.0)
    assert everything(run) == expected and verify(LocalStorage(run)).findings == []


@pytest.mark.parametrize("kind", ["flight", "minimal", "ranks"])
def test_a_second_compaction_changes_nothing(tmp_path, stop_after, kind):
    run = small_run(tmp_path / "run", kind)
    compact(LocalStorage(run), wait=0.0)
    before, modified = names(run), {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")}
    stop_after()
    done = compact(LocalStorage(run), wait=0.0)
    assert names(run) == before and {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")} == modified
    assert done.files_before == done.files_after and not done.skipped


# Damage in the middle


def test_what_is_truncated_in_the_middle_is_not_passed_for_whole(tmp_path):
    """Restored from a copy after the compaction, its steps are there again."""
    template = tmp_path / "template"
    record(template, range(12))
    expected = everything(template)
    for path in template.glob("*/hot/*"):
        path.unlink()
    for table in layout.STEP_TABLES:
        run = Path(shutil.copytree(template, tmp_path / table))
        (sealed,) = (run / table / "sealed").glob("s000000003-*")
        whole = sealed.read_bytes()
        sealed.write_bytes(whole[:-100])
        compact(LocalStorage(run), wait=0.0)
        findings = [(f.kind, f.name) for f in verify(LocalStorage(run)).findings if f.kind != "missing"]
        assert findings == [("truncated", f"{table}/sealed/{sealed.name}")]
        sealed.write_bytes(whole)
        assert everything(run) == expected, table
        compact(LocalStorage(run), wait=0.0)
        assert everything(run) == expected and len(list((run / table / "sealed").iterdir())) == 1


def test_single_steps_that_a_damaged_sealed_file_covers_are_kept(tmp_path):
    run = tmp_path / "run"
    record(run, range(6))
    (sealed,) = (run / "tokens" / "sealed").glob("s000000003-*")
    content = bytearray(sealed.read_bytes())
    content[500] ^= 1
    sealed.write_bytes(content)
    done = compact(LocalStorage(run), wait=0.0)
    assert done.skipped == (f"tokens/sealed/{sealed.name}",)
    assert [f.kind for f in verify(LocalStorage(run)).findings] == ["damaged"]
    sealed.unlink()  # the better copy shows
    assert verify(LocalStorage(run)).findings == []
    assert column(run, "SELECT DISTINCT step FROM tokens ORDER BY step") == list(range(6))


def test_single_steps_between_sealed_ones_are_not_swallowed_while_the_run_lives(tmp_path, monkeypatch):
    """Where the disk refused to seal them; their writer seals only what came later."""
    run, write = tmp_path / "run", LocalStorage.write

    def refuse(self, name, data, *, fsync):
        if "/sealed/s000000003-" in name:
            raise OSError(28, "No space left on device")
        write(self, name, data, fsync=fsync)

    monkeypatch.setattr(LocalStorage, "write", refuse)
    with new_recorder(run) as recorder:
        for step in range(9):
            recorder.record(step, token_batch(step, WIDE))
        recorder.flush()
        before = everything(run)
        assert compact(LocalStorage(run), wait=0.0).live
        assert everything(run) == before
        recorder.record(9, token_batch(9, WIDE))
    assert column(run, "SELECT DISTINCT step FROM tokens ORDER BY step") == list(range(10))
    assert verify(LocalStorage(run)).findings == []


# The ring and what was pinned


def test_steps_of_the_ring_between_pinned_ones_can_be_pinned_later(tmp_path):
    run = tmp_path / "run"
    record(run, range(10), tokens="flight:8")
    for table in ("tokens", "sequences"):
        for path in list((run / table / "ring").glob("*.parquet")):
            step = layout.parse_name("", path.name).first
            if step in (2, 3, 8, 9):
                (run / table / "pinned").mkdir(exist_ok=True)
                path.rename(run / table / "pinned" / path.name)
    expected = everything(run)
    compact(LocalStorage(run), wait=0.0)
    assert everything(run) == expected
    pin_ring(LocalStorage(run))
    assert list((run / "sequences" / "pinned").glob("s000000004-*"))
    compact(LocalStorage(run), wait=0.0)
    counts = rows(run, "SELECT step, count(*) FROM tokens GROUP BY step ORDER BY step")
    assert counts[2:] == [(s, int(token_batch(s, WIDE).mask.sum())) for s in range(2, 10)]


def test_a_pinned_step_whose_name_in_the_ring_was_left_behind_is_there_once(tmp_path):
    """A writer killed soon after a pin leaves both names."""
    run = tmp_path / "run"
    record(run, range(6), tokens="flight:4")
    pin_ring(LocalStorage(run))
    assert list((run / "tokens" / "ring").glob("*.parquet")), "both names are there"
    expected = everything(run)
    compact(LocalStorage(run), wait=0.0)
    assert everything(run) == expected
    counts = rows(run, "SELECT step, count(*) FROM tokens GROUP BY step ORDER BY step")
    assert counts[2:] == [(s, int(token_batch(s, WIDE).mask.sum())) for s in range(2, 6)]


def test_a_merged_ring_over_several_summary_files_is_read_and_outlives_the_next_writer(tmp_path, monkeypatch):
    monkeypatch.setitem(compaction.FILE_STEPS, layout.ROLLUP, 4)
    run = tmp_path / "run"
    record(run, range(10), tokens="flight:6")
    expected = everything(run)
    compact(LocalStorage(run), wait=0.0)
    assert len(list((run / "rollup" / "sealed").iterdir())) > 1
    assert len(list((run / "tokens" / "ring").glob("*.parquet"))) == 1
    assert everything(run) == expected
    record(run, [10], tokens="flight:6")
    counts = dict(rows(run, "SELECT step, count(*) FROM tokens GROUP BY step"))
    for step in range(4, 11):
        assert counts[step] == int(token_batch(step, WIDE).mask.sum()), "it goes when all of its steps have left"


# Beside a writer, beside readers


def test_a_live_run_is_compacted_beside_its_writer(tmp_path):
    run = tmp_path / "run"
    with writing(run, seal_after=4, grace=20.0) as writer:
        writer.wait_for_steps(24)
        assert compact(LocalStorage(run), wait=0.0).live
        writer.wait_for_steps(12)
        writer.kill()
    steps = column(run, "SELECT step FROM steps")
    assert steps == list(range(len(steps))) and len(steps) >= 24
    assert column(run, "SELECT count(DISTINCT step) FROM tokens") == [len(steps)]
    assert verify(LocalStorage(run)).findings == []


def test_a_writer_that_reaches_its_limit_while_its_files_are_compacted(tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "SMALLEST_LIMIT", 1_000_000)
    monkeypatch.setattr(store, "SEAL_AFTER_STEPS", 10)
    run, storage = tmp_path / "run", LocalStorage(tmp_path / "run")
    with new_recorder(run, disk_limit=2_500_000, when_full="wait") as recorder:
        for step in range(150):
            recorder.record(step, token_batch(step % 10, 300))
            if step % 40 == 39:
                recorder.flush()
                assert compact(storage, wait=0.0).live
    with open_run(run) as opened:
        steps = column(opened, "SELECT step FROM steps ORDER BY step")
        assert steps[-1] == 149 and column(opened, "SELECT count(*) FROM events WHERE kind = 'dropped'") == [0]
        assert column(opened, "SELECT count(*) FROM tokens WHERE step = 149")[0] > 1000, "the newest step is whole"
    assert verify(storage).findings == []
    assert sum(p.stat().st_size for p in run.rglob("*.parquet")) < 2_500_000


def test_a_writer_that_starts_while_a_run_is_compacted_gives_no_id_twice(tmp_path, monkeypatch):
    run = tmp_path / "run"
    record(run, range(5))
    read = LocalStorage.read
    compacted = []

    def read_late(self, name):
        """The compaction removes the file between the writer's listing and its reading."""
        if name.startswith("sequences/") and not compacted:
            compacted.append(name)
            compact(LocalStorage(run), wait=0.0)
        return read(self, name)

    monkeypatch.setattr(LocalStorage, "read", read_late)
    monkeypatch.setattr(compaction, "has_writer", lambda storage: False)
    with new_recorder(run) as recorder:
        monkeypatch.setattr(LocalStorage, "read", read)
        recorder.record(5, token_batch(5, WIDE))
    assert compacted
    found = rows(run, "SELECT count(*), count(DISTINCT sequence_id), count(DISTINCT step) FROM sequences")
    assert found == [(6 * WIDE, 6 * WIDE, 6)]


def test_a_run_on_a_place_without_locks_counts_as_live_until_it_says_that_it_ended(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for module in ("collectors.state", "collectors.compaction"):
        monkeypatch.setattr(f"{module}.has_writer", lambda storage: None)
    with new_recorder(run) as recorder:
        for step in range(10):
            recorder.record(step, token_batch(step, WIDE))
        recorder.flush()
        assert compact(LocalStorage(run), wait=0.0).live
        for step in range(10, 14):
            recorder.record(step, token_batch(step, WIDE))
    assert rows(run, "SELECT count(*), count(DISTINCT step) FROM steps") == [(14, 14)]
    assert not compact(LocalStorage(run), wait=0.0).live
    assert rows(run, "SELECT count(*), count(DISTINCT step) FROM steps") == [(14, 14)]


def test_readers_at_the_same_time_notice_nothing(tmp_path):
    run = tmp_path / "run"
    record(run, range(24), tokens="flight:6")
    expected, wrong, reads, stop = everything(run), [], [0], threading.Event()

    def read():
        try:
            while not stop.is_set():
                if everything(run) != expected:
                    wrong.append("another answer")
                reads[0] += 1
        except (duckdb.Error, OSError) as error:
            wrong.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for size in (20_000, 60_000, 1 << 30):
        compact(LocalStorage(run), wait=1.5, file_bytes=size)
    stop.set()
    reader.join()
    assert not wrong and reads[0] >= 3


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(compact.__kwdefaults__, "wait", 0.0)
    run = small_run(tmp_path / "run", "minimal")
    assert main(["compact", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (sealed, *_) = sorted((run / "tokens" / "sealed").iterdir())
    content = bytearray(sealed.read_bytes())
    content[300] ^= 1
    sealed.write_bytes(content)
    assert main(["compact", str(run)]) == 0
    out = capsys.readouterr().out
    assert "files of" in out and f"Left as it is, damaged: tokens/sealed/{sealed.name}" in out and "\x1b" not in out


# Upgrade


def check_upgraded(run: Path, *, unfinished: bool = False) -> None:
    """Every row that the fixture was written from."""
    kinds = {f.kind for f in verify(LocalStorage(run)).findings}
    assert kinds <= ({"foreign"} if unfinished else set()), "old files that nobody reads any more"
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, attempt FROM steps_all ORDER BY ALL") == sorted(
            [(s, 0) for s in range(8)] + [(6, 1)]
        )
        assert rows(opened, "SELECT step, attempt FROM steps") == [(s, int(s == 6)) for s in range(8)]
        assert column(opened, "SELECT step FROM steps WHERE isnan(loss)") == [6]
        assert column(opened, "SELECT kind FROM events") == ["started", "rewound", "finished"]
        for step in range(8):
            batch = token_batch(60 if step == 6 else step, 3)
            terms = objectives.create("mhpo").terms(batch)
            found = opened.sql(f"FROM tokens WHERE step = {step} ORDER BY sequence_id, position").fetchnumpy()
            for name in ("logp_new", "logp_old", "logp_rollout", "logp_ref", "entropy", "token_id"):
                assert found[name].tolist() == getattr(batch, name)[batch.mask].tolist(), name
            for name in ("hazard_positive", "hazard_negative", "hazard", "survival_weight", "gradient_multiplier"):
                assert found[name].tolist() == pytest.approx(getattr(terms, name)[batch.mask].tolist(), rel=1e-5), name
            counted = column(
                opened, f"SELECT sum(count) FROM histograms WHERE step = {step} AND quantity = 'log_ratio'"
            )
            assert counted == [int(batch.mask.sum())]
        assert rows(opened, "SELECT step, count(*) FROM sequences GROUP BY step ORDER BY step") == [
            (s, 3) for s in range(8)
        ]


def test_an_older_store_says_which_command_upgrades_it_and_that_does(tmp_path):
    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    with pytest.raises(StoreError, match=r"schema version 2, .* Upgrade it with `mhpo compact .*run`") as raised:
        open_run(run)
    assert "\n" not in str(raised.value)
    compact(LocalStorage(run), wait=0.0)
    check_upgraded(run)
    tail = RunTail(run, ["loss"])
    tail.poll()
    assert tail.state.name == "finished" and tail.last.step == 6
    record(run, [7, 8])
    assert column(run, "SELECT max(step) FROM steps") == [8]


def test_an_upgrade_stopped_anywhere_leaves_the_old_store_or_the_new_one(tmp_path, stop_after):
    whole = Path(shutil.copytree(OLD, tmp_path / "whole"))
    stop_after()
    compact(LocalStorage(whole), wait=0.0)
    changes = stop_after()
    check_upgraded(whole)
    assert not [n for n in names(whole) if n.count(".") < 4 and n != "vocabulary.parquet"], "nothing old is left"
    for allowed in range(0, changes, 1 + changes // 12):
        run = Path(shutil.copytree(OLD, tmp_path / f"run{allowed}"))
        stop_after(allowed)
        with pytest.raises(Stopped):
            compact(LocalStorage(run), wait=0.0)
        stop_after()
        try:
            check_upgraded(run, unfinished=True)
        except StoreError as error:
            assert "Upgrade it with `mhpo compact" in str(error)
        compact(LocalStorage(run), wait=0.0)
        assert names(run) == names(whole)
        shutil.rmtree(run)
    check_upgraded(whole)


def test_a_run_that_an_older_program_writes_is_not_upgraded_under_it(tmp_path):
    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    before = names(run)
    handle = os.open(run / "writer.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="is being written by an older version of mhpo") as raised:
        compact(LocalStorage(run), wait=0.0)
    assert "\n" not in str(raised.value) and names(run) == before
    os.close(handle)
    compact(LocalStorage(run), wait=0.0)
    check_upgraded(run)


def test_an_old_store_with_a_damaged_file_stays_as_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(compact.__kwdefaults__, "wait", 0.0)
    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    broken = run / "tokens" / "sealed" / "s000000003-000000005.a000.r000.parquet"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-50])
    assert main(["compact", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing of it is lost" in error
    broken.write_bytes(whole)
    assert main(["compact", str(run)]) == 0
    check_upgraded(run)
