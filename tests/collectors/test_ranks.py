"""Ranks that write side by side agree on attempts, lose nothing and are read as one run."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from collectors import Recorder, Run, StoreError, open_run, store
from collectors.attempts import Attempts
from collectors.integrity import verify
from collectors.layout import StepFile
from collectors.ranks import merge_ranks
from collectors.state import run_state
from collectors.storage import LocalStorage
from collectors.writers import WriterLock, launch_of
from mhpo_core import Sequences, TokenBatch, objectives
from mhpo_core.batch import concatenate
from mhpo_core.histograms import EDGES
from mhpo_core.metrics import LAST, METRICS, QUANTILE, QUANTILE_LEVELS, SUM
from mhpo_core.telemetry import measure
from tests.collectors.processes import PROCESSES, call, start
from tests.collectors.support import column, rows, token_batch

# Attempts: every order in which ranks can come


class Marks:
    """The storage that attempts are marked in, without a disk."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def list(self, folder: str) -> dict[str, int]:
        return {n.rsplit("/", 1)[-1]: size for n, size in self.names.items() if n.startswith(folder)}

    def create(self, name: str, data: bytes) -> bool:
        json.loads(data)
        new = name not in self.names
        self.names.setdefault(name, len(data))
        return new


class Job:
    """A run as its ranks see it: marks, and which step of which attempt each rank has committed."""

    def __init__(self) -> None:
        self.marks = Marks()
        self.committed: dict[tuple[int, int, int], int] = {}  # (rank, attempt, step) → when
        self.ranks: dict[int, Attempts] = {}
        self.attempt: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.clock = itertools.count()

    def open(self, rank: int, launch: str) -> None:
        files = [StepFile(s, s, a, r, "", "", 0) for r, a, s in self.committed]
        self.ranks[rank] = Attempts(self.marks, rank, launch, files)
        self.attempt.pop(rank, None)
        self.last[rank] = self.ranks[rank].last[1]

    def record(self, rank: int, step: int, *, commit: bool = True) -> int:
        """As Recorder does it."""
        if rank not in self.attempt or step <= self.last[rank]:
            self.attempt[rank] = self.ranks[rank].begin(step)
        self.last[rank] = step
        self.ranks[rank].saw(self.attempt[rank], step)
        key = (rank, self.attempt[rank], step)
        assert key not in self.committed, f"rank {rank} writes step {step} of attempt {key[1]} a second time"
        if commit:
            self.committed[key] = next(self.clock)
        return self.attempt[rank]

    def shown(self) -> dict[int, set[int]]:
        """Step → ranks whose rows a reader merges."""
        newest = {s: max(a for _, a, t in self.committed if t == s) for _, _, s in self.committed}
        return {s: {r for r, a, t in self.committed if t == s and a == newest[s]} for s in newest}


def orders(*lengths: int):
    """Every interleaving of so many calls of each rank."""
    pattern = [rank for rank, n in enumerate(lengths) for _ in range(n)]
    return set(itertools.permutations(pattern)) if len(pattern) <= 7 else _sampled(pattern)


def _sampled(pattern: list[int]):
    chance = random.Random(0)
    return {tuple(chance.sample(pattern, len(pattern))) for _ in range(2000)}


def play(job: Job, order, scripts) -> dict[int, list[int]]:
    """Let each rank do its calls in that order; returns the attempt of each recorded step, by rank."""
    todo, found = {rank: list(script) for rank, script in scripts.items()}, {rank: [] for rank in scripts}
    for rank in order:
        action = todo[rank].pop(0)
        if isinstance(action, str):
            job.open(rank, action)
        else:
            found[rank].append(job.record(rank, action))
    return found


