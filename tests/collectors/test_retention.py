"""A run never takes more of the disk than its limit; what tells least goes first, and what was pinned stays."""

from __future__ import annotations

import base64
import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors import Recorder, StoreError, open_run, policy, store
from collectors.integrity import verify
from collectors.policy import sequence_hash
from collectors.retention import _first_half, pin_ring, thinned
from collectors.schema import TOKEN_SCHEMA
from collectors.storage import LocalStorage
from mhpo_core import Sequences, TokenBatch
from tests.collectors.processes import call
from tests.collectors.support import column, rows

B, T = 24, 128
STEPS = 120
SEEDS = 10
"""Steps that far apart have the same batch, so that making it costs nothing."""


def _batch(seed: int, n: int = B, t: int = T) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, t, generator=generator) - 0.1
    new = (old + 0.3 * torch.randn(n, t, generator=generator)).clamp(max=-1e-3)
    mask = torch.ones(n, t, dtype=torch.bool)
    return TokenBatch(logp_new=new, logp_old=old, advantage=torch.randn(n, generator=generator), mask=mask)


def _texts(seed: int, length: int = 1800) -> Sequences:
    """Texts that no compression makes smaller than three quarters."""
    chance = random.Random(seed)
    both = [base64.b64encode(chance.randbytes(length)).decode() for _ in range(B)]
    return Sequences(reward=[0.0] * B, prompt=[t[:200] for t in both], completion=both)


BATCHES, TEXTS = [_batch(seed) for seed in range(SEEDS)], [_texts(seed) for seed in range(SEEDS)]
NONE = Sequences(reward=[0.0] * B)


def on_disk(run: Path) -> int:
    """What `du` says of the files; a second name of a file takes no second place."""
    total, folders, seen = 0, [str(run)], set()
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                elif (found := entry.stat()).st_nlink == 1 or found.st_ino not in seen:
                    seen.add(found.st_ino)
                    total += 512 * found.st_blocks
    return total


@pytest.fixture
def peak(monkeypatch):
    """The most that a run took after any of its files was written; nothing else makes it larger."""
    most = {"bytes": 0}
    write, create = LocalStorage.write, LocalStorage.create

    def watched(self, name, data, *, fsync):
        write(self, name, data, fsync=fsync)
        most["bytes"] = max(most["bytes"], on_disk(self.folder))

    def watched_create(self, name, data):
        made = create(self, name, data)
        most["bytes"] = max(most["bytes"], on_disk(self.folder))
        return made

    monkeypatch.setattr(LocalStorage, "write", watched)
    monkeypatch.setattr(LocalStorage, "create", watched_create)
    return most


@pytest.fixture
def small(monkeypatch):
    """Limits of a few megabytes, so that a short run reaches them."""
    monkeypatch.setattr(policy, "SMALLEST_LIMIT", 1_000_000)
    monkeypatch.setattr(store, "SEAL_AFTER_STEPS", 12)


def record(path, steps, tokens, limit, *, texts=True, batches=BATCHES, then=None, **options):
    with Recorder(
        path, objective="mhpo", fsync=False, tokens=tokens, disk_limit=limit, when_full="wait", **options
    ) as recorder:
        for step in steps:
            recorder.record(
                step, batches[step % len(batches)], sequences=TEXTS[step % SEEDS] if texts else NONE, loss=0.5
            )
            if then:
                then(recorder, step)


def check_sound(run: Path) -> None:
    """Nothing is damaged or missing, and no table has a step that `steps` has not, pinned ones apart."""
    assert verify(LocalStorage(run)).findings == []
    with open_run(run) as opened:
        for table in ("tokens WHERE kept_because != 'pinned'", "sequences"):
            assert column(opened, f"SELECT DISTINCT step FROM {table} EXCEPT SELECT step FROM steps") == []


