"""A disk that fails costs telemetry and never training; what was lost is counted, and nothing half is left."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collectors import Recorder, open_run
from collectors.tail import RunTail
from tests.collectors.support import B, column, record_steps, rows, token_batch, wait_for
from tests.collectors.writer import PROCESSES


@pytest.fixture
def full_disk(monkeypatch):
    """Renames to these table/level folders fail while it says so, as they do on a full disk."""
    full: set[str] = set()
    replace = os.replace

    def fail_or_replace(source, target):
        if any(part in str(target) for part in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_or_replace)
    return full


@pytest.mark.parametrize("broken", ["tokens/hot", "sequences/hot", "rollup/hot", "/run/"])
def test_a_full_disk_loses_whole_steps_and_says_how_many(tmp_path, full_disk, caplog, broken):
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING), Recorder(run, objective="mhpo", fsync=False) as writer:
        for step in range(12):
            if step in (4, 8):
                wait_for(writer)
                full_disk ^= {broken}
            writer.record(step, token_batch(step))
        wait_for(writer)
    left = [0, 1, 2, 3, 8, 9, 10, 11]
    with open_run(run) as opened:  # sealed by now: the range of the sealed file covers the lost steps
        assert column(opened, "SELECT step FROM steps") == left
        assert column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1") == left
        assert column(opened, "SELECT count(*) FROM sequences") == [len(left) * B]
        events = rows(opened, "SELECT kind, detail FROM events WHERE kind != 'note'")
    assert [kind for kind, _ in events] == ["started", "dropped", "finished"]
    assert events[1][1].startswith("4 steps: writing failed: ") and "No space left" in events[1][1]
    assert not list(run.rglob("*.tmp"))
    assert [r.message for r in caplog.records if "training goes on" in r.message][1:] == []


def test_rows_of_a_lost_step_stay_lost_when_only_its_neighbours_steps_are_sealed(tmp_path, full_disk):
    run = tmp_path / "run"
    with Recorder(run, objective="mhpo", fsync=False) as writer:
        for step, broken in ((0, set()), (1, {"rollup/hot"}), (2, {"tokens/sealed", "sequences/sealed"})):
            full_disk.clear()
            full_disk |= broken
            writer.record(step, token_batch(step))
            wait_for(writer)
    assert list((run / "rollup" / "sealed").iterdir()) and not list((run / "tokens" / "sealed").iterdir())
    with open_run(run) as opened:
        for table in ("steps", "tokens", "sequences"):
            assert column(opened, f"SELECT DISTINCT step FROM {table} ORDER BY 1") == [0, 2]


def test_a_file_gets_its_name_when_it_is_whole_and_never_before(tmp_path, monkeypatch, seal_after):
    seal_after(3)
    replace, published = os.replace, []

    def check_then_replace(source, target):
        assert str(source).endswith(f".{os.getpid()}.tmp") and not os.path.exists(target)
        if str(target).endswith(".parquet"):
            assert pq.read_table(pa.OSFile(str(source))).num_rows > 0
        published.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", check_then_replace)
    record_steps(tmp_path / "run", range(7), vocabulary={1: "x"}, config={})
    found = {str(p) for p in (tmp_path / "run").rglob("*") if p.is_file()} - {str(tmp_path / "run" / "writer.lock")}
    assert set(published) == found and len(published) == 31
    assert column(tmp_path / "run", "SELECT kind FROM events") == ["started", "finished"]


def test_a_loss_at_the_very_end_is_counted_too(tmp_path, full_disk):
    with Recorder(tmp_path / "run", objective="mhpo", fsync=False) as writer:
        writer.record(0, token_batch(0))
        wait_for(writer)
        full_disk |= {"rollup/hot"}
        for step in range(1, 6):
            writer.record(step, token_batch(step))
    events = rows(tmp_path / "run", "SELECT kind, detail FROM events WHERE kind != 'note'")
    assert [kind for kind, _ in events] == ["started", "dropped", "finished"] and events[1][1].startswith("5 steps")


@pytest.mark.parametrize("broken", ["tokens/sealed", "sequences/sealed", "rollup/sealed", "sealed"])
def test_sealing_that_fails_loses_nothing(tmp_path, full_disk, seal_after, broken):
    seal_after(3)
    run = tmp_path / "run"
    full_disk |= {broken}
    with Recorder(run, objective="mhpo", fsync=False) as writer:
        for step in (*range(8), 6, 7):
            writer.record(step, token_batch(step))
    full_disk.clear()
    for _ in range(2):
        with open_run(run) as opened:
            assert column(opened, "SELECT step FROM steps") == list(range(8))
            assert column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1") == list(range(8))
            assert column(opened, "SELECT count(*) FROM steps_all") == [10]
        Recorder(run, objective="mhpo", fsync=False).close()


def _record_below_a_size_limit(path, reports):
    """On a real system call that fails: files of this process may not grow beyond 24 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Recorder(path, objective="mhpo", fsync=False) as writer:
        writer.record(0, token_batch(0))
        wait_for(writer)
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        writer.record(1, token_batch(1, n_sequences=4000))  # its token file is larger
        writer.record(2, token_batch(2))
    reports.send("training went on")


def test_a_write_that_the_kernel_refuses_loses_that_step_alone(tmp_path):
    reports, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_record_below_a_size_limit, args=(tmp_path / "run", theirs), daemon=True)
    process.start()
    assert reports.poll(60) and reports.recv() == "training went on"
    process.join()
    with open_run(tmp_path / "run") as opened:
        assert column(opened, "SELECT step FROM steps") == [0, 2]
        assert column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1") == [0, 2]
        dropped = column(opened, "SELECT detail FROM events WHERE kind = 'dropped'")
    assert len(dropped) == 1 and dropped[0].startswith("1 steps: writing failed: ")
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_folder_that_vanishes_stops_nothing(tmp_path):
    run = tmp_path / "run"
    with Recorder(run, objective="mhpo", fsync=False) as writer:
        writer.record(0, token_batch(0))
        wait_for(writer)
        tail = RunTail(run, ["loss"])
        tail.poll()
        (run / "rollup").rename(tmp_path / "gone")
        for step in range(1, 40):
            writer.record(step, token_batch(step))
        tail.poll()
        (tmp_path / "gone").rename(run / "rollup")
        wait_for(writer)
        writer.record(40, token_batch(40))
    assert {0, 40} <= set(column(run, "SELECT step FROM steps"))
    tail.poll()
    assert tail.last.step == 40
    tail.close()