def ran(*lasts: int) -> Job:
    """A job whose ranks were killed after these steps."""
    job = Job()
    for rank, last in enumerate(lasts):
        job.open(rank, "first")
        for step in range(last + 1):
            job.record(rank, step)
    return job


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("lasts", "resume", "attempt"),
    [
        ((-1, -1, -1), 0, 0),  # fresh
        ((9, 9, 9), 10, 0),  # goes on
        ((9, 8, 9), 10, 0),  # a rank lost what waited
        ((9, 9, 9), 5, 1),  # from a checkpoint
        ((9, 7, 8), 8, 1),  # from a checkpoint that some ranks have passed and others have not
        ((7, 9, 8), 9, 1),
        ((7, -1, 9), 8, 1),
        ((9, 9, 9), 0, 1),
        ((9, 9, 9), 30, 0),
    ],
)
def test_all_ranks_of_a_launch_take_the_same_attempt_in_every_order(ranks, lasts, resume, attempt):
    script = ["second", resume, resume + 1]
    played = 0
    for order in orders(*[3] * ranks):
        job = ran(*lasts[:ranks])
        expected = attempt if max(lasts[:ranks]) >= resume else 0
        found = play(job, order, dict.fromkeys(range(ranks), script))
        assert found == dict.fromkeys(range(ranks), [expected, expected]), order
        shown = job.shown()
        assert shown[resume] == shown[resume + 1] == set(range(ranks))
        played += 1
    assert played >= 20


def in_step(order, slack=1) -> bool:
    """True if no rank is ahead of another by more than a call, as in training, where each step waits for all."""
    done = dict.fromkeys(set(order), 0)
    for rank in order:
        done[rank] += 1
        if max(done.values()) - min(done.values()) > slack:
            return False
    return True


@pytest.mark.parametrize("rewind", [2, 3, 4])
def test_a_rewind_within_a_launch(rewind):
    script = [3, 4, rewind, rewind + 1]
    played = 0
    for order in filter(in_step, orders(4, 4)):
        job = Job()
        for rank in (0, 1):
            job.open(rank, "first")
        play(job, (0, 1), {0: [2], 1: [2]})
        found = play(job, order, {0: script, 1: script})
        assert found == {0: [0, 0, 1, 1], 1: [0, 0, 1, 1]}, order
        played += 1
    assert played >= 8


def test_a_rank_that_is_restarted_alone_goes_on_beside_the_others():
    for order in filter(in_step, orders(3, 3)):
        for lost in range(3):  # steps that were handed over and never written
            for begun in (0, 5):  # the launch began at that step
                job = ran(9, 9)
                for rank in (0, 1):
                    job.open(rank, "second")
                attempt = 1 if begun == 5 else 0
                for step in range(5, 20) if begun else range(10, 20):
                    for rank in (0, 1):
                        job.record(rank, step, commit=rank == 0 or step < 20 - lost)
                job.open(1, "second")
                found = play(job, order, {0: [20, 21, 22], 1: [20, 21, 22]})
                assert found == {0: [attempt] * 3, 1: [attempt] * 3}
                assert job.shown()[21] == {0, 1}


@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("resume", [5, 10])
def test_a_job_that_shrinks_or_grows(before, after, resume):
    for order in itertools.islice(orders(*[3] * after), 100):
        job = ran(*[9] * before)
        found = play(job, order, {rank: ["second", resume, resume + 1] for rank in range(after)})
        assert set(itertools.chain(*found.values())) == {0 if resume == 10 else 1}
        script = {rank: ["third", resume + 2] for rank in range(before)}
        again = play(job, [rank for rank in script for _ in range(2)], script)
        assert len({a for attempts in again.values() for a in attempts}) == 1
        shown = job.shown()
        assert shown[resume] == set(range(after)) and shown[resume + 2] == set(range(before))


def test_a_launch_that_dies_before_its_first_step_leaves_no_trace():
    job = ran(9, 9)
    for launch in ("second", "third", "fourth"):
        for rank in (0, 1):
            job.open(rank, launch)
            assert job.ranks[rank].begin(5) == 1
    found = play(job, (0, 0, 1, 1), {0: ["fifth", 6], 1: ["fifth", 6]})
    assert found == {0: [1], 1: [1]}


