"""Sealing moves steps into larger files and changes no answer, whatever state of it a crash leaves behind."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from collectors import open_run, pipeline, store
from collectors.layout import STEP_TABLES, list_level
from collectors.policy import TokenPolicy
from collectors.retention import Retention
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from mhpo_core import Sequences
from mhpo_core.metrics import METRICS
from tests.collectors.support import (
    B,
    T,
    column,
    everything,
    new_recorder,
    record_steps,
    rows,
    step_files,
    token_batch,
    wait_for,
)

TABLES = ("steps", "steps_all", "tokens", "sequences", "gradients", "metrics", "histograms")


def ranges(run: Path, table: str, level: str) -> list[tuple[int, int, int]]:
    """First and last step and attempt of every file; all of them are whole."""
    damaged: list = []
    found = list_level(LocalStorage(run), table, level, damaged)
    assert not damaged and len(found) == len(list((run / table / level).iterdir()))
    return sorted((f.first, f.last, f.attempt) for f in found)


POLICIES = [
    {"tokens": "all"},
    {"tokens": "flight:3"},
    {"tokens": "sample:2", "columns": "minimal"},
    {"tokens": "flight:3", "precision": "compact"},
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(policy.values()))
def test_the_answers_before_and_after_sealing_are_equal(tmp_path, policy, monkeypatch):
    monkeypatch.setattr(store, "GRACE_SECONDS", -1.0)  # otherwise steps stay in the ring until the run ends
    run, n = tmp_path / "run", 64
    writer = new_recorder(run, alarms=None, **policy)
    for step in (0, 1, 4, 2, 3):
        metrics = {"lr": step / 8, "nan": float("nan")}
        completion = ["a", None, "c", "d"] * (n // 4)
        sequences = Sequences(reward=[float("inf"), 0.0, 1.0, 2.0] * (n // 4), completion=completion)
        batch = token_batch(step, n)
        writer.record(step, batch, metrics=metrics, gradient_norms={"g": step}, sequences=sequences)
    wait_for(writer)
    before = everything(run, TABLES)
    assert len(ranges(run, "rollup", "sealed")) == 1, "the given up attempt, and not yet the current one"
    reasons = {"all": {"all"}, "sam": {"sample"}, "fli": {"sample", "low tail", "high tail", "ring", "pinned"}}
    assert set(column(run, "SELECT kept_because FROM tokens")) == reasons[policy["tokens"][:3]]
    writer.close()
    assert ranges(run, "rollup", "sealed") == [(0, 4, 0), (2, 3, 1)]
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
    assert len(ranges(tmp_path / "slow", "rollup", "hot")) == 7
    monkeypatch.setattr(store, "GRACE_SECONDS", -1.0)
    record_steps(tmp_path / "quick", range(7))
    for table in STEP_TABLES:
        assert ranges(tmp_path / "quick", table, "hot") == [(6, 6, 0)]
    assert everything(tmp_path / "quick", ["tokens"]) == everything(tmp_path / "slow", ["tokens"])
    record_steps(tmp_path / "slow", [7])  # what the first writer left is removed by the next, after its grace
    for table in STEP_TABLES:
        assert ranges(tmp_path / "slow", table, "hot") == [(7, 7, 0)]
        assert ranges(tmp_path / "slow", table, "sealed") == [(0, 2, 0), (3, 5, 0), (6, 6, 0)]


def test_size_seals_too(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SEAL_AFTER_BYTES", 10_000)
    record_steps(tmp_path / "run", range(12))
    assert len(ranges(tmp_path / "run", "rollup", "sealed")) > 1
    assert column(tmp_path / "run", "SELECT step FROM steps") == list(range(12))


def test_rows_without_a_committed_step_are_invisible_and_removed_by_the_next_writer(tmp_path):
    run = tmp_path / "run"
    record_steps(run, range(2))
    expected = everything(run, TABLES)
    record_steps(tmp_path / "other", [2, 3])
    for table in ("tokens", "sequences"):  # a writer that was killed just before it committed step 2
        (left,) = step_files(tmp_path / "other", table, "hot", 2)
        shutil.copy(left, run / table / "hot")
    assert everything(run, TABLES) == expected
    record_steps(run, [3, 4])
    assert column(run, "SELECT DISTINCT step FROM tokens ORDER BY 1") == [0, 1, 3, 4]
    assert column(run, "SELECT DISTINCT step FROM sequences ORDER BY 1") == [0, 1, 3, 4]
    assert not [f for t in STEP_TABLES for f in step_files(run, t, "hot", 2)]


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes nothing until it is told to."""
    gate = threading.Event()
    commit = store.StoreWriter.commit_step

    def wait_then_commit(self, key, tables, rollup):
        assert gate.wait(60)
        commit(self, key, tables, rollup)

    monkeypatch.setattr(store.StoreWriter, "commit_step", wait_then_commit)
    yield gate
    gate.set()


