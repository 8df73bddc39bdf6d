"""A disk that fails costs telemetry and never training; what was lost is counted, and nothing half is left."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collectors import open_run, pipeline, store
from collectors.state import run_state
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from mhpo_core import Sequences
from tests.collectors.support import (
    B,
    column,
    new_recorder,
    record_steps,
    rows,
    token_batch,
    wait_for,
)
from tests.collectors.writer import PROCESSES

TOKENS = [int(token_batch(step).mask.sum()) for step in range(13)]


class Broken(set):
    """Parts of paths to which no file gets its name, and the error that says so."""

    errno = errno.ENOSPC

    def refuse(self, target) -> None:
        if any(part in str(target) for part in self):
            raise OSError(self.errno, os.strerror(self.errno), str(target))


@pytest.fixture
def full_disk(monkeypatch):
    """Nothing new appears in these table/level folders while it says so, as on a full disk."""
    broken = Broken()

    def guarded(rename):
        def fail_or_rename(source, target):
            broken.refuse(target)
            rename(source, target)

        return fail_or_rename

    for name in ("replace", "rename", "link"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return broken


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Twelve steps on a disk that never failed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    record_steps(path, range(12))
    with open_run(path) as run:
        yield run


@pytest.mark.parametrize(
    ("code", "broken"),
    [
        *itertools.product([errno.ENOSPC, errno.EIO], ["tokens/hot", "sequences/hot", "rollup/hot", "/run/"]),
        (errno.EDQUOT, "tokens/hot"),
        (errno.EACCES, "/run/"),
    ],
)
def test_a_disk_that_fails_for_a_while_costs_no_summary(tmp_path, full_disk, caplog, whole, broken, code):
    """A full one costs tokens of the steps it refused, which are counted; any other error may pass, and costs none."""
    run = tmp_path / "run"
    full_disk.errno = code
    with caplog.at_level(logging.WARNING), new_recorder(run) as writer:
        for step in range(12):
            if step in (4, 8):
                wait_for(writer)
                full_disk ^= {broken}
            writer.record(step, token_batch(step), gradient_norms={"layer": step + 0.5}, loss=step / 8)
        wait_for(writer)
        assert writer.flush(30)
    refused = {"tokens/hot": [4, 5, 6, 7], "sequences/hot": [4, 5, 6, 7]}.get(broken, [4])
    without = refused if code in (errno.ENOSPC, errno.EDQUOT) else []
    left = [step for step in range(12) if step not in without]
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_tokens, dropped_tokens FROM steps") == [
            (step, TOKENS[step], TOKENS[step] if step in without else 0) for step in range(12)
        ]
        summary = "SELECT step, loss, log_ratio_p99, hazard_mean FROM steps"
        assert rows(opened, summary) == rows(whole, summary)
        assert rows(opened, "FROM histograms ORDER BY ALL") == rows(whole, "FROM histograms ORDER BY ALL")
        assert column(opened, "SELECT grad_norm FROM gradients ORDER BY step") == [s + 0.5 for s in range(12)]
        steps = f"SELECT step, position, logp_new FROM tokens WHERE step IN {tuple(left)} ORDER BY ALL"
        assert rows(opened, steps) == rows(whole, steps)
        assert column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1") == left
        assert column(opened, "SELECT count(*) FROM sequences") == [len(left) * B]
        assert column(opened, "SELECT kind FROM events") == ["started", "finished"]
    assert not list(run.rglob("*.tmp"))
    assert len([r.message for r in caplog.records if "training goes on" in r.message]) == 1


@pytest.mark.parametrize("waiting", [4096, 0])
def test_rows_of_a_step_without_tokens_stay_out_when_only_its_neighbours_are_sealed(
    tmp_path, full_disk, monkeypatch, waiting
):
    """The range of a sealed rollup file covers step 1, whether or not that step is in it."""
    monkeypatch.setattr(pipeline, "WAITING_SUMMARIES", waiting)
    run = tmp_path / "run"
    with new_recorder(run) as writer:
        for step, broken in ((0, set()), (1, {"rollup/hot"}), (2, {"tokens/sealed", "sequences/sealed"})):
            full_disk.clear()
            full_disk |= broken
            writer.record(step, token_batch(step))
            wait_for(writer)
    assert list((run / "rollup" / "sealed").iterdir())
    for table in ("tokens", "sequences"):
        assert not list((run / table / "sealed").iterdir()) and len(list((run / table / "hot").iterdir())) == 2
    with open_run(run) as opened:
        assert column(opened, "SELECT step FROM steps") == ([0, 1, 2] if waiting else [0, 2])
        for table in ("tokens", "sequences"):
            assert column(opened, f"SELECT DISTINCT step FROM {table} ORDER BY 1") == [0, 2]
        events = rows(opened, "SELECT kind, detail FROM events")
    assert [kind for kind, _ in events] == ["started", *([] if waiting else ["dropped"]), "finished"]
    assert waiting or events[1][1].startswith("1 steps: writing failed: ") and "No space left" in events[1][1]


def test_a_file_gets_its_name_when_it_is_whole_and_never_before(tmp_path, monkeypatch, seal_after):
    seal_after(3)
    published = []

    def checked(publish):
        def check_then_publish(source, target):
            assert str(source) == f"{target}.{os.getpid()}.tmp" and not os.path.exists(target)
            if str(target).endswith(".parquet"):
                assert pq.read_table(pa.OSFile(str(source))).num_rows > 0
            published.append(os.path.relpath(target, tmp_path / "run"))
            publish(source, target)

        return check_then_publish

    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    record_steps(tmp_path / "run", range(7), vocabulary={1: "x"}, config={})
    found = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert set(published) == found - {"writers/r000.lock", "writers/launch.lock"}
    # run.json, vocabulary, the attempt, two events, seven steps and two sealed files in three tables
    assert len(published) == 5 + 3 * 9
    assert column(tmp_path / "run", "SELECT kind FROM events") == ["started", "finished"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_loss_at_the_very_end_is_counted_too(tmp_path, full_disk, code):
    full_disk.errno = code
    run = tmp_path / "run"
    with new_recorder(run) as writer:
        writer.record(0, token_batch(0))
        wait_for(writer)
        full_disk |= {"rollup/hot"}
        for step in range(1, 6):
            writer.record(step, token_batch(step))
        assert writer.flush(30) is False
    assert writer.flush() is False
    events = rows(run, "SELECT kind, detail FROM events")
    assert [kind for kind, _ in events] == ["started", "dropped", "finished"] and events[1][1].startswith("5 steps")
    assert run_state(LocalStorage(run)).name == "finished"
    for table in ("rollup", "tokens", "sequences"):
        assert len(list((run / table / "hot").iterdir())) == 1, "nothing half is left"
    assert column(run, "SELECT DISTINCT step FROM tokens") == column(run, "SELECT step FROM steps") == [0]


def test_a_loss_that_not_even_an_event_can_tell_is_logged(tmp_path, full_disk, caplog):
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING), new_recorder(run) as writer:
        writer.record(0, token_batch(0))
        wait_for(writer)
        full_disk |= {"/run/"}
        for step in range(1, 6):
            writer.record(step, token_batch(step))
    assert [r.message for r in caplog.records if "lost" in r.message] == [f"Recorder: 5 steps of {run} are lost."]
    full_disk.clear()
    assert column(run, "SELECT kind FROM events") == ["started"] and column(run, "SELECT step FROM steps") == [0]
    assert run_state(LocalStorage(run)).name == "killed"


def test_what_waits_for_a_disk_that_refuses_is_bounded_and_summaries_outlive_tokens(tmp_path, full_disk, monkeypatch):
    run = tmp_path / "run"
    full_disk.errno = errno.EIO
    mask = token_batch(0).mask.new_ones(token_batch(0).mask.shape)
    with new_recorder(run) as writer:
        writer.record(0, token_batch(0, mask=mask))
        wait_for(writer)
        full_disk |= {"rollup/hot"}
        writer.record(1, token_batch(1, mask=mask))
        wait_for(writer)
        monkeypatch.setattr(pipeline, "WAITING_BYTES", int(2.5 * writer._pipeline._unwritten))
        monkeypatch.setattr(pipeline, "WAITING_SUMMARIES", 5)
        for step in range(2, 9):
            writer.record(step, token_batch(step, mask=mask))
            wait_for(writer)
            assert writer._pipeline._unwritten <= pipeline.WAITING_BYTES and len(writer._pipeline._waiting) <= 5
        full_disk.clear()
    with open_run(run) as opened:
        # of the eight that waited the oldest three had to go; where there was room again, a later one kept its tokens
        dropped = dict(rows(opened, "SELECT step, dropped_tokens FROM steps"))
        assert list(dropped) == [0, 4, 5, 6, 7, 8]
        kept = column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1")
        assert kept == [step for step, n in dropped.items() if not n] and 1 < len(kept) <= 3
        assert column(opened, "SELECT DISTINCT step FROM sequences ORDER BY 1") == kept
        events = rows(opened, "SELECT kind, detail FROM events")
    assert [kind for kind, _ in events] == ["started", "dropped", "finished"] and events[1][1].startswith("3 steps")


def test_the_disk_is_tried_again_without_a_new_step(tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr(pipeline, "_RETRY_SECONDS", 0.01)
    with new_recorder(tmp_path / "run") as writer:
        full_disk |= {"rollup/hot"}
        writer.record(0, token_batch(0))
        wait_for(writer)
        assert column(tmp_path / "run", "SELECT step FROM steps") == []
        full_disk.clear()
        give_up = time.monotonic() + 30
        while not writer.flush(1):
            assert time.monotonic() < give_up
        assert column(tmp_path / "run", "SELECT step FROM steps") == [0]


@pytest.mark.parametrize("broken", ["tokens/sealed", "sequences/sealed", "rollup/sealed", "sealed"])
def test_sealing_that_fails_loses_nothing(tmp_path, full_disk, monkeypatch, seal_after, broken):
    seal_after(3)
    run = tmp_path / "run"
    full_disk |= {broken}
    merged = []
    add = store.ZoomWriter.add

    def noted_add(self, table):
        merged.append(table["step"].to_pylist())
        add(self, table)

    monkeypatch.setattr(store.ZoomWriter, "add", noted_add)
    with new_recorder(run) as writer:
        for step in (*range(8), 6, 7):
            writer.record(step, token_batch(step))
    assert merged == [[0, 1, 2], [3, 4, 5], [6, 7], [6, 7]], "the coarser levels hold every step or none after it"
    full_disk.clear()
    for _ in range(2):
        with open_run(run) as opened:
            assert column(opened, "SELECT step FROM steps") == list(range(8))
            assert column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1") == list(range(8))
            assert column(opened, "SELECT count(*) FROM steps_all") == [10]
        new_recorder(run).close()


@pytest.mark.parametrize("broken", ["tokens/pinned", "sequences/pinned", "/pinned"])
def test_pinning_that_fails_doubles_no_step(tmp_path, full_disk, broken):
    """It fails after a step is committed; the step must not be committed a second time."""
    run = tmp_path / "run"
    with new_recorder(run, tokens="flight:4") as writer:
        for step in range(9):
            if step == 3:
                full_disk |= {broken}
                writer.pin("a user asked", after=3)
            texts = Sequences(completion=[f"{step} {i}" for i in range(64)])
            writer.record(step, token_batch(step, 64), sequences=texts)
            wait_for(writer)
    tokens = [int(token_batch(step, 64).mask.sum()) for step in range(9)]
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_tokens, dropped_tokens FROM steps_all") == [
            (step, n, 0) for step, n in enumerate(tokens)
        ]
        found = rows(opened, "SELECT step, count(*), count(DISTINCT (sequence_id, position)) FROM tokens GROUP BY step")
        assert all(n == distinct for _, n, distinct in found)
        assert {step: n for step, n, _ in found if step >= 5} == {step: tokens[step] for step in range(5, 9)}
        assert column(opened, "SELECT count(*) FROM sequences GROUP BY step") == [64] * 9


@pytest.mark.parametrize("fails_at", ["tokens", "sequences", "rollup"])
def test_a_step_that_no_disk_would_take_holds_up_no_other(tmp_path, monkeypatch, caplog, fails_at):
    """An error of the step itself costs its tokens, or if its summary has it the step; nothing waits behind it."""
    run, encode = tmp_path / "run", store.encode

    def encode_unless_odd(table, name="", **options):
        if name == fails_at and "step" in table.schema.names and table["step"].to_pylist() == [2] * len(table):
            raise pa.ArrowInvalid("odd")
        return encode(table, name, **options)

    monkeypatch.setattr(store, "encode", encode_unless_odd)
    with new_recorder(run) as writer:
        for step in range(5):
            writer.record(step, token_batch(step))
    kept = [0, 1, 3, 4]
    with open_run(run) as opened:
        assert column(opened, "SELECT step FROM steps") == (kept if fails_at == "rollup" else list(range(5)))
        for table in ("tokens", "sequences"):
            assert column(opened, f"SELECT DISTINCT step FROM {table} ORDER BY 1") == kept
        dropped = dict(rows(opened, "SELECT step, dropped_tokens FROM steps"))
        assert dropped.pop(2, TOKENS[2]) == TOKENS[2] and set(dropped.values()) == {0}
        details = column(opened, "SELECT detail FROM events WHERE kind = 'dropped'")
    assert details == (["1 steps: writing failed: odd"] if fails_at == "rollup" else [])


def test_a_step_whose_rows_cannot_be_made_keeps_its_summary(tmp_path, caplog, whole):
    run = tmp_path / "run"
    with new_recorder(run) as writer:
        for step in range(3):
            group = 2**70 if step == 1 else 0  # more than 64 bits
            writer.record(step, token_batch(step), sequences=Sequences(group_id=[group] * B), loss=0.5)
    numbers = "SELECT step, n_tokens, log_ratio_p99, hazard_mean FROM steps WHERE step < 3"
    assert rows(run, numbers) == rows(whole, numbers)
    assert rows(run, "SELECT dropped_tokens, loss FROM steps") == [(0, 0.5), (TOKENS[1], 0.5), (0, 0.5)]
    assert column(run, "SELECT DISTINCT step FROM tokens ORDER BY 1") == [0, 2]
    assert "training goes on" in caplog.text


def _record_below_a_size_limit(path, limit, reports):
    """On a real system call that fails: files of this process may not grow beyond a limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with new_recorder(path) as writer:
        writer.record(0, token_batch(0))
        wait_for(writer)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        writer.record(1, token_batch(1, n_sequences=4000))  # its token file is larger
        writer.record(2, token_batch(2))
    reports.send("training went on")


