"""One writer and eight readers side by side for a while: no read is torn, and nobody's memory grows."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from collectors import Recorder, Run, open_run, store
from collectors.integrity import verify
from collectors.policy import RING, TokenPolicy
from collectors.storage import LocalStorage
from tests.collectors.processes import PROCESSES, start
from tests.collectors.support import token_batch

POLICY, WIDE, SEEDS, READERS = "flight:20", 60, 10, 8
MEGABYTE = 1 << 20
GROWTH = 40 * MEGABYTE
"""What a process may grow by after its first third: allocators keep what they once had."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def write(path: Path, told, reports) -> None:
    """Until it is told to stop; the end of a run takes away what readers had time for."""
    store.SEAL_AFTER_STEPS, store.GRACE_SECONDS = 12, 20.0
    batches = [token_batch(seed, WIDE) for seed in range(SEEDS)]
    with Recorder(path, objective="mhpo", fsync=False, tokens=POLICY, disk_limit="64MB", when_full="wait") as recorder:
        memory = []
        for step in itertools.count():
            recorder.record(step, batches[step % SEEDS], loss=0.5)
            time.sleep(0.02)
            if step % 20 == 0:
                memory.append(resident())
            if told.is_set():
                break
    reports.send((step + 1, memory))


def expected_counts() -> list[tuple[int, int]]:
    """(tokens of a step in the ring, tokens of an older one) of each seed; the ids of a batch are counted up."""
    found = []
    for seed in range(SEEDS):
        batch = token_batch(seed, WIDE)
        found.append((int(batch.mask.sum()), batch))
    return found


def kept_of(step: int, batch) -> int:
    row, _ = np.nonzero(batch.mask.numpy())
    log_ratio = (batch.logp_new - batch.logp_old)[batch.mask].numpy()
    ids = np.arange(step * WIDE, (step + 1) * WIDE)
    return int((TokenPolicy.parse(POLICY).choose(row, log_ratio, ids).reason != RING).sum())


def check(run: Run, expected, newest: int) -> int:
    """One read of everything; returns the number of steps."""
    steps, last, n_tokens, counted, n_sequences = run.sql(
        "SELECT count(*), max(step), sum(n_tokens), (SELECT sum(count) FROM histograms WHERE quantity = 'log_ratio'), "
        "(SELECT count(*) FROM sequences) FROM steps"
    ).fetchall()[0]
    assert steps == last + 1 >= newest, f"steps are lost: {steps}, {last}, {newest}"
    assert n_tokens == counted == sum(expected[s % SEEDS][0] for s in range(steps))
    assert n_sequences == steps * WIDE
    return steps


def check_tokens(run: Run, expected) -> None:
    found = dict(run.sql("SELECT step, count(*) FROM tokens GROUP BY step").fetchall())
    steps = sorted(found)
    assert steps == list(range(len(steps))), "a step without tokens"
    whole = [s for s in steps if found[s] == expected[s % SEEDS][0]]
    assert whole[-1] == steps[-1] and len(whole) >= min(len(steps), 19), "the ring is not whole"
    for step in steps[: -len(whole)][-30:]:
        assert found[step] == kept_of(step, expected[step % SEEDS][1]), f"step {step} is torn"


def read(path: Path, seconds: float, reports) -> None:
    end, newest, reads, memory = time.monotonic() + seconds, 0, 0, []
    expected = expected_counts()
    kept = open_run(path)
    while time.monotonic() < end:
        newest = check(kept, expected, newest)
        check_tokens(kept, expected)
        with open_run(path) as fresh:
            newest = check(fresh, expected, newest)
            check_tokens(fresh, expected)
        reads += 2
        memory.append(resident())
    reports.send((reads, memory))


def soak(path: Path, seconds: float) -> None:
    receive, send = zip(*(PROCESSES.Pipe(duplex=False) for _ in range(READERS + 1)), strict=True)
    told = PROCESSES.Event()
    writer = start(write, path, told, send[0])
    give_up = time.monotonic() + 60
    while not list(path.glob("rollup/hot/*.parquet")):
        assert time.monotonic() < give_up and writer.is_alive()
        time.sleep(0.05)
    readers = [start(read, path, seconds, end) for end in send[1:]]
    for process in readers:
        process.join(seconds + 120)
    told.set()
    writer.join(60)
    codes = [process.exitcode for process in (writer, *readers)]
    assert codes == [0] * len(codes), "the error of a process that failed is above"
    (steps, memory), *seen = [end.recv() for end in receive]
    assert steps > 40 and all(reads >= 2 for reads, _ in seen)
    assert sum(reads for reads, _ in seen) > 4 * READERS
    for name, used in (("writer", memory), *(("reader", used) for _, used in seen)):
        assert used[-1] - max(used[: max(1, len(used) // 3)]) < GROWTH, f"{name} grows: {[m >> 20 for m in used]}"
    assert verify(LocalStorage(path)).findings == []


def test_a_short_soak(tmp_path):
    soak(tmp_path / "run", 12)


@pytest.mark.slow
def test_a_long_soak(tmp_path):
    soak(tmp_path / "run", 180)