@pytest.mark.parametrize("seed", range(150))
def test_random_histories_of_a_job(seed):
    """Launches, rewinds, single restarts and lost steps in any order: the ranks always agree."""
    chance = random.Random(seed)
    job, n, step, launch = Job(), chance.randint(1, 4), -1, 0
    for _ in range(chance.randint(2, 12)):
        event = chance.choice(["launch", "launch", "rewind", "restart", "go on"]) if launch else "launch"
        if event == "launch":
            n, launch = max(1, n + chance.choice([-1, 0, 0, 0, 1])), launch + 1
            for rank in chance.sample(range(n), n):
                job.open(rank, f"launch {launch}")
            step = max(0, step - chance.choice([-1, -1, 0, 1, 2, 5]))
        elif event == "rewind":
            step = max(0, step - chance.randint(0, 4))
        else:
            step += 1
            if event == "restart":
                job.open(chance.randrange(n), f"launch {launch}")
        lost = {rank: chance.choice([0, 0, 1, 2]) for rank in range(n)}  # the last ones wait when it is killed
        steps = range(step, step + chance.randint(1, 5))
        for now in steps:
            taken = {job.record(r, now, commit=now < steps[-1] + 1 - lost[r]) for r in chance.sample(range(n), n)}
            assert len(taken) == 1, f"the ranks disagree about step {now}: {taken}"
        step = steps[-1]
    attempts = sorted({a for _, a, _ in job.committed})
    began = {a: min(when for (_, b, _), when in job.committed.items() if b == a) for a in attempts}
    assert sorted(began, key=began.get) == attempts, "a later attempt has the higher number"


# The launch


def test_ranks_that_start_at_the_same_moment_find_one_launch_and_a_new_one(tmp_path, monkeypatch):
    storage, seen = LocalStorage(tmp_path), set()
    monkeypatch.setattr(sys, "setswitchinterval", sys.setswitchinterval)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            locks, barrier = {}, threading.Barrier(4)

            def acquire(rank, locks=locks, barrier=barrier):
                barrier.wait()
                locks[rank] = WriterLock(storage, rank, 4, None)

            threads = [threading.Thread(target=acquire, args=(rank,)) for rank in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            launches = {lock.launch for lock in locks.values()}
            assert len(launches) == 1 and not launches & seen
            seen |= launches
            locks[2].release()  # a rank that is restarted alone belongs to the others
            locks[2] = WriterLock(storage, 2, 4, None)
            assert {locks[2].launch} == launches
            for lock in locks.values():
                lock.release()
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, None), ({"TORCHELASTIC_RUN_ID": "none"}, None), ({"TORCHELASTIC_RUN_ID": "x"}, "x-0"),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2", "SLURM_JOB_ID": "7"}, "x-2"),
        ({"SLURM_JOB_ID": "7"}, "slurm-7-0-0-0"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_RESTART_COUNT": "1"}, "slurm-7-3-1-0"),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}, "slurm-7-0-0-2"),
    ],
)  # fmt: skip
def test_the_launch_that_torchrun_or_slurm_tell(environment, launch):
    assert launch_of(environment) == launch


def test_two_recorders_on_one_rank_are_refused(tmp_path):
    options = {"objective": "mhpo", "fsync": False, "world_size": 2}
    with Recorder(tmp_path / "run", rank=0, **options) as first, Recorder(tmp_path / "run", rank=1, **options):
        for rank in (0, 1):
            with pytest.raises(StoreError, match=f"rank {rank} of .* is being written by another recorder") as raised:
                Recorder(tmp_path / "run", rank=rank, **options)
            assert "\n" not in str(raised.value)
        first.record(0, token_batch(0))
    with Recorder(tmp_path / "run", rank=0, **options):
        pass


# Merged rows


RANKS = 4


def rank_batch(rank: int, step: int) -> TokenBatch:
    return token_batch(1000 * rank + step, 3 + rank)


def rank_rewards(rank: int, step: int) -> list[float]:
    return [rank + 0.25 * i - step for i in range(3 + rank)]


