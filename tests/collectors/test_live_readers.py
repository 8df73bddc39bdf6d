"""Readers of a run that is being written, sealed and cleaned up under them."""

from __future__ import annotations

import time

from collectors import open_run
from collectors.tail import RunTail
from tests.collectors.support import B, rows, token_batch
from tests.collectors.writer import SEEDS, writing

COUNTS = """SELECT (SELECT count(*) FROM steps), (SELECT max(step) + 1 FROM steps), (SELECT sum(n_tokens) FROM steps),
    (SELECT count(*) FROM tokens), (SELECT count(DISTINCT step) FROM tokens), (SELECT count(*) FROM sequences),
    (SELECT sum(count) FROM histograms WHERE quantity = 'log_ratio')"""
SECONDS = 6.0


def test_every_read_of_a_live_run_is_consistent(tmp_path):
    tokens = [int(token_batch(seed).mask.sum()) for seed in range(SEEDS)]
    with writing(tmp_path / "run", seal_after=7, grace=3.0) as writer:
        writer.wait_for_steps(12)
        kept, tail = open_run(tmp_path / "run"), RunTail(tmp_path / "run", ["loss"])
        newest, tail_newest, reads, stop = 0, 0, 0, time.monotonic() + SECONDS
        while time.monotonic() < stop:
            for run in (kept, open_run(tmp_path / "run")):
                steps, end, n_tokens, n_rows, with_tokens, n_sequences, counted = rows(run, COUNTS)[0]
                assert steps == end == with_tokens >= newest
                assert n_tokens == n_rows == counted == sum(tokens[s % SEEDS] for s in range(steps))
                assert n_sequences == steps * B
                newest, reads = steps, reads + 1
                if run is not kept:
                    run.close()
            tail.poll()
            assert tail.n_steps == tail.last.step + 1 >= tail_newest
            assert tail.n_tokens == sum(tokens[s % SEEDS] for s in range(tail.n_steps))
            assert tail.state.name == "running"
            tail_newest = tail.n_steps
        writer.kill()
    assert reads > 4 and newest > 14, "it saw files being sealed"
    tail.poll()
    assert tail.state.name == "killed" and tail.n_steps == rows(kept, COUNTS)[0][0]
    tail.close()
    kept.close()


def test_every_read_of_a_live_flight_recorder_sees_the_ring_or_what_is_kept(tmp_path):
    """Steps leave the ring while it is read; those that are read are whole."""
    n = 64
    tokens = [int(token_batch(seed, n).mask.sum()) for seed in range(SEEDS)]
    query = "SELECT step, count(*), count(DISTINCT (sequence_id, position)), bool_or(kept_because = 'ring') FROM tokens"
    with writing(tmp_path / "run", seal_after=7, grace=15.0, n_sequences=n, tokens="flight:12") as writer:
        writer.wait_for_steps(24)
        reads, newest, stop = 0, 0, time.monotonic() + 3
        with open_run(tmp_path / "run") as kept:
            while time.monotonic() < stop:
                with open_run(tmp_path / "run") as fresh:
                    for run in (kept, fresh):
                        found = {step: rest for step, *rest in rows(run, f"{query} GROUP BY step")}
                        assert sorted(found) == list(range(len(found))) and len(found) >= newest
                        assert all(count == distinct for count, distinct, _ in found.values())
                        whole = [step for step, (_, _, in_ring) in found.items() if in_ring]
                        assert len(whole) >= 12 and all(found[s][0] == tokens[s % SEEDS] for s in whole)
                        newest, reads = len(found), reads + 1
    assert reads > 4 and newest > 36


def test_an_open_run_follows_new_steps_and_a_relation_stays_lazy(tmp_path):
    with writing(tmp_path / "run") as writer:
        writer.wait_for_steps(12)
        with open_run(tmp_path / "run") as run:
            before = rows(run, "SELECT count(*) FROM steps")[0][0]
            writer.wait_for_steps(12)
            after = rows(run, "SELECT count(*) FROM steps")[0][0]
            assert after > before
            writer.kill()
            run.refresh()
            assert run.refresh() is False
