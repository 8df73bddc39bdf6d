"""A clock that is set back, a disk that is slow or read-only, two machines that cannot see each other's lock."""

from __future__ import annotations

import errno
import fcntl
import os
import time

import pytest

from collectors import Recorder, StoreError, open_run, pipeline
from collectors.integrity import verify
from collectors.state import run_state
from collectors.storage import LocalStorage
from tests.collectors.support import column, new_recorder, rows, token_batch, wait_for


def test_a_clock_that_is_set_back_changes_no_order_and_no_state(tmp_path, monkeypatch):
    run, now = tmp_path / "run", [2_000_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for steps in (range(3), range(3, 6)):
        with new_recorder(run) as recorder:
            for step in steps:
                recorder.record(step, token_batch(step))
                now[0] -= 3600
    assert column(run, "SELECT kind FROM events") == ["started", "finished", "resumed", "finished"]
    times = column(run, "SELECT time FROM events")
    assert times == sorted(times)
    assert column(run, "SELECT step FROM steps") == list(range(6)) and run_state(LocalStorage(run)).name == "finished"


def test_a_slow_disk_costs_the_trainer_no_time(tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.05), fsync(handle))[1])
    with Recorder(tmp_path / "run", objective="mhpo", tokens="all", fsync="step") as recorder:
        began = time.thread_time()
        for step in range(10):
            recorder.record(step, token_batch(step))
        assert time.thread_time() - began < 1.0  # ten steps take the disk five seconds
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT step FROM steps") == list(range(10))
        assert column(run, "SELECT count(DISTINCT step) FROM tokens") == [10]


def test_a_slow_disk_that_holds_too_much_costs_tokens_and_no_summary(tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.02), fsync(handle))[1])
    monkeypatch.setattr(pipeline, "WAITING_BYTES", 20_000)
    with Recorder(tmp_path / "run", objective="mhpo", tokens="all", fsync="step") as recorder:
        for step in range(12):
            recorder.record(step, token_batch(step, 64))
            time.sleep(0.02)
    with open_run(tmp_path / "run") as run:
        found = dict(rows(run, "SELECT step, dropped_tokens FROM steps"))
        kept = set(column(run, "SELECT DISTINCT step FROM tokens"))
    assert sorted(found) == list(range(12))
    assert {s for s, dropped in found.items() if not dropped} == kept and 0 < len(kept) < 12


def test_a_read_only_folder_is_refused_or_waited_for(tmp_path, monkeypatch):
    run, replace, read_only = tmp_path / "run", os.replace, [False]

    def refuse(source, target):
        if read_only[0]:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with new_recorder(run) as recorder:
        recorder.record(0, token_batch(0))
        wait_for(recorder)
        read_only[0] = True
        recorder.record(1, token_batch(1))
        assert not recorder.flush(3)
        read_only[0] = False
        wait_for(recorder)
    assert column(run, "SELECT step FROM steps") == [0, 1]
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
    with pytest.raises(StoreError, match="cannot be written .*Read-only") as raised:
        Recorder(tmp_path / "other", objective="mhpo")
    assert "\n" not in str(raised.value)


def test_two_writers_that_cannot_see_each_other_lose_nothing_and_are_named(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    first, second = new_recorder(run), new_recorder(run)
    for step in range(4):
        first.record(step, token_batch(step))
        wait_for(first)
        second.record(step, token_batch(step + 20))
        wait_for(second)
    with open_run(run) as opened:
        steps = rows(opened, "SELECT step, attempt FROM steps")
        assert [s for s, _ in steps] == list(range(4))
        per_step = rows(
            opened, "SELECT step, count(*), count(DISTINCT (sequence_id, position)) FROM tokens GROUP BY step"
        )
        assert all(n == distinct for _, n, distinct in per_step) and len(per_step) == 4
    twice = {f.steps for f in verify(LocalStorage(run)).findings if f.kind == "doubled"}
    attempts = {a for _, a in steps}
    assert twice == {(s, s) for s in range(4)} or attempts == {1}, "either two files for a step, or an attempt each"
    first.close()
    second.close()
