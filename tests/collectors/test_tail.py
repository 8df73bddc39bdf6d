"""The live reader says what SQL says over the same store, however often it looks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from collectors import Recorder, open_run
from collectors.tail import ALL_STEPS, RECENT, RunTail
from collectors.window import Window
from mhpo_core.histograms import EDGES, N_BINS
from mhpo_core.metrics import SIDES
from tests.collectors.support import column, record_steps, rows, token_batch, wait_for

METRICS = ["loss", "lr", "entropy_mean", "log_ratio_mean", "log_ratio_max", "reward_mean"]
# The live page follows the current branch: what an attempt left beyond the step at which a later one began is given up,
# while `steps` shows it until the later attempt gets there.
BRANCH = """(SELECT * FROM steps_all s WHERE NOT EXISTS (SELECT 1 FROM steps_all later
    WHERE later.attempt > s.attempt GROUP BY later.attempt HAVING min(later.step) <= s.step) ORDER BY step)"""


@pytest.fixture
def follow():
    opened = []

    def follow(run: Path) -> RunTail:
        opened.append(RunTail(run, METRICS))
        return opened[-1]

    yield follow
    for tail in opened:
        tail.close()


def record(writer: Recorder, step: int) -> None:
    loss = [None, float("nan"), float("inf"), step / 8][step % 4]
    norms = {"a": step + 0.5} | ({"late": float("nan") if step % 2 else 1.0} if step > 5 else {})
    metrics = {"lr": 1.0 / (step + 1)}
    writer.record(step, token_batch(step), loss=loss, gradient_norms=norms, metrics=metrics, reward=[0, 1, 1, step])


def check_window(window: Window, run: Path) -> None:
    """Every bin against the steps of the current branch that lie in it."""
    steps = rows(run, f"SELECT step, {', '.join(METRICS)} FROM {BRANCH}")
    for bin_ in range(window.size):
        inside = [row for row in steps if window.first[bin_] <= row[0] <= window.last[bin_]]
        assert (inside[0][0], inside[-1][0]) == (window.first[bin_], window.last[bin_])
        for index, name in enumerate(METRICS):
            known = np.array([row[index + 1] for row in inside if row[index + 1] is not None], np.float64)
            finite = known[np.isfinite(known)]
            found = [window.metrics.mean(window.size)[bin_, index], window.metrics.low[bin_, index],
                     window.metrics.high[bin_, index], window.metrics.nonfinite[bin_, index]]  # fmt: skip
            mean = finite.mean() if len(finite) else np.nan
            wanted = [mean, finite.min(initial=np.inf), finite.max(initial=-np.inf), len(known) - len(finite)]
            assert found == pytest.approx(wanted, rel=1e-12, nan_ok=True), (name, bin_)


def check_sums(tail: RunTail, run: Path) -> None:
    """Histograms, gradients and totals of all steps, where every step is of the latest attempt."""
    window = tail.windows[ALL_STEPS]
    counts = np.zeros((len(SIDES), N_BINS), np.int64)
    with open_run(run) as opened:
        query = "SELECT side, bin_low, count FROM histograms WHERE quantity = 'log_ratio'"
        for side, low, count in rows(opened, query):
            counts[list(SIDES).index(side), np.flatnonzero(low == EDGES)[0]] += count
        n_steps, n_tokens = rows(opened, "SELECT count(*), sum(n_tokens) FROM steps")[0]
        finite = "count(*) FILTER (isfinite(grad_norm)), count(*) FILTER (NOT isfinite(grad_norm))"
        norms = rows(
            opened, f"SELECT parameter, sum(grad_norm) FILTER (isfinite(grad_norm)), {finite} FROM gradients GROUP BY 1"
        )
    np.testing.assert_array_equal(window.log_ratio[: window.size].sum(axis=0), counts)
    assert (tail.n_steps, tail.n_tokens, tail.dropped_tokens) == (n_steps, n_tokens, 0)
    for name, total, n_finite, n_nonfinite in norms:
        column_ = window.gradients.names.index(name)
        assert window.gradients.nonfinite[: window.size, column_].sum() == n_nonfinite
        if n_finite:
            assert np.nanmean(window.gradients.mean(window.size)[:, column_]) == pytest.approx(total / n_finite)


# The steps of one writer after the other, and whether the current branch is then all that `steps` shows.
HISTORIES = [
    ([[*range(12)]], True),
    ([[*range(8), 4, 5, 6, 7, 8, 9], [10, 11, 12]], True),
    ([[*range(6)], [*range(3, 9)], [*range(10)]], True),
    ([[0, 5, 9, 2, 6, 20, 21], [40, 41]], False),
    ([[*range(9), 3, 4]], False),
]


@pytest.mark.parametrize("every", [1, 5, 1000])
@pytest.mark.parametrize(("history", "whole"), HISTORIES)
def test_the_tail_equals_sql_at_every_cadence(tmp_path, seal_after, follow, history, whole, every):
    seal_after(3)
    run, tail, done = tmp_path / "run", None, 0
    for steps in history:
        with Recorder(run, objective="mhpo", fsync=False) as writer:
            for step in steps:
                record(writer, step)
                done += 1
                if done % every == 0:
                    wait_for(writer)
                    tail = tail or follow(run)
                    assert tail.poll() is True
                    assert tail.last.step == step
    tail = tail or follow(run)
    tail.poll()
    assert tail.poll() is False
    expected = column(run, f"SELECT step FROM {BRANCH}")
    window = tail.windows[ALL_STEPS]
    assert window.first[: window.size].tolist() == expected and tail.n_steps == len(expected)
    check_window(window, run)
    assert whole == (expected == column(run, "SELECT step FROM steps"))
    if whole:
        check_sums(tail, run)
    fresh = follow(run)
    fresh.poll()
    for name in (ALL_STEPS, *RECENT):
        assert fresh.windows[name].first.tolist() == tail.windows[name].first.tolist()
        np.testing.assert_array_equal(fresh.windows[name].log_ratio, tail.windows[name].log_ratio)


def test_updates_of_one_iteration_share_a_bin(tmp_path, follow):
    record_steps(tmp_path / "run", range(10), updates_per_iteration=4)
    tail = follow(tmp_path / "run")
    tail.poll()
    window = tail.windows[ALL_STEPS]
    assert list(zip(window.first[:3].tolist(), window.last[:3].tolist(), strict=True)) == [(0, 3), (4, 7), (8, 9)]
    check_window(window, tmp_path / "run")


def test_the_pace_and_the_cost_of_recording(tmp_path, follow):
    record_steps(tmp_path / "run", [0])
    tail = follow(tmp_path / "run")
    tail.poll()
    assert tail.recorder_share() is None and tail.usual_pause() is None
    record_steps(tmp_path / "run", [1, 2, 3])
    tail.poll()
    times, spent = zip(*rows(tmp_path / "run", "SELECT wall_time, recorder_ms FROM steps"), strict=True)
    assert tail.usual_pause() == pytest.approx(np.median(np.diff(times)))
    assert tail.recorder_share() == pytest.approx(sum(spent[1:]) / 1e3 / (times[-1] - times[0]))


def test_a_run_that_is_deleted_is_no_crash(tmp_path, follow):
    record_steps(tmp_path / "run", range(3))
    tail = follow(tmp_path / "run")
    tail.poll()
    shutil.rmtree(tmp_path / "run")
    assert tail.poll() and tail.state.name == "killed" and tail.n_steps == 3