@pytest.mark.parametrize("tokens", ["flight", *(pytest.param(t, marks=pytest.mark.slow) for t in ("all", "sample:8"))])
def test_the_disk_never_holds_more_than_the_limit(tmp_path, monkeypatch, peak, tokens):
    monkeypatch.setattr(store, "SEAL_AFTER_STEPS", 16)
    run, steps = tmp_path / "run", 260 if tokens == "sample:8" else 200
    record(run, range(steps), tokens, "16MB", vocabulary={i: f"token {i}" for i in range(40_000)})
    assert peak["bytes"] <= 16_000_000, "more than the limit at some moment"
    assert peak["bytes"] > 13_000_000, "it reached the limit, otherwise this shows nothing"
    check_sound(run)
    with open_run(run) as opened:
        assert column(opened, "SELECT count(*) FROM steps") == [steps], "summaries go last"
        said = column(opened, "SELECT detail FROM events WHERE kind = 'disk_limit'")
        assert len(said) == len(set(said)) >= (tokens == "all")
        newest = Counter(column(opened, f"SELECT kept_because FROM tokens WHERE step = {steps - 1}"))
        assert sum(newest.values()) == (8 * T if tokens == "sample:8" else B * T), "the newest step is whole"


def test_when_all_is_used_what_tells_least_goes_first(tmp_path, small, peak):
    """Older samples are halved while newer ones are whole, texts go before rows, rows of the oldest steps last."""
    run = tmp_path / "run"
    record(run, range(STEPS), "all", 4_000_000)
    assert peak["bytes"] <= 4_000_000
    check_sound(run)
    with open_run(run) as opened:
        kept = rows(opened, "SELECT step, count(DISTINCT sequence_id) FROM tokens GROUP BY step ORDER BY step")
        sizes = [n for _, n in kept]
        assert sizes[-1] == B and min(sizes) < B / 2 and set(sizes) <= {B >> i for i in range(6)}
        assert all(a <= 2 * b for a, b in zip(sizes, sizes[1:], strict=False)), "halved evenly, the oldest first"
        assert column(opened, "SELECT step FROM steps ORDER BY step") == list(range(STEPS))
        with_text = column(opened, "SELECT DISTINCT step FROM sequences WHERE completion IS NOT NULL ORDER BY step")
        assert with_text and with_text == list(range(with_text[0], STEPS)) and with_text[0] > 0
        assert len(column(opened, "SELECT detail FROM events WHERE kind = 'disk_limit'")) == 2


def test_rows_go_last_and_the_oldest_first(tmp_path, small, peak):
    run = tmp_path / "run"
    record(run, range(260), "sample:1", 1_500_000, texts=False, batches=[_batch(i, B, 4) for i in range(SEEDS)])
    assert peak["bytes"] <= 1_500_000
    check_sound(run)
    steps = column(run, "SELECT step FROM steps ORDER BY step")
    assert steps == list(range(steps[0], 260)) and 0 < steps[0] < 250


def test_a_run_that_is_resumed_again_and_again_keeps_to_its_limit(tmp_path, small, peak):
    run = tmp_path / "run"
    for life in range(16):
        first = life * 10
        record(run, range(first, first + 10), "sample:8", 4_000_000, texts=life % 2 == 0)
    assert peak["bytes"] <= 4_000_000
    check_sound(run)


def _record_and_die(path, first, count, tokens, limit, seal_after):
    store.SEAL_AFTER_STEPS = seal_after
    policy.SMALLEST_LIMIT = 1_000_000
    recorder = Recorder(path, objective="mhpo", fsync=False, tokens=tokens, disk_limit=limit, when_full="wait")
    for step in range(first, first + count):
        recorder.record(step, BATCHES[step % SEEDS], sequences=TEXTS[step % SEEDS])
    recorder.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_single_steps_of_writers_that_died_before_sealing_do_not_pile_up(tmp_path, small):
    run, lives, each = tmp_path / "run", 9, 15
    for life in range(lives):
        call(_record_and_die, run, life * each, each, "sample:8", 3_000_000, 256, killed=True)
        assert on_disk(run) <= 3_000_000
    check_sound(run)
    with open_run(run) as opened:
        assert column(opened, "SELECT sum(dropped_tokens) FROM steps") == [0]
        assert column(opened, "SELECT max(step) FROM tokens") == [lives * each - 1]
    assert len(list((run / "rollup" / "hot").iterdir())) <= 2 * each


