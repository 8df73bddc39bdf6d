"""Sealing moves steps into larger files and changes no answer, whatever state of it a crash leaves behind."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from collectors import Recorder, open_run, recorder, store
from collectors.layout import STEP_TABLES, hot_name
from collectors.tail import RunTail
from mhpo_core import Sequences
from tests.collectors.support import B, column, everything, record_steps, rows, token_batch, wait_for

TABLES = ("steps", "steps_all", "tokens", "sequences", "gradients", "metrics", "histograms")


def names(run: Path, table: str, level: str) -> list[str]:
    return sorted(p.name for p in (run / table / level).iterdir())


def test_the_answers_before_and_after_sealing_are_equal(tmp_path):
    run = tmp_path / "run"
    writer = Recorder(run, objective="mhpo", fsync=False)
    for step in (0, 1, 4, 2, 3):
        metrics = {"lr": step / 8, "nan": float("nan")}
        sequences = Sequences(reward=[float("inf"), 0.0, 1.0, 2.0], completion=["a", None, "c", "d"])
        writer.record(step, token_batch(step), metrics=metrics, gradient_norms={"g": step}, sequences=sequences)
    wait_for(writer)
    before = everything(run, TABLES)
    assert len(names(run, "rollup", "sealed")) == 1, "the given up attempt, and not yet the current one"
    writer.close()
    assert names(run, "rollup", "sealed") == [
        "s000000000-000000004.a000.r000.parquet", "s000000002-000000003.a001.r000.parquet"
    ]  # fmt: skip
    assert everything(run, TABLES) == before
    for table in STEP_TABLES:
        shutil.rmtree(run / table / "hot")
    assert everything(run, TABLES) == before


@pytest.mark.parametrize("sealed", [set(STEP_TABLES), {"tokens"}, {"tokens", "sequences"}, set()])
def test_any_state_that_a_crash_in_sealing_leaves_gives_the_same_answers(tmp_path, seal_after, sealed):
    seal_after(4)
    run = tmp_path / "run"
    record_steps(run, [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8])
    expected = everything(run, TABLES)
    for table in STEP_TABLES:
        if table not in sealed:
            shutil.rmtree(run / table / "sealed")
    assert everything(run, TABLES) == expected
    record_steps(run, [9, 10])  # the next writer takes over whatever there is
    with open_run(run) as opened:
        assert column(opened, "SELECT step FROM steps") == list(range(11))
        assert column(opened, "SELECT count(*) FROM steps_all") == [14]
        assert column(opened, "SELECT count(DISTINCT step) FROM tokens") == [11]
    assert set(expected["steps_all"]) < set(everything(run, ["steps_all"])["steps_all"])


def test_sealed_steps_leave_their_own_files_only_after_the_grace(tmp_path, seal_after, monkeypatch):
    seal_after(3)
    record_steps(tmp_path / "slow", range(7))
    assert len(names(tmp_path / "slow", "rollup", "hot")) == 7
    monkeypatch.setattr(store, "GRACE_SECONDS", -1.0)
    record_steps(tmp_path / "quick", range(7))
    for table in STEP_TABLES:
        assert names(tmp_path / "quick", table, "hot") == [hot_name(6, 0)]
    assert everything(tmp_path / "quick", ["tokens"]) == everything(tmp_path / "slow", ["tokens"])
    record_steps(tmp_path / "slow", [7])  # what the first writer left is removed by the next, after its grace
    assert names(tmp_path / "slow", "rollup", "hot") == [hot_name(6, 0), hot_name(7, 0)]


def test_size_seals_too(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SEAL_AFTER_BYTES", 10_000)
    record_steps(tmp_path / "run", range(12))
    assert len(names(tmp_path / "run", "rollup", "sealed")) > 1
    assert column(tmp_path / "run", "SELECT step FROM steps") == list(range(12))


def test_rows_without_a_committed_step_are_invisible_and_removed_by_the_next_writer(tmp_path):
    run = tmp_path / "run"
    record_steps(run, range(2))
    expected = everything(run, TABLES)
    record_steps(tmp_path / "other", [2, 3])
    for table in ("tokens", "sequences"):  # a writer that was killed just before it committed step 2
        shutil.copy(tmp_path / "other" / table / "hot" / hot_name(2, 0), run / table / "hot")
    assert everything(run, TABLES) == expected
    record_steps(run, [3, 4])
    assert column(run, "SELECT DISTINCT step FROM tokens ORDER BY 1") == [0, 1, 3, 4]
    assert column(run, "SELECT DISTINCT step FROM sequences ORDER BY 1") == [0, 1, 3, 4]
    assert not [f for t in STEP_TABLES for f in names(run, t, "hot") if f == hot_name(2, 0)]


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes nothing until it is told to."""
    gate = threading.Event()
    commit = store.StoreWriter.commit_step

    def wait_then_commit(self, key, tables):
        gate.wait(30)
        commit(self, key, tables)

    monkeypatch.setattr(store.StoreWriter, "commit_step", wait_then_commit)
    yield gate
    gate.set()