def rank_sequences(rank: int, step: int) -> Sequences:
    n = 3 + rank
    return Sequences(truncated=[i % 2 == 0 for i in range(n)], group_id=[rank * 100 + i // 2 for i in range(n)])


def record_rank(recorder: Recorder, rank: int, step: int) -> None:
    recorder.record(
        step, rank_batch(rank, step), loss=0.5 * step + rank, reward=torch.tensor(rank_rewards(rank, step)),
        grad_norm=2.0, sequences=rank_sequences(rank, step), gradient_norms={f"layer.{rank}": step + 0.5},
        metrics={"lr": 1e-6},
    )  # fmt: skip


def record_side_by_side(path: Path, steps, *, objective="mhpo", ranks=RANKS, **options) -> None:
    recorders = [
        Recorder(path, objective=objective, fsync=False, rank=rank, world_size=ranks, **options)
        for rank in range(ranks)
    ]
    for step in steps:
        for rank, recorder in enumerate(recorders):
            record_rank(recorder, rank, step)
    for recorder in recorders:
        recorder.close()


def bin_of(value: float) -> int:
    return int(np.clip(np.searchsorted(EDGES, value, side="right") - 1, 0, len(EDGES) - 2))


def check_merged(run: Run, step: int, ranks=range(RANKS), objective="mhpo") -> None:
    """The row of a step against everything measured at once."""
    whole = concatenate([rank_batch(rank, step) for rank in ranks])
    expected = measure(whole, objectives.create(objective)).scalars
    rewards = np.concatenate([rank_rewards(rank, step) for rank in ranks])
    cut = np.concatenate([rank_sequences(rank, step).truncated for rank in ranks])
    expected |= {
        "reward_mean": rewards.mean(), "reward_std": rewards.std(), "truncated_fraction": cut.mean(),
        "dropped_tokens": 0, "n_groups": sum(len(set(rank_sequences(r, step).group_id)) for r in ranks),
        "loss": np.mean([0.5 * step + rank for rank in ranks]), "lr": 1e-6, "grad_norm": 2.0,
    }  # fmt: skip
    (row,) = run.sql(f"FROM steps WHERE step = {step}").to_arrow_table().to_pylist()
    for name, metric in METRICS.items():
        if metric.reduction == QUANTILE and len(ranks) > 1:
            assert_quantile(name, row[name], whole)
        elif name not in ("recorder_ms", "zero_std_groups", "logit_grad_norm_top1_share"):
            assert_merged(name, metric.reduction, row[name], expected.get(name))
    share = "logit_grad_norm_top1_share"
    assert row[share] == pytest.approx(expected[share], rel=0.15)


def assert_merged(name, rule, found, expected):
    if expected is None or found is None:
        assert found is None and expected is None, f"{name}: {found} for {expected}"
    elif rule in (SUM, LAST, "min", "max"):
        assert found == expected, f"{name}: {found} for {expected}"
    else:
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-12), name


def assert_quantile(name, found, batch):
    """It lies in the bin of the value at rank ⌈level·n⌉."""
    log_ratio = batch.logp_new - batch.logp_old
    values = batch.logp_old - batch.logp_rollout if name.startswith("mismatch") else log_ratio
    side = {"pos": batch.advantage > 0, "neg": batch.advantage < 0}.get(name[-3:], torch.ones_like(batch.mask))
    ordered = np.sort(values[batch.mask & side].numpy())
    level = QUANTILE_LEVELS[next(part for part in name.split("_") if part in QUANTILE_LEVELS)]
    at = bin_of(ordered[max(math.ceil(level * len(ordered)), 1) - 1])
    assert EDGES[at] <= found <= EDGES[at + 1], name


@pytest.mark.parametrize("objective", ["mhpo", "ppo_clip"])
def test_merged_numbers_are_those_of_all_tokens_at_once(tmp_path, monkeypatch, objective):
    monkeypatch.setattr(store, "SEAL_AFTER_STEPS", 3)
    record_side_by_side(tmp_path / "run", range(5), objective=objective, tokens="all")
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT step FROM steps") == list(range(5))
        for step in range(5):
            check_merged(run, step, objective=objective)
            tokens = sum(int(rank_batch(r, step).mask.sum()) for r in range(RANKS))
            assert column(run, f"SELECT count(*) FROM tokens WHERE step = {step}") == [tokens]
            counts = column(run, "SELECT sum(count) FROM histograms WHERE quantity = 'log_ratio' AND step = 0")
            assert counts == [sum(int(rank_batch(r, 0).mask.sum()) for r in range(RANKS))]
        assert rows(run, "SELECT count(*), count(DISTINCT sequence_id) FROM sequences") == [(5 * 18, 5 * 18)]
        gradients = rows(run, "SELECT rank, parameter, grad_norm FROM gradients WHERE step = 2 ORDER BY rank")
        assert gradients == [(r, f"layer.{r}", 2.5) for r in range(RANKS)]
        assert column(run, "SELECT count(*) FROM metrics WHERE name = 'lr'") == [5], "one value per step"
    assert verify(LocalStorage(tmp_path / "run")).findings == []


def test_values_that_are_not_finite_merge_too(tmp_path):
    def batch(rank):
        made = rank_batch(rank, 0)
        if rank == 1:
            made.logp_new[0, 0], made.logp_new[1, 1] = math.nan, math.inf
        if rank == 2:
            made.logp_new[0, 0] = -math.inf
        return made

    recorders = [Recorder(tmp_path / "run", objective="mhpo", rank=r, world_size=3, fsync=False) for r in range(3)]
    for rank, recorder in enumerate(recorders):
        recorder.record(0, batch(rank), reward=torch.tensor([math.nan if rank == 1 else 1.0] * (3 + rank)))
        recorder.close()
    expected = measure(concatenate([batch(r) for r in range(3)]), objectives.create("mhpo")).scalars
    names = ["n_tokens", "nonfinite_count", "clamped_count", "log_ratio_min", "log_ratio_max", "log_ratio_mean",
             "log_ratio_std", "ess_fraction", "kl_old_new_k3", "hazard_mean"]  # fmt: skip
    with open_run(tmp_path / "run") as run:
        found = rows(run, f"SELECT {', '.join(names)}, reward_mean, reward_std FROM steps")[0]
    assert found[:-2] == pytest.approx([expected[n] for n in names], rel=1e-10, nan_ok=True)
    assert math.isnan(found[-2]) and math.isnan(found[-1])


def test_a_rank_that_wrote_a_summary_alone_still_counts(tmp_path):
    """Its memory was full, so its tokens were dropped before they were measured."""
    recorders = [Recorder(tmp_path / "run", objective="mhpo", rank=r, world_size=2, fsync=False) for r in range(2)]
    recorders[1]._pipeline.has_room = lambda size: False
    for rank, recorder in enumerate(recorders):
        record_rank(recorder, rank, 0)
        recorder.close()
    counts = [int(rank_batch(r, 0).mask.sum()) for r in range(2)]
    with open_run(tmp_path / "run") as run:
        found = rows(run, "SELECT n_tokens, dropped_tokens, reward_mean, log_ratio_max FROM steps")
    log_ratio = measure(rank_batch(0, 0), objectives.create("mhpo")).scalars["log_ratio_max"]
    reward = np.mean(rank_rewards(0, 0) + rank_rewards(1, 0))
    assert found == [(sum(counts), counts[1], pytest.approx(reward), log_ratio)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([1.0, 4.0, 4.0], 3.0), ([None, 2.0, 5.0], 3.5), ([None] * 3, None), ([1.0, math.nan, 2.0], math.nan),
     ([math.inf, 1.0, 2.0], math.inf), ([math.inf, -math.inf, 1.0], math.nan)],
)  # fmt: skip
def test_the_loss_is_the_mean_of_the_ranks_that_gave_one_however_many_tokens_they_have(tmp_path, losses, expected):
    recorders = [Recorder(tmp_path / "run", objective="mhpo", rank=r, world_size=3, fsync=False) for r in range(3)]
    for rank, (recorder, loss) in enumerate(zip(recorders, losses, strict=True)):
        recorder.record(0, rank_batch(rank, 0), loss=loss, grad_norm=2.0 + rank)
        recorder.close()
    with open_run(tmp_path / "run") as run:
        found, norm = rows(run, "SELECT loss, grad_norm FROM steps")[0]
    assert found == expected if expected is None else found == pytest.approx(expected, nan_ok=True)
    assert norm == 2.0, "global: the same on every rank"


