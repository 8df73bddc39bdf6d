"""The metric table agrees with what `measure` emits and with the columns that are promised."""

from __future__ import annotations

import pytest

from mhpo_core import metrics, objectives
from mhpo_core.metrics import METRICS, QUANTILE_LEVELS, SIDES, SUFFIX_OF_SIDE
from mhpo_core.objectives import OBJECTIVES
from mhpo_core.telemetry import measure

RULES = {
    metrics.SUM, metrics.MINIMUM, metrics.MAXIMUM, metrics.LAST, metrics.TOKEN_MEAN, metrics.SEQUENCE_MEAN,
    metrics.RANK_MEAN, metrics.QUANTILE, metrics.FROM_SUMS,
}  # fmt: skip
# what only the trainer or the recorder knows; everything else comes from the tokens
FROM_THE_TRAINER = {
    "loss", "lr", "reward_mean", "reward_std", "grad_norm", "zero_std_groups", "n_groups", "truncated_fraction",
    "dropped_tokens", "recorder_ms",
}  # fmt: skip
PROMISED = {
    "n_tokens", "n_sequences", "loss", "lr", "reward_mean", "reward_std", "log_ratio_mean", "log_ratio_min",
    "log_ratio_max", "hazard_mean", "survival_weight_mean", "ess_fraction", "kl_old_new_k1", "kl_old_new_k3",
    "kl_rollout_old_k3", "clip_fraction_low", "clip_fraction_high", "out_of_range_fraction", "entropy_mean",
    "grad_norm", "logit_grad_norm_top1_share", "zero_std_groups", "truncated_fraction", "nonfinite_count",
    "clamped_count", "dropped_tokens", "recorder_ms",
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_measure_emits_exactly_the_rows_that_come_from_tokens(name, random_batch):
    scalars = measure(random_batch(0), objectives.create(name)).scalars
    assert set(scalars) == set(METRICS) - FROM_THE_TRAINER
    for key, value in scalars.items():
        if value is not None:
            assert type(value) is (int if METRICS[key].integer else float), key


@pytest.mark.parametrize("name", METRICS)
def test_every_row_is_complete(name):
    row = METRICS[name]
    assert row.name == name and row.label and row.unit and row.formula
    assert row.reduction in RULES
    assert row.reduction == metrics.SUM or not row.integer


def test_no_two_rows_share_a_label():
    assert len({row.label for row in METRICS.values()}) == len(METRICS)


def test_the_promised_columns_are_there():
    assert set(METRICS) >= PROMISED


@pytest.mark.parametrize("name", QUANTILE_LEVELS)
def test_a_quantile_is_named_after_its_digits(name):
    # p05 = 0.05, p9999 = 0.9999
    assert QUANTILE_LEVELS[name] == float(f"0.{name[1:]}")
    for column in (f"log_ratio_{name}", f"mismatch_{name}", *(f"log_ratio_{name}{s}" for s in SUFFIX_OF_SIDE.values())):
        assert METRICS[column].reduction == metrics.QUANTILE and f"{QUANTILE_LEVELS[name]:g}" in METRICS[column].label


def test_quantile_levels_rise_and_mirror():
    levels = list(QUANTILE_LEVELS.values())
    assert levels == sorted(levels)
    assert levels == pytest.approx([1 - v for v in reversed(levels)], rel=1e-12)


def test_sides_with_a_suffix_are_sides():
    assert set(SUFFIX_OF_SIDE) < set(SIDES)
