"""What a step says about itself, under one name whatever trainer said it.

A reading is a column of `steps` where one holds it, else the first of the names that trainers log it under.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Scalars = Mapping[str, float | None]

_PREFIXES = ("train/", "train_")


@dataclass(frozen=True)
class Reading:
    """One quantity of a step.

    Args:
        names: columns of `steps` and names of trainers' metrics that hold it, the best first.
        of: computes it from those of `parts` that are known; tried before the names.
        parts: columns that it is computed from.
        how: what a user sets to have it.
    """

    names: tuple[str, ...] = ()
    of: Callable[[list[float | None]], float | None] | None = None
    parts: tuple[str, ...] = ()
    how: str = ""

    def value(self, scalars: Scalars) -> float | None:
        """What the step says; None where it says nothing."""
        found = self.of([scalars.get(p) for p in self.parts]) if self.of else None
        if found is None:
            found = next((scalars[n] for n in self.names if scalars.get(n) is not None), None)
        return None if found is None else float(found)


def _largest(values: list[float | None]) -> float | None:
    """The largest absolute value; NaN if one is NaN."""
    known = [abs(v) for v in values if v is not None]
    return math.nan if any(map(math.isnan, known)) else max(known, default=None)


def _sum(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _share(values: list[float | None]) -> float | None:
    part, whole = values
    return part / whole if part is not None and whole else None


def _negative(values: list[float | None]) -> float | None:
    return None if values[0] is None else -values[0]


_ROLLOUT = (
    "record logp_rollout, the log-probabilities of the engine that sampled (TRL: use_vllm; verl: calculate_log_probs)"
)
_RATIO = "record logp_new and logp_old of every token (mhpo's adapters do)"

READINGS: dict[str, Reading] = {
    "reward": Reading(
        ("reward_mean", "reward", "critic/score/mean", "critic/rewards/mean", "rewards/mean", "reward/all/mean"),
        how="record reward",
    ),
    "true_reward": Reading(
        ("true_reward_mean", "eval_reward", "eval/reward", "val_reward", "val/reward", "eval_reward_mean"),
        how="log a held-out or verified reward as the metric eval_reward",
    ),
    "entropy": Reading(("entropy_mean", "entropy", "actor/entropy", "entropy/all/mean"), how="record entropy"),
    "grad_norm": Reading(
        ("grad_norm", "actor/grad_norm", "actor_grad_norm", "optim/grad_norm"), how="record grad_norm, before clipping"
    ),
    "length": Reading(
        ("length_mean", "completions/mean_length", "response_length/mean", "len_mean", "completion_length"),
        how="record the tokens, or log the mean length of completions",
    ),
    "truncated": Reading(
        ("truncated_fraction", "completions/clipped_ratio", "response_length/clip_ratio", "trunc"),
        how="record which sequences were truncated",
    ),
    "dead_groups": Reading(
        ("frac_reward_zero_std", "zero_std"),
        of=_share,
        parts=("zero_std_groups", "n_groups"),
        how="record reward and group_id of every sequence",
    ),
    "loss": Reading(("loss", "actor/pg_loss", "policy_loss"), how="record loss"),
    "lr": Reading(("lr", "learning_rate", "actor/lr"), how="log lr in metrics"),
    "kl_reference": Reading(
        ("kl", "objective/kl", "actor/kl_loss", "actor/reward_kl_penalty", "kl_loss"),
        how="train with a reference policy (TRL: beta > 0; verl: use_kl_loss) and log its KL",
    ),
    "kl_policy": Reading(
        ("kl_old_new_k3", "ppo_kl", "actor/ppo_kl", "kl_old_new_k1", "policy/approxkl_avg", "approx_kl"), how=_RATIO
    ),
    "clip_fraction": Reading(
        ("clip_region", "clip_ratio/region_mean", "clip_ratio", "actor/pg_clipfrac", "policy/clipfrac_avg"),
        of=_sum,
        parts=("clip_fraction_low", "clip_fraction_high"),
        how=_RATIO,
    ),
    "log_ratio_spread": Reading(("log_ratio_std",), how=_RATIO),
    "log_ratio_extreme": Reading(of=_largest, parts=("log_ratio_min", "log_ratio_max"), how=_RATIO),
    "contraction": Reading(of=_negative, parts=("log_ratio_p001_adv_neg",), how=_RATIO),
    "expansion": Reading(("log_ratio_p999_adv_pos",), how=_RATIO),
    "k_hat": Reading(("k_hat",), how=_RATIO),
    "clip_low": Reading(("clip_fraction_low", "clip_ratio/low_mean", "clip_low"), how=_RATIO),
    "clip_high": Reading(("clip_fraction_high", "clip_ratio/high_mean", "clip_high"), how=_RATIO),
    "layer_gradient": Reading(("layer_gradient",), how="record gradient_norms, by layer"),
    "repetition": Reading(
        ("mhpo/repetition_fraction", "repetition", "repetition_rate"), how="record token_id of every token"
    ),
    "ess": Reading(("ess_fraction",), how=_RATIO),
    "hazard": Reading(("hazard_mean",), how="train with an objective that has a hazard (mhpo)"),
    "restoring_lost": Reading(("restoring_lost_fraction",), how=_RATIO),
    "gradient_share": Reading(("logit_grad_norm_top1_share",), how=_RATIO),
    "token_gradient": Reading(("logit_grad_norm_max",), how=_RATIO),
    "mismatch_largest": Reading(
        ("lpdiff_max", "sampling/sampling_logp_difference/max", "training/rollout_probs_diff_max"),
        of=_largest,
        parts=("mismatch_min", "mismatch_max"),
        how=_ROLLOUT,
    ),
    "mismatch_kl": Reading(
        ("kl_rollout_old_k3", "rollout_corr/k3_kl", "mismatch_kl/all/mean", "gen_kl_error", "rollout_corr/kl"),
        how=_ROLLOUT,
    ),
    "mismatch_mean": Reading(
        ("lpdiff_mean", "sampling/sampling_logp_difference/mean", "training/rollout_probs_diff_mean"), how=_ROLLOUT
    ),
    "importance_mean": Reading(
        ("is_mean", "sampling/importance_sampling_ratio/mean", "rollout_corr/rollout_is_mean", "tis_mean"), how=_ROLLOUT
    ),
    "nonfinite_tokens": Reading(("nonfinite_count",), how=_RATIO),
    "impossible_tokens": Reading(("impossible_count",), how=_RATIO),
}
"""Name → reading; the names of signals and rules refer to these."""


NAMES = frozenset(name for reading in READINGS.values() for name in (*reading.names, *reading.parts))
"""Every column and metric that a reading may come from."""


def readings_of(scalars: Scalars) -> dict[str, float]:
    """The readings that a step has; NaN and ±Inf are values, None is none.

    Args:
        scalars: columns of `steps` and metrics of the trainer, by name.
    """
    plain = {_plain(name): value for name, value in scalars.items()} | dict(scalars)
    found = {name: reading.value(plain) for name, reading in READINGS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _plain(name: str) -> str:
    return next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)
