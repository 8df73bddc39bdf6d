"""Series on which other alarm tools were seen to fail: what lasts, happens again, or has a trainer's own names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from collectors import Recorder, open_run
from mhpo_core import objectives
from mhpo_core.alarms import AlarmEngine, Evaluation
from mhpo_core.alarms.readings import readings_of

Row = dict[str, float | None]


def noise(steps: int, seed: int = 0) -> list[Row]:
    """Gradient norm and KL of a healthy run."""
    values = np.exp(0.3 * np.random.default_rng(seed).standard_normal((steps, 2))).tolist()
    return [{"grad_norm": grad, "kl": 0.05 * kl, "reward_mean": 0.5} for grad, kl in values]


def scaled(rows: list[Row], first: int, last: int, factor: float) -> list[Row]:
    return [
        row | {"grad_norm": (row["grad_norm"] or 0.0) * factor} if first <= i <= last else row
        for i, row in enumerate(rows)
    ]


def evaluations(rows: list[Row]) -> list[Evaluation]:
    engine = AlarmEngine()
    return [engine.observe(step, row) for step, row in enumerate(rows)]


def critical_steps(found: list[Evaluation], rule: str) -> list[int]:
    return [a.step for e in found for a in e.alarms if a.severity == "critical" and a.rule == rule]


def test_eighty_bad_steps_are_stored_as_eighty_evaluations(tmp_path: Path):
    """rlwatch stores one row for them: what its cooldown does not deliver, it does not keep."""
    with Recorder(tmp_path / "run", objective=objectives.create("mhpo"), fsync=False) as recorder:
        for step, row in enumerate(scaled(noise(110), 30, 109, 1000)):
            recorder.record(step, None, grad_norm=row["grad_norm"], metrics={"kl": row["kl"]})
    with open_run(tmp_path / "run") as run:
        levels = run.sql("SELECT step, score FROM evaluations WHERE signal = 'level' ORDER BY step").fetchall()
        raised = run.sql("SELECT step FROM alarms WHERE rule = 'gradient-explosion'").fetchall()
    assert [step for step, _ in levels[30:]] == list(range(30, 110))
    critical = [step for step, level in levels if level == 2]
    assert critical == list(range(critical[0], critical[-1] + 1)) and len(critical) >= 20, (
        "until the baseline has followed"
    )
    assert 30 < critical[0] <= 33
    assert raised == [(step,) for step in range(critical[0], critical[-1] + 1, 20)], "and again while it lasts"


def test_a_second_explosion_is_raised_though_the_first_was():
    """rldoctor announces a detector once per severity, rlwatch not again within 100 steps."""
    rows = scaled(scaled(noise(200), 80, 89, 500), 150, 159, 500)
    first, second = critical_steps(evaluations(rows), "gradient-explosion")
    assert 80 < first <= 83 and 150 < second <= 153


VERL = {
    "actor/entropy": (0.2368, "entropy"),
    "actor/grad_norm": (3.189, "grad_norm"),
    "actor/lr": (1e-6, "lr"),
    "actor/pg_loss": (0.228, "loss"),
    "actor/kl_loss": (0.0013, "kl_reference"),
    "actor/ppo_kl": (0.0087, "kl_policy"),
    "actor/pg_clipfrac": (0.0234, "clip_fraction"),
    "critic/score/mean": (0.375, "reward"),
    "critic/rewards/mean": (0.361, "reward"),
    "response_length/mean": (369.97, "length"),
    "response_length/clip_ratio": (0.281, "truncated"),
    "rollout_corr/k3_kl": (0.0002, "mismatch_kl"),
    "training/rollout_probs_diff_max": (0.0011, "mismatch_largest"),
}
"""Thirteen keys that verl 0.9 writes → a value and the reading it is."""


@pytest.mark.parametrize("key", VERL)
def test_each_key_of_a_verl_log_is_read(key: str):
    """rlwatch reads one of them: actor/entropy."""
    value, reading = VERL[key]
    assert readings_of({key: value}) == {reading: value}


def test_a_verl_log_as_it_is_raises_what_the_same_run_raises_here():
    ours = {"actor/grad_norm": "grad_norm", "critic/score/mean": "reward_mean", "actor/ppo_kl": "kl_old_new_k3"}
    rows = scaled(noise(200), 120, 199, 1000)
    as_verl = [
        {key: value for key, (value, _) in VERL.items()}
        | {"actor/grad_norm": row["grad_norm"], "actor/kl_loss": row["kl"], "perf/throughput": 343.2}
        for row in rows
    ]
    renamed = [{ours.get(key, key): value for key, value in row.items()} for row in as_verl]
    theirs, here = (critical_steps(evaluations(r), "gradient-explosion") for r in (as_verl, renamed))
    assert theirs == here and 120 < theirs[0] <= 123


def test_outliers_of_twice_the_median_of_a_quiet_signal_are_none():
    rows = [row | {"grad_norm": 1 + 1e-3 * math.sin(i)} for i, row in enumerate(noise(300))]
    for i in (100, 101, 102, 180, 181, 182):
        rows[i]["grad_norm"] = 2.0
    assert not [a for e in evaluations(rows) for a in e.alarms]