def test_one_rank_stays_as_it_is_and_the_order_of_rows_does_not_matter(tmp_path):
    record_side_by_side(tmp_path / "run", range(3))
    with open_run(tmp_path / "run") as run:
        table = run.connection.sql("FROM raw_rollup").to_arrow_table()
    order = np.random.default_rng(0).permutation(len(table))
    merged, shuffled = merge_ranks(table).to_pylist(), merge_ranks(table.take(order)).to_pylist()
    assert [r["step"] for r in merged] == [0, 1, 2] and repr(merged) == repr(shuffled)
    first = table.filter([r == 0 for r in table["rank"].to_pylist()])
    assert repr(merge_ranks(first).to_pylist()) == repr(first.to_pylist())


# Processes


def _record_rank(path, rank, ranks, first, last, seed, launch, seal_after, done):
    """Steps first … last − 1, with pauses of its own, at most one ahead of the others, as where gradients are summed.

    Ends well unless it is killed.
    """
    store.SEAL_AFTER_STEPS, store.GRACE_SECONDS = seal_after, 20.0
    chance = random.Random(seed)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            recorder = Recorder(
                path, objective="mhpo", fsync=False, rank=rank, world_size=ranks, launch=launch, tokens="all"
            )
            break
        except StoreError as error:  # the one before was killed a moment ago
            assert "another recorder" in str(error)
    with recorder:
        for step in range(first, last):
            while min(done) < step - 1:
                assert time.monotonic() < deadline, "another rank is gone"
                time.sleep(0.002)
            record_rank(recorder, rank, step)
            done[rank] = max(done[rank], step)
            if chance.random() < 0.3:
                time.sleep(chance.uniform(0, 0.02))
            if chance.random() < 0.2:
                recorder.flush()