def test_a_damaged_single_step_of_a_dead_writer_stays_visible(tmp_path, small):
    run = tmp_path / "run"
    call(_record_and_die, run, 0, 9, "sample:8", None, 256, killed=True)
    broken = sorted((run / "tokens" / "hot").iterdir())[4]
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    record(run, range(9, 12), "sample:8", None)
    findings = verify(LocalStorage(run)).findings
    assert [(f.kind, f.name, f.steps) for f in findings] == [("damaged", f"tokens/hot/{broken.name}", (4, 4))]


def test_steps_larger_than_a_segment_are_thinned_too(tmp_path, peak):
    """The flight recorder of a large model: what goes is the oldest, never the newest."""
    run, batches = tmp_path / "run", [_batch(0, B, 1500)]
    record(run, range(40), "all", "16MB", texts=False, batches=batches)
    assert peak["bytes"] <= 16_000_000
    check_sound(run)
    with open_run(run) as opened:
        assert column(opened, "SELECT sum(dropped_tokens) FROM steps") == [0]
        assert column(opened, "SELECT count(*) FROM tokens WHERE step = 39") == [B * 1500]
        assert column(opened, "SELECT count(*) FROM tokens WHERE step = 0")[0] < B * 1500


def test_a_single_step_that_is_larger_than_the_limit_is_dropped_and_counted(tmp_path, peak):
    run, huge = tmp_path / "run", _batch(1, 600, 1000)
    with Recorder(run, objective="mhpo", fsync=False, tokens="flight", disk_limit="16MB") as recorder:
        recorder.record(0, _batch(0, 600, 10))
        recorder.record(1, huge)
        recorder.record(2, _batch(2, 600, 10))
    assert peak["bytes"] <= 16_000_000
    with open_run(run) as opened:
        dropped = column(opened, "SELECT dropped_tokens FROM steps ORDER BY step")
        kept = column(opened, "SELECT count(*) FROM tokens WHERE step = 1")
        assert dropped[0] == dropped[2] == 0 and dropped[1] + kept[0] == 600_000 and dropped[1] > 500_000
        assert "larger than all that ring may use" in column(
            opened, "SELECT detail FROM events WHERE kind = 'disk_limit'"
        )[0]  # fmt: skip


def test_a_limit_smaller_than_needed_is_refused_with_one_line(tmp_path):
    with pytest.raises(StoreError, match="allowed are a number of bytes from 16,000,000 on") as raised:
        Recorder(tmp_path / "run", objective="mhpo", disk_limit=1_000_000)
    assert "\n" not in str(raised.value)
    with pytest.raises(
        StoreError, match="128,000,000 on for 8 ranks"
    ) as raised:  # the limit is divided among the ranks
        Recorder(tmp_path / "run", objective="mhpo", disk_limit="16MB", rank=0, world_size=8)
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


# Thinning