FULL = token_batch(0).mask.new_ones(B, T)  # all batches of one size


def record_and_measure(writer, step: int) -> None:
    writer.record(step, token_batch(step, mask=FULL), loss=step / 8)
    while writer._pipeline._unmeasured:
        time.sleep(0.001)


def test_a_disk_that_cannot_keep_up_costs_tokens_alone_and_is_counted(tmp_path, monkeypatch, slow_disk):
    run = tmp_path / "run"
    with new_recorder(run) as writer:
        record_and_measure(writer, 0)
        monkeypatch.setattr(pipeline, "WAITING_BYTES", int(3.5 * writer._pipeline._unwritten))
        for step in range(1, 10):
            record_and_measure(writer, step)
        assert writer.flush(0.01) is False
        slow_disk.set()
        assert writer.flush(30) is True
        record_and_measure(writer, 10)
    with new_recorder(tmp_path / "whole") as writer:
        for step in range(11):
            record_and_measure(writer, step)
    kept, dropped = [0, 1, 2, 3, 10], [4, 5, 6, 7, 8, 9]
    with open_run(run) as opened, open_run(tmp_path / "whole") as whole:
        assert column(opened, "SELECT step FROM steps") == list(range(11))
        numbers = dict(rows(opened, "SELECT step, dropped_tokens FROM steps"))
        assert numbers == dict.fromkeys(kept, 0) | dict.fromkeys(dropped, B * T)
        assert rows(opened, "SELECT step, count(*) FROM tokens GROUP BY step ORDER BY 1") == [(s, B * T) for s in kept]
        assert rows(opened, "SELECT step, count(*) FROM sequences GROUP BY step ORDER BY 1") == [(s, B) for s in kept]
        measured = f"SELECT {', '.join(m for m in METRICS if m not in ('dropped_tokens', 'recorder_ms'))} FROM steps"
        assert rows(opened, measured) == rows(whole, measured)
        for table in ("histograms", "metrics", "gradients"):
            assert rows(opened, f"FROM {table} ORDER BY ALL") == rows(whole, f"FROM {table} ORDER BY ALL")
        assert column(opened, "SELECT kind FROM events") == ["started", "finished"]
    tail = RunTail(run, ["loss"])
    tail.poll()
    assert (tail.dropped_tokens, tail.n_tokens) == (len(dropped) * B * T, 11 * B * T)
    tail.close()


def test_batches_that_cannot_be_measured_in_time_leave_a_row_with_what_the_trainer_said(tmp_path, monkeypatch):
    gate, prepare = threading.Event(), pipeline.prepare

    def wait_then_prepare(*arguments):
        assert gate.wait(60)
        return prepare(*arguments)

    monkeypatch.setattr(pipeline, "prepare", wait_then_prepare)
    run = tmp_path / "run"
    with new_recorder(run) as writer:
        writer.record(0, token_batch(0))
        monkeypatch.setattr(pipeline, "WAITING_BYTES", int(2.5 * writer._pipeline._unmeasured))
        for step in range(1, 6):
            writer.record(step, token_batch(step), loss=step / 8, reward=[1.0, 2.0, 3.0, 4.0], metrics={"lr": 0.5})
        gate.set()
        assert writer.flush(30)
        writer.record(6, token_batch(6))
    tokens = [int(token_batch(step).mask.sum()) for step in range(7)]
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_tokens, dropped_tokens FROM steps") == [
            (s, n, n if s in (2, 3, 4, 5) else 0) for s, n in enumerate(tokens)
        ]
        assert column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1") == [0, 1, 6]
        said = "SELECT loss, reward_mean, lr, log_ratio_mean, hazard_mean FROM steps WHERE step BETWEEN 2 AND 5"
        assert rows(opened, said) == [(step / 8, 2.5, 0.5, None, None) for step in range(2, 6)]
        assert column(opened, "SELECT step FROM metrics WHERE name = 'lr' ORDER BY 1") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", ["WAITING_BYTES", "WAITING_STEPS"])
