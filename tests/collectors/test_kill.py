"""A writer killed at any moment leaves whole steps, nothing a reader saw is lost, and the next writer goes on."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from collectors import StoreError, open_run
from collectors.integrity import verify
from collectors.layout import is_run
from collectors.state import run_state
from collectors.storage import LocalStorage
from tests.collectors.support import B, column, new_recorder, rows, token_batch
from tests.collectors.writer import SEEDS, writing

RUNS, KILLS = 5, 5
MANY_RUNS = 40  # 200 kills; the first runs are part of every test run, the others of `make test-slow`


def state_of(run: Path) -> str:
    return run_state(LocalStorage(run)).name


def temporary_files(run: Path, besides: int) -> list[Path]:
    """Those of other processes than that one."""
    return [p for p in run.rglob("*.tmp") if not p.name.endswith(f".{besides}.tmp")]


def check_whole(run: Path) -> list[tuple[int, int]]:
    """Every visible step is complete; returns (step, attempt) of all of them."""
    with open_run(run) as opened:
        seen = rows(opened, "SELECT step, attempt FROM steps_all")
        latest = dict(rows(opened, "SELECT step, attempt FROM steps"))
        assert latest == {step: max(a for s, a in seen if s == step) for step, _ in seen}
        by_step = rows(opened, "SELECT step, count(*), sum(logp_new::DOUBLE) FROM tokens GROUP BY step ORDER BY step")
        sequences = rows(opened, "SELECT step, count(*) FROM sequences GROUP BY step ORDER BY step")
        gradients = rows(opened, "SELECT step, grad_norm FROM gradients ORDER BY step")
    for attempt in {a for _, a in seen}:
        steps = [s for s, a in seen if a == attempt]
        assert steps == list(range(steps[0], steps[-1] + 1)), f"attempt {attempt} has a gap"
    assert sequences == [(step, B) for step in sorted(latest)]
    assert gradients == [(step, step + 0.5) for step in sorted(latest)]
    assert by_step == [(step, *EXPECTED[step % SEEDS]) for step in sorted(latest)]
    checked = verify(LocalStorage(run))
    assert checked.findings == [] and checked.steps == len(seen)
    return seen


def expected_tokens(seed: int) -> tuple[int, object]:
    batch = token_batch(seed)
    return int(batch.mask.sum()), pytest.approx(float(batch.logp_new[batch.mask].double().sum()), rel=1e-12)


EXPECTED = [expected_tokens(seed) for seed in range(SEEDS)]


@pytest.mark.parametrize(
    "seed", [*range(RUNS), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(RUNS, MANY_RUNS))]
)
def test_kills_at_random_moments(tmp_path, seed):
    chance = random.Random(seed)
    run, seen, resumed = tmp_path / "run", [], 0
    for kill in range(KILLS):
        newest = max(seen, key=lambda key: key[::-1], default=(-1, 0))[0]
        first = max(0, newest + 1 - chance.choice([0, 0, 3, 10]))
        with writing(run, first=first, seal_after=chance.choice([2, 5, 256])) as writer:
            if kill != seed:  # that one dies while it starts
                writer.wait_for_steps(chance.choice([1, 10, 20]))
                assert not temporary_files(run, besides=writer.process.pid), "left by a killed writer"
            time.sleep(chance.uniform(0, 0.4))
            before = column(run, "SELECT (step, attempt) FROM steps_all") if is_run(run) and seen else []
            writer.kill()
        if not is_run(run):
            continue
        assert state_of(run) == "killed"
        now = check_whole(run)
        assert set(before) | set(seen) <= set(now), "a committed step is lost"
        seen = now
        kinds = column(run, "SELECT kind FROM events")
        assert kinds.count("resumed") >= resumed
        resumed = kinds.count("resumed")
    assert len(seen) > KILLS and resumed > 0


def test_a_resumed_run_goes_on_and_a_rewound_one_keeps_both_attempts(tmp_path):
    run = tmp_path / "run"
    with writing(run) as writer:
        writer.wait_for_steps(30)
        writer.kill()
    (run / "tokens" / "hot" / "s000000999.a000.r000.0f3c9a71.15219.parquet.123.tmp").touch()
    last = max(column(run, "SELECT step FROM steps"))
    assert state_of(run) == "killed"
    with new_recorder(run) as recorder:
        assert not temporary_files(run, besides=os.getpid())
        recorder.record(last + 1, token_batch(1))
        recorder.record(5, token_batch(2))
        recorder.record(6, token_batch(3))
    with open_run(run) as opened:
        assert column(opened, "SELECT kind FROM events") == ["started", "resumed", "rewound", "finished"]
        attempts = rows(opened, "SELECT step, attempt FROM steps_all")
        assert attempts == sorted([(s, 0) for s in range(last + 2)] + [(5, 1), (6, 1)])
        assert rows(opened, "SELECT step, attempt FROM steps WHERE step BETWEEN 4 AND 7") == [
            (4, 0),
            (5, 1),
            (6, 1),
            (7, 0),
        ]
        found = column(opened, "SELECT logp_new FROM tokens WHERE step = 5 ORDER BY sequence_id, position")
        assert found == token_batch(2).logp_new[token_batch(2).mask].tolist()
        assert column(opened, "SELECT count(*) FROM sequences WHERE step = 5") == [B]
    assert state_of(run) == "finished"


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    run = tmp_path / "run"
    with writing(run) as writer:
        writer.wait_for_steps(2)
        with pytest.raises(StoreError, match="is being written by another recorder") as raised:
            new_recorder(run)
        assert "\n" not in str(raised.value)
        writer.wait_for_steps(2)  # the first is none the worse for it
        assert state_of(run) == "running"
        writer.kill()
    with new_recorder(run):
        assert state_of(run) == "running"
    assert state_of(run) == "finished"