def test_a_disk_that_cannot_keep_up_costs_tokens_first_and_is_counted(tmp_path, monkeypatch, slow_disk):
    monkeypatch.setattr(recorder, "TOKENS_MAY_WAIT", 3)
    monkeypatch.setattr(recorder, "SUMMARIES_MAY_WAIT", 6)
    run = tmp_path / "run"
    with Recorder(run, objective="mhpo", fsync=False) as writer:
        writer.record(0, token_batch(0))
        while writer._queue.qsize():
            time.sleep(0.001)
        for step in range(1, 10):  # three wait with tokens, three without, three are dropped
            writer.record(step, token_batch(step))
        slow_disk.set()
        wait_for(writer)
        writer.record(10, token_batch(10))
    record_steps(tmp_path / "whole", range(11))
    tokens = {s: int(token_batch(s).mask.sum()) for s in range(11)}
    with open_run(run) as opened, open_run(tmp_path / "whole") as whole:
        assert column(opened, "SELECT step FROM steps") == [0, 1, 2, 3, 4, 5, 6, 10]
        dropped = dict(rows(opened, "SELECT step, dropped_tokens FROM steps"))
        assert dropped == {s: tokens[s] if s in (4, 5, 6) else 0 for s in dropped}
        assert dict(rows(opened, "SELECT step, count(*) FROM tokens GROUP BY step")) == {
            s: n for s, n in tokens.items() if s in (0, 1, 2, 3, 10)
        }
        exact = (
            "SELECT step, n_tokens, log_ratio_mean, log_ratio_p99, hazard_mean, ess_fraction FROM steps WHERE step IN "
        )
        assert rows(opened, f"{exact} (4, 5, 6)") == rows(whole, f"{exact} (4, 5, 6)")
        histograms = "FROM histograms WHERE step BETWEEN 4 AND 6 ORDER BY ALL"
        assert rows(opened, histograms) == rows(whole, histograms)
        events = rows(opened, "SELECT kind, detail FROM events")
    assert ("dropped", "3 steps: the disk could not keep up") in events and events[-1] == ("finished", "")
    tail = RunTail(run, ["loss"])
    tail.poll()
    assert tail.dropped_tokens == sum(dropped.values()) and tail.n_tokens == sum(tokens[s] for s in dropped)
    tail.close()


def test_ids_of_unnamed_sequences_are_unique_within_the_run(tmp_path):
    run = tmp_path / "run"
    for steps in ([0, 1], [2], [1, 2, 3]):  # resumed, then resumed and rewound
        record_steps(run, steps)
    with open_run(run) as opened:
        assert column(opened, "SELECT count(DISTINCT sequence_id) FROM raw_sequences") == [6 * B]
        per_step = "SELECT step, count(*), min(sequence_id) FROM sequences GROUP BY step ORDER BY step"
        assert rows(opened, per_step) == [(0, B, 0), (1, B, 3 * B), (2, B, 4 * B), (3, B, 5 * B)]