def test_a_recorder_that_waits_for_the_disk_drops_nothing(tmp_path, monkeypatch, slow_disk, limit):
    monkeypatch.setattr(pipeline, limit, 1)
    with new_recorder(tmp_path / "run", when_full="wait") as writer:
        opener = threading.Timer(0.3, slow_disk.set)
        opener.start()
        began = time.monotonic()
        for step in range(6):
            writer.record(step, token_batch(step))
        assert time.monotonic() - began > 0.25
        opener.join()
    with open_run(tmp_path / "run") as opened:
        assert column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1") == list(range(6))
        assert column(opened, "SELECT sum(dropped_tokens) FROM steps") == [0]


def test_steps_that_have_no_text_to_give_up_keep_their_rows(tmp_path, monkeypatch, seal_after):
    seal_after(3)
    monkeypatch.setattr(store, "GRACE_SECONDS", -1.0)
    run = tmp_path / "run"
    record_steps(run, range(12))
    storage = LocalStorage(run)
    files = [(f.name, f.size) for t in STEP_TABLES for lv in ("hot", "sealed") for f in list_level(storage, t, lv)]
    said: list[str] = []

    def retention(limit: int | None) -> Retention:
        found = Retention(storage, 0, limit, TokenPolicy.parse("all"), lambda kind, detail: said.append(kind))
        found.begin(files)
        return found

    assert retention(retention(None).used).fits("rollup/hot/s000000012.a000.r000.00000000.1000.parquet", 1000)
    left = column(run, "SELECT step FROM steps")
    assert 0 < len(left) < 12 and left == list(range(12 - len(left), 12)), "the oldest files had to go"
    assert column(run, "SELECT DISTINCT step FROM sequences ORDER BY 1") == left
    assert said and set(said) == {"disk_limit"}


def test_ids_of_unnamed_sequences_are_unique_within_the_run(tmp_path):
    run = tmp_path / "run"
    for steps in ([0, 1], [2], [1, 2, 3]):  # resumed, then resumed and rewound
        record_steps(run, steps)
    with open_run(run) as opened:
        assert column(opened, "SELECT count(DISTINCT sequence_id) FROM raw_sequences") == [6 * B]
        per_step = "SELECT step, count(*), min(sequence_id) FROM sequences GROUP BY step ORDER BY step"
        assert rows(opened, per_step) == [(0, B, 0), (1, B, 3 * B), (2, B, 4 * B), (3, B, 5 * B)]


def test_a_segment_of_the_usual_length_keeps_every_token(tmp_path):
    run, batch = tmp_path / "run", token_batch(0)
    with new_recorder(run, tokens="all", when_full="wait") as recorder:
        for step in range(store.SEAL_AFTER_STEPS + 4):
            recorder.record(step, batch)
    with open_run(run) as opened:
        assert column(opened, "SELECT sum(dropped_tokens) FROM steps") == [0]
        counts = column(opened, "SELECT count(*) FROM tokens GROUP BY step")
        assert counts == [int(batch.mask.sum())] * (store.SEAL_AFTER_STEPS + 4)
        assert column(opened, "SELECT kind FROM events") == ["started", "finished"]
    assert [f.last - f.first for f in list_level(LocalStorage(run), "tokens", "sealed") if f.first == 0] == [255]