@st.composite
def kept_tokens(draw):
    """Rows of a sealed file: some steps with samples, tails and non-finite tokens."""
    table = []
    for step in draw(st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True)):
        for sequence in range(draw(st.integers(0, 9))):
            name = draw(st.sampled_from(["sample", "all"]))
            table += [(step, sequence, name, 0.1)] * draw(st.integers(1, 3))
        for name in ("low tail", "high tail", "non-finite"):
            usual = st.sampled_from([np.nan, np.inf]) if name == "non-finite" else st.floats(-9, 9, width=32)
            values = draw(st.lists(usual, max_size=9))
            table += [(step, 100 + i, name, v) for i, v in enumerate(values)]
    chance = random.Random(draw(st.integers(0, 99)))
    chance.shuffle(table)
    columns = {
        "step": [r[0] for r in table], "sequence_id": [r[1] for r in table], "kept_because": [r[2] for r in table],
        "log_ratio": pa.array([r[3] for r in table], pa.float32(), from_pandas=False),
    }  # fmt: skip
    filled = {f.name: columns.get(f.name, pa.nulls(len(table), f.type)) for f in TOKEN_SCHEMA}
    return pa.table(filled, schema=TOKEN_SCHEMA)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(kept_tokens())
def test_thinning_keeps_half_of_each_step_and_knows_no_chance(table):
    once = thinned(table)
    assert repr(once.to_pylist()) == repr(thinned(table).to_pylist())
    before, after = table.to_pylist(), once.to_pylist()
    for step in {r["step"] for r in before}:
        was, now = ([r for r in side if r["step"] == step] for side in (before, after))
        whole = {r["sequence_id"] for r in was if r["kept_because"] in ("sample", "all")}
        left = {r["sequence_id"] for r in now if r["kept_because"] == "sample"}
        order = sorted(whole, key=lambda i: int(sequence_hash(np.array([i]))[0]))
        assert left == set(order[: len(whole) // 2]), "the first half by hash"
        for i in left:  # with all its tokens
            assert sum(r["sequence_id"] == i for r in now) == sum(r["sequence_id"] == i for r in was)
        for name, sign in (("low tail", 1), ("high tail", -1)):
            values = sorted(sign * r["log_ratio"] for r in was if r["kept_because"] == name)
            found = sorted(sign * r["log_ratio"] for r in now if r["kept_because"] == name)
            assert found == values[: len(values) // 2], "the more extreme half"
        odd = [sum(r["kept_because"] == "non-finite" for r in side) for side in (was, now)]
        assert odd[1] == odd[0] // 2
    assert not any(r["kept_because"] == "all" for r in after)
    while len(once):
        once = thinned(once)  # ends


def test_a_sample_that_was_halved_is_uniform_still():
    hits, n = np.zeros(32), 32
    for step in range(2000):
        ids = np.arange(n) + step * n
        table = pa.table(
            {f.name: pa.nulls(n, f.type) for f in TOKEN_SCHEMA}
            | {"step": [step] * n, "sequence_id": ids, "kept_because": ["all"] * n, "log_ratio": [0.0] * n}
        )
        for _ in range(3):
            table = thinned(table)
        hits[table["sequence_id"].to_numpy() - step * n] += 1
    expected = 2000 * 4 / n
    assert hits.sum() == 2000 * 4 and ((hits - expected) ** 2 / expected).sum() < 61


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(allow_nan=False)), max_size=40))
def test_first_half(pairs):
    group, order = np.array([g for g, _ in pairs], int), np.array([o for _, o in pairs], float)
    found = _first_half(group, order)
    for g in set(group.tolist()):
        here = order[group == g]
        assert sorted(here[found[group == g]]) == sorted(here)[: len(here) // 2]


# Pins


def pinned(run: Path) -> list[int]:
    return column(run, "SELECT DISTINCT step FROM tokens WHERE kept_because = 'pinned' ORDER BY step")


def in_ring(run: Path) -> list[int]:
    return column(run, "SELECT DISTINCT step FROM tokens WHERE kept_because = 'ring' ORDER BY step")


def pins(run: Path) -> list[str]:
    return column(run, "SELECT detail FROM events WHERE kind = 'pinned'")


def whole(run: Path, step: int) -> None:
    """All tokens and texts of the step are there, each once."""
    found = rows(run, f"SELECT count(*), count(DISTINCT (sequence_id, position)) FROM tokens WHERE step = {step}")
    assert found == [(B * T, B * T)]
    texts = rows(run, f"SELECT completion FROM sequences WHERE step = {step} ORDER BY sequence_id")
    assert [t for (t,) in texts] == TEXTS[step % SEEDS].completion


def test_steps_around_non_finite_tokens_are_kept(tmp_path):
    run, odd = tmp_path / "run", _batch(3)
    odd.logp_new[2, 5] = torch.nan
    batches = [*BATCHES, odd]
    with Recorder(run, objective="mhpo", fsync=False, tokens="flight:6") as recorder:
        for step in range(40):
            batch = odd if step == 20 else BATCHES[step % SEEDS]
            recorder.record(step, batch, sequences=TEXTS[step % SEEDS])
    del batches
    assert pinned(run) == list(range(15, 29)) and in_ring(run) == list(range(34, 40))
    assert pins(run) == ["steps 15 to 20: 1 non-finite tokens at step 20"]
    whole(run, 15), whole(run, 28)
    assert column(run, "SELECT kept_because FROM tokens WHERE step = 20 AND isnan(logp_new)")[0] in (
        "non-finite", "sample",
    )  # fmt: skip


def test_a_loss_that_is_not_finite_pins_and_an_incident_that_goes_on_is_said_once(tmp_path):
    run = tmp_path / "run"
    with Recorder(run, objective="mhpo", fsync=False, tokens="flight:4") as recorder:
        for step in range(40):
            loss = float("inf") if 10 <= step < 15 else 0.5
            recorder.record(step, BATCHES[step % SEEDS], sequences=TEXTS[step % SEEDS], loss=loss)
    assert pinned(run) == list(range(7, 23)) and pins(run) == ["steps 7 to 10: loss inf at step 10"]


@pytest.mark.parametrize("after", [0, 3, 8, 20])
def test_a_pin_that_is_asked_for_keeps_as_many_later_steps(tmp_path, after):
    run = tmp_path / "run"
    with Recorder(run, objective="mhpo", fsync=False, tokens="flight:5") as recorder:
        for step in range(50):
            recorder.record(step, BATCHES[step % SEEDS], sequences=TEXTS[step % SEEDS])
            if step == 20:
                recorder.pin("look at this", after=after)
    assert pinned(run) == list(range(16, 21 + after)) and in_ring(run) == list(range(45, 50))
    assert pins(run) == ["steps 16 to 20: look at this"]
    for step in (16, 20 + after):
        whole(run, step)


def test_a_failed_close_keeps_the_ring_and_a_good_one_does_not(tmp_path):
    for name, error, expected in (("bad", ValueError("boom"), [6, 7, 8, 9]), ("good", None, [])):
        run = tmp_path / name
        try:
            with Recorder(run, objective="mhpo", fsync=False, tokens="flight:4") as recorder:
                for step in range(10):
                    recorder.record(step, BATCHES[step], sequences=TEXTS[step])
                if error:
                    raise error
        except ValueError:
            pass
        assert pinned(run) == expected
        assert pins(run) == (["steps 6 to 9: ValueError: boom"] if error else [])


def test_a_rewind_keeps_the_steps_that_are_given_up(tmp_path):
    run = tmp_path / "run"
    record(run, [*range(10), 5, 6, 7], "flight:4", None)
    assert rows(run, "SELECT kind, detail FROM events WHERE kind IN ('pinned', 'rewound')") == [
        ("pinned", "steps 6 to 9: rewound from step 9 to step 5"),
        ("rewound", "from step 9 to step 5, attempt 1"),
    ]
    # the given-up attempt at 6 and 7 is pinned as well, and not shown where a later one counts
    assert pinned(run) == [8, 9] and in_ring(run) == [5, 6, 7]
    for step in (5, 6, 7, 8, 9):
        whole(run, step)


def test_a_pin_from_another_process_while_the_run_lives(tmp_path, peak):
    run = tmp_path / "run"

    def pin(recorder, step):
        if step == 20:
            recorder.flush()
            call(_pin, run)

    record(run, range(40), "flight:6", None, then=pin)
    assert pinned(run) == list(range(15, 21)) and in_ring(run) == list(range(34, 40))
    for step in (15, 20, 39):
        whole(run, step)
    check_sound(run)


def _pin(run):
    pin_ring(LocalStorage(run))


def test_pins_from_outside_again_and_again_do_not_break_the_limit(tmp_path, small, peak):
    run = tmp_path / "run"

    def pin(recorder, step):
        if step % 15 == 14:
            recorder.flush()
            pin_ring(LocalStorage(run))

    record(run, range(150), "flight:40", 4_000_000, then=pin)
    assert peak["bytes"] <= 4_000_000
    check_sound(run)
    assert len(pinned(run)) > 10


def test_a_step_that_is_not_committed_is_not_pinned(tmp_path, monkeypatch):
    """Its rows of the ring are there before its summary is; pinned ones count as committed."""
    run = tmp_path / "run"
    write = LocalStorage.write

    def pin_before_the_summary(self, name, data, *, fsync):
        if name.startswith("rollup/hot/s000000005."):
            pin_ring(self)
            raise OSError("the disk is gone")
        write(self, name, data, fsync=fsync)

    with Recorder(run, objective="mhpo", fsync=False, tokens="flight:4") as recorder:
        for step in range(8):
            if step == 5:
                recorder.flush()
                monkeypatch.setattr(LocalStorage, "write", pin_before_the_summary)
            recorder.record(step, BATCHES[step], sequences=TEXTS[step])
            recorder.flush()
    steps = column(run, "SELECT step FROM steps ORDER BY step")
    assert steps == [0, 1, 2, 3, 4]
    assert column(run, "SELECT DISTINCT step FROM tokens ORDER BY step") == steps and pinned(run) == [1, 2, 3, 4]


def test_what_a_killed_process_left_in_the_ring_is_kept(tmp_path):
    run = tmp_path / "run"
    call(_record_and_die, run, 0, 10, "flight:4", None, 4, killed=True)
    assert pinned(run) == [] and in_ring(run) == [6, 7, 8, 9]
    record(run, range(10, 20), "flight:4", None)
    assert pinned(run) == [6, 7, 8, 9] and in_ring(run) == [16, 17, 18, 19]
    assert pins(run) == ["steps 6 to 9: the process died after step 9"]
    record(run, range(20, 25), "flight:4", None)
    assert pins(run) == ["steps 6 to 9: the process died after step 9"], "the one in between ended well"


def test_what_is_pinned_outlives_everything_else(tmp_path, small, peak):
    run = tmp_path / "run"

    def pin(recorder, step):
        if step == 30:
            recorder.pin("keep this", after=0)

    record(run, range(STEPS), "flight:4", 4_000_000, then=pin)
    assert peak["bytes"] <= 4_000_000
    assert pinned(run) == [27, 28, 29, 30]
    for step in (27, 30):
        assert column(run, f"SELECT count(*) FROM tokens WHERE step = {step} AND kept_because = 'pinned'")[0] > 100
    assert set(pinned(run)) <= set(column(run, "SELECT step FROM steps")), "worth little without their steps"
    check_sound(run)


def test_more_to_pin_than_there_is_room_for_is_said(tmp_path, small, peak):
    run, odd = tmp_path / "run", _batch(3)
    odd.logp_new[0, 0] = torch.inf
    record(run, range(120), "flight:30", 4_000_000, batches=[odd])
    assert peak["bytes"] <= 4_000_000
    check_sound(run)
    details = column(run, "SELECT detail FROM events WHERE kind = 'disk_limit'")
    assert any("not all steps of" in d and "fit into" in d for d in details)
    assert 0 < len(pinned(run)) < 60
    assert in_ring(run)[-1] == 119, "the ring goes on"