@pytest.mark.parametrize("limit", [60_000, 20_000])
def test_a_write_that_the_kernel_refuses_costs_that_step_alone(tmp_path, limit):
    """Its tokens, or where its summary is larger than the limit too, the step."""
    reports, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_record_below_a_size_limit, args=(tmp_path / "run", limit, theirs), daemon=True)
    process.start()
    assert reports.poll(60) and reports.recv() == "training went on"
    process.join()
    refused = int(token_batch(1, n_sequences=4000).mask.sum())
    with open_run(tmp_path / "run") as opened:
        numbers = rows(opened, "SELECT step, n_tokens, dropped_tokens FROM steps")
        assert numbers == [(0, TOKENS[0], 0), *([(1, refused, refused)] if limit > 50_000 else []), (2, TOKENS[2], 0)]
        assert column(opened, "SELECT DISTINCT step FROM tokens ORDER BY 1") == [0, 2]
        assert column(opened, "SELECT DISTINCT step FROM sequences ORDER BY 1") == [0, 2]
        dropped = column(opened, "SELECT detail FROM events WHERE kind = 'dropped'")
    assert len(dropped) == (0 if limit > 50_000 else 1)
    assert all(detail.startswith("1 steps: writing failed: ") and "File too large" in detail for detail in dropped)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_folder_that_vanishes_stops_nothing(tmp_path):
    run = tmp_path / "run"
    with new_recorder(run) as writer:
        writer.record(0, token_batch(0))
        wait_for(writer)
        tail = RunTail(run, ["loss"])
        tail.poll()
        (run / "rollup").rename(tmp_path / "gone")
        for step in range(1, 40):
            writer.record(step, token_batch(step))
        tail.poll()
        wait_for(writer)
        (tmp_path / "gone").rename(run / "rollup")
        writer.record(40, token_batch(40))
    for table in ("steps", "tokens", "sequences"):
        assert column(run, f"SELECT DISTINCT step FROM {table} ORDER BY 1") == list(range(41))
    assert column(run, "SELECT sum(dropped_tokens) FROM steps") == [0]
    tail.poll()
    assert tail.last.step == 40 and tail.n_steps == 41
    tail.close()