class RankProcesses:
    """A job of RANKS processes that are killed and started again, and what was visible before."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.chance = path, random.Random(seed)
        self.seen: set[tuple[int, int, int]] = set()
        self.kills = 0

    def launch(self, first: int, last: int, launch: str | None, fate: str) -> None:
        """Start all ranks; kill all of them, or two, which are started again where they were, until all are done."""
        seal, done, before = self.chance.choice([2, 5, 256]), PROCESSES.Array("q", [first - 1] * RANKS), self.seen

        def start_rank(rank: int):
            at = max((s + 1 for r, _, s in self.seen - before if r == rank), default=first)
            seed = self.chance.randrange(10**6)
            return start(_record_rank, self.path, rank, RANKS, at, last, seed, launch, seal, done)

        running = {rank: start_rank(rank) for rank in range(RANKS)}
        begun = time.monotonic()
        while fate != "all end" and min(done) < first + self.chance.randint(0, 6) and time.monotonic() < begun + 20:
            time.sleep(0.01)
        for rank in {"all end": [], "all die": range(RANKS), "some die": self.chance.sample(range(RANKS), 2)}[fate]:
            self.kill(running[rank])
            if fate == "some die":
                self.note()
                running[rank] = start_rank(rank)
        for rank, process in running.items():
            process.join(90)
            assert process.exitcode in (0, -signal.SIGKILL), f"rank {rank} ended with {process.exitcode}"
        self.note()

    def kill(self, process) -> None:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            self.kills += 1
        process.join()

    def keys(self) -> set[tuple[int, int, int]]:
        if not (self.path / "run.json").exists():
            return set()
        with open_run(self.path) as run:
            return set(run.connection.sql("SELECT rank, attempt, step FROM raw_rollup").fetchall())

    def note(self) -> None:
        now = self.keys()
        assert self.seen <= now, f"lost: {sorted(self.seen - now)[:5]}"
        self.seen = now


@pytest.mark.parametrize(("seed", "named"), [(0, True), (1, False)])
def test_ranks_that_are_killed_and_started_again(tmp_path, seed, named):
    job = RankProcesses(tmp_path / "run", seed)
    first = 0
    for number, fate in enumerate(["some die", "all die", "some die"]):
        job.launch(first, first + 9, f"launch-{number}" if named else None, fate)
        newest = max(s for _, _, s in job.seen)
        # go on behind the newest step, or from a checkpoint that some ranks have passed
        first = job.chance.choice([newest + 1, max(0, newest - 1), max(0, newest - 6)])
    job.launch(first, first + 4, "last" if named else None, "all end")
    assert job.kills >= 6
    check_whole(tmp_path / "run", range(first, first + 4))


def check_whole(path: Path, final: range) -> None:
    """One row per step, merged of its ranks; the attempts of the ranks agree; nothing is damaged."""
    assert verify(LocalStorage(path)).findings == []
    with open_run(path) as run:
        steps = column(run, "SELECT step FROM steps ORDER BY step")
        assert len(steps) == len(set(steps))
        raw = run.connection.sql("SELECT step, attempt, rank FROM raw_rollup").fetchall()
        assert len(raw) == len(set(raw)), "a step of a rank is there twice"
        newest = dict(rows(run, "SELECT step, attempt FROM steps"))
        for step in steps:
            ranks = sorted(r for s, a, r in raw if s == step and a == newest[step])
            check_merged(run, step, ranks)
            counts = {r: int(rank_batch(r, step).mask.sum()) for r in ranks}
            assert column(run, f"SELECT count(*) FROM tokens WHERE step = {step}") == [sum(counts.values())]
            assert column(run, f"SELECT count(*) FROM sequences WHERE step = {step}") == [sum(3 + r for r in ranks)]
            if step in final:
                assert ranks == list(range(RANKS)), f"the ranks took different attempts at step {step}"
        assert column(run, "SELECT count(DISTINCT (step, attempt)) FROM steps_all") == [len({k[:2] for k in raw})]
    assert run_state(LocalStorage(path)).name == "finished"


def test_a_job_that_grows_and_shrinks_is_read_by_what_each_step_had(tmp_path):
    run = tmp_path / "run"
    record_side_by_side(run, range(3), ranks=2, launch="a")
    record_side_by_side(run, range(3, 6), ranks=4, launch="b")
    record_side_by_side(run, range(6, 8), ranks=1, launch="c")
    record_side_by_side(run, range(2, 4), ranks=3, launch="d")
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, attempt FROM steps ORDER BY step") == [
            (0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (5, 0), (6, 0), (7, 0),
        ]  # fmt: skip
        for step, ranks in ((0, 2), (2, 3), (3, 3), (5, 4), (7, 1)):
            check_merged(opened, step, range(ranks))
    assert run_state(LocalStorage(run)).name == "finished"


def test_the_state_of_a_job_is_that_of_its_worst_rank(tmp_path):
    run = tmp_path / "run"
    storage = LocalStorage(run)

    def recorders(n, launch):
        return [Recorder(run, objective="mhpo", fsync=False, rank=r, world_size=n, launch=launch) for r in range(n)]

    first = recorders(3, "a")
    assert run_state(storage).name == "running"
    for i in range(40):  # one rank has much more to say than the others
        first[0].event("note", str(i))
    first[0].close()
    first[1].close("failed", "boom")
    assert run_state(storage).name == "running", "one rank lives"
    first[2].close()
    assert run_state(storage).name == "failed"


def _die(path, rank, ranks, launch):
    Recorder(path, objective="mhpo", fsync=False, rank=rank, world_size=ranks, launch=launch).flush()
    os._exit(0)


def test_a_rank_that_died_shows_however_much_the_others_said(tmp_path):
    run = tmp_path / "run"
    others = [Recorder(run, objective="mhpo", fsync=False, rank=r, world_size=3, launch="a") for r in (0, 1)]
    call(_die, run, 2, 3, "a")
    for i in range(60):
        others[0].event("note", str(i))
    for recorder in others:
        recorder.close()
    assert run_state(LocalStorage(run)).name == "killed"


def test_a_smaller_job_that_ended_well_is_not_killed_by_a_rank_of_a_larger_one(tmp_path):
    run = tmp_path / "run"
    for rank in range(4):
        call(_die, run, rank, 4, "a")
    assert run_state(LocalStorage(run)).name == "killed"
    record_side_by_side(run, range(2), ranks=2, launch="b")
    assert run_state(LocalStorage(run)).name == "finished"
