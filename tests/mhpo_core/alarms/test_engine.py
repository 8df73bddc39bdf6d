"""The alarm engine on series whose truth is known: collapses are found, healthy noise is not, nothing looks ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhpo_core.alarms import Alarm, AlarmEngine, Evaluation, Settings
from mhpo_core.alarms.modes import MODES
from mhpo_core.alarms.signals import SIGNALS
from mhpo_core.errors import ConfigError

Row = Mapping[str, float | None]


def watch(rows: Iterable[Row], every: int = 1, engine: AlarmEngine | None = None) -> list[Alarm]:
    return [alarm for evaluation in evaluations(rows, every, engine) for alarm in evaluation.alarms]


def evaluations(rows: Iterable[Row], every: int = 1, engine: AlarmEngine | None = None) -> list[Evaluation]:
    engine = engine or AlarmEngine()
    return [engine.observe(step * every, row) for step, row in enumerate(rows)]


def critical(alarms: list[Alarm]) -> list[Alarm]:
    return [alarm for alarm in alarms if alarm.severity == "critical"]


def healthy(steps: int, seed: int = 0, sigma: float = 0.3) -> list[dict[str, float | None]]:
    """A run that learns: heavy-tailed gradient norm and KL, a falling entropy, a rising noisy reward."""
    draw = np.random.default_rng(seed)
    learned = 1 - np.exp(-np.arange(steps) / 100)
    return [
        {
            "reward_mean": float(0.2 + 0.6 * learned[i] + 0.05 * draw.standard_normal()),
            "grad_norm": float(np.exp(sigma * draw.standard_normal())),
            "kl": float(0.05 * np.exp(sigma * draw.standard_normal())),
            "entropy_mean": float((1.4 - learned[i]) * np.exp(0.05 * draw.standard_normal())),
            "length_mean": float(100 * np.exp(0.05 * draw.standard_normal())),
        }
        for i in range(steps)
    ]


def test_a_nan_neither_blinds_nor_vanishes():
    rows = healthy(400)
    rows[50]["grad_norm"] = math.nan
    for row in rows[200:]:
        row["grad_norm"] *= 500
    alarms = watch(rows)
    assert [a.step for a in alarms if a.rule == "non-finite"] == [50]
    found = [a for a in critical(alarms) if a.rule == "gradient-explosion"]
    assert found and 200 < found[0].step <= 203
    assert found[0].onset_step == 200 and found[0].evidence["last_good_step"] == 199
    assert not [a for a in critical(alarms) if a.step < 200]


def test_an_explosion_in_the_last_five_steps_is_critical():
    rows = healthy(300)
    for row in rows[295:]:
        row.update(grad_norm=1500.0, kl=50.0, reward_mean=0.0)
    found = critical(watch(rows))
    assert found and 295 < found[0].step < 300


@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_healthy_heavy_tails_are_not_critical(sigma: float):
    alarmed = [seed for seed in range(20) if critical(watch(healthy(500, seed, sigma)))]
    assert alarmed == []


def test_a_spike_that_recovers_is_not_critical():
    rows = healthy(200)
    rows[100].update(grad_norm=1e4, kl=30.0)
    assert critical(watch(rows)) == []


def test_constant_series_raise_nothing():
    assert watch([{"reward_mean": 1.0, "grad_norm": 0.0, "entropy_mean": 0.5, "length_mean": 16.0}] * 200) == []


def test_three_steps_are_enough_for_an_absolute_bound_and_too_few_for_anything_else():
    assert watch(healthy(3)) == []
    wrecked = [{"kl": 0.0, "reward_mean": 1.0}, {"kl": 3.4, "reward_mean": 0.0}, {"kl": 0.7, "reward_mean": 0.0}]
    assert [(a.rule, a.step) for a in critical(watch(wrecked))] == [("cold-divergence", 1)]


def test_rows_count_not_steps():
    rows = healthy(120)
    for row in rows[60:]:
        row["grad_norm"] *= 500
    dense, sparse = watch(rows), watch(rows, every=10)
    assert [a.step * 10 for a in dense] == [a.step for a in sparse]


def test_a_metric_that_appears_late_is_judged_by_its_own_past():
    rows = healthy(300)
    for i, row in enumerate(rows[150:]):
        row["mismatch_max"], row["mismatch_min"] = 0.3 * 1.02 ** (i % 7), -0.2
    assert critical(watch(rows)) == []
    for i, row in enumerate(rows[250:]):
        row["mismatch_min"] = -0.3 * 2.0**i
    found = critical(watch(rows))
    assert found and found[0].mode == "engine-mismatch" and 250 <= found[0].step <= 256


def test_frequencies_may_be_mixed_and_padded_with_nulls():
    rows = healthy(200)
    for i, row in enumerate(rows):
        row["eval_reward"] = 0.5 if i % 25 == 0 else None
        if i % 2:
            row["grad_norm"] = None
    assert critical(watch(rows)) == []
    for row in rows[100:]:
        row["grad_norm"] = row["grad_norm"] and row["grad_norm"] * 500
    assert [a for a in critical(watch(rows)) if a.rule == "gradient-explosion"]


def test_infinity_is_critical_at_once_and_a_nan_after_three():
    rows = healthy(40)
    rows[10]["kl"] = math.inf
    assert [(a.step, a.rule, a.mode) for a in critical(watch(rows))] == [(10, "non-finite", "non-finite")]
    rows = healthy(40)
    for i in (20, 23, 30):
        rows[i]["grad_norm"] = math.nan
    assert [a.step for a in critical(watch(rows))] == [30]


def test_non_finite_tokens_are_reported():
    rows = [row | {"nonfinite_count": 0} for row in healthy(30)]
    rows[12]["nonfinite_count"] = 7
    (alarm,) = watch(rows)
    assert (alarm.severity, alarm.step, alarm.mode) == (
        "warning",
        12,
        "non-finite",
    ) and "7 trained tokens" in alarm.message


def test_a_dead_run_is_never_missed():
    rows = [{"reward_mean": 0.8, "frac_reward_zero_std": 0.3} for _ in range(6)]
    rows += [{"reward_mean": 0.0, "frac_reward_zero_std": 1.0} for _ in range(4)]
    found = critical(watch(rows))
    assert found[0].rule == "dead-run" and found[0].step == 8 and found[0].onset_step == 6


def test_growth_of_the_mismatch_is_projected():
    rows = [row | {"kl_rollout_old_k3": 1e-3 * 1.08**i} for i, row in enumerate(healthy(60))]
    first = next(a for a in watch(rows) if a.rule == "mismatch-projection")
    # 0.05 is reached where 1.08^i = 50: i = 50.8
    assert first.severity == "warning" and first.step <= 20 and "it reaches 0.05 in" in first.message


def test_signs_come_in_the_order_of_their_onsets_and_name_the_mode():
    rows = [row | {"mismatch_max": 0.3, "mismatch_min": -0.3} for row in healthy(200)]
    for i in range(130, 200):
        rows[i]["mismatch_max"] = 4.0
    for i in range(134, 200):
        rows[i]["entropy_mean"] *= 3
    for i in range(139, 200):
        rows[i]["reward_mean"] *= 0.2
    found = [a for a in critical(watch(rows)) if a.rule == "several-signs"][0]
    order = [(s["signal"], s["onset_step"]) for s in found.evidence["signs"]]
    assert order[0] == ("mismatch_largest", 130) and found.mode == "engine-mismatch"
    assert [o for _, o in order] == sorted(o for _, o in order)
    assert found.advice and set(found.to_dict()) >= {"id", "rule", "mode", "severity", "step", "onset_step"}


def test_an_episode_is_raised_every_twenty_steps_and_evaluated_at_each():
    rows = healthy(220)
    for row in rows[120:200]:
        row["grad_norm"] *= 500
    found = evaluations(rows)
    raised = [a for e in found for a in e.alarms if a.rule == "gradient-explosion"]
    assert [a.step for a in raised] == [122, 142, 162, 182]
    held = [e.step for e in found if e.level == "critical"]
    assert held == list(range(122, 200)) and held[0] == raised[0].step


def test_what_is_missing_is_said_with_the_way_to_have_it():
    engine = AlarmEngine()
    watch(healthy(5), engine=engine)
    assert "reward_fall" not in engine.missing
    assert "logp_rollout" in engine.missing["mismatch_largest"]
    assert all(engine.missing.values())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["reward_mean", "grad_norm", "kl", "entropy_mean", "mismatch_max", "truncated_fraction"]),
            st.floats(allow_nan=True, allow_infinity=True, width=32),
        ),
        max_size=40,
    ),
    st.integers(0, 40),
)
def test_it_never_looks_ahead(rows: list[dict[str, float]], cut: int):
    whole = [repr(e) for e in evaluations(rows)]
    assert [repr(e) for e in evaluations(rows[:cut])] == whole[:cut]


def test_every_mode_and_signal_says_what_it_is():
    for mode in MODES.values():
        assert mode.title and mode.cause and mode.advice
    for signal in SIGNALS.values():
        assert signal.healthy and signal.source and signal.how


def test_settings_are_changed_by_name_and_refuse_nonsense():
    assert Settings().changed({"critical": 3, "memory": 5}) == Settings(critical=3.0, memory=5)
    for bad in ({"critcal": 1.0}, {"critical": 0.0}, {"critical": math.nan}, {"memory": 2.5}):
        with pytest.raises(ConfigError, match="allowed are"):
            Settings().changed(bad)


def test_a_run_that_does_not_come_back_is_said_again_and_one_that_does_is_not():
    rows = healthy(220)
    for row in rows[120:126]:
        row.update(grad_norm=900.0, reward_mean=0.1)
    back = [a.step for a in critical(watch(rows)) if a.rule == "unrecovered"]
    for row in rows[126:]:
        row["reward_mean"] = 0.2
    lost = [a.step for a in critical(watch(rows)) if a.rule == "unrecovered"]
    assert back == [] and len(lost) >= 3 and set(np.diff(lost)) == {20}


def test_an_alarm_lasts_until_the_reward_is_back():
    rows = healthy(220)
    for row in rows[120:126]:
        row.update(grad_norm=900.0, reward_mean=0.1)
    lasting = [e.step for e in evaluations(rows) if e.lasting]
    first = critical(watch(rows))[0].step
    assert lasting[0] == first and lasting == list(range(first, lasting[-1] + 1)) and 140 <= lasting[-1] < 150
    for row in rows:
        del row["reward_mean"]
    assert not any(e.lasting for e in evaluations(rows)), "without a reward nobody knows"
