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
        of: computes it from several columns; asked before the names.
        how: what a user sets to have it.
    """

    names: tuple[str, ...] = ()
    of: Callable[[Scalars], float | None] | None = None
    how: str = ""


def _largest(*names: str) -> Callable[[Scalars], float | None]:
    """The largest absolute value of the columns; NaN if one is NaN."""

    def value(scalars: Scalars) -> float | None:
        found = [abs(v) for v in (scalars.get(n) for n in names) if v is not None]
        if any(math.isnan(v) for v in found):
            return math.nan
        return max(found, default=None)

    return value


def _sum(*names: str) -> Callable[[Scalars], float | None]:
    def value(scalars: Scalars) -> float | None:
        found = [v for v in (scalars.get(n) for n in names) if v is not None]
        return sum(found) if found else None

    return value


def _dead_share(scalars: Scalars) -> float | None:
    dead, groups = scalars.get("zero_std_groups"), scalars.get("n_groups")
    return dead / groups if dead is not None and groups else None


def _negated(name: str) -> Callable[[Scalars], float | None]:
    def value(scalars: Scalars) -> float | None:
        found = scalars.get(name)
        return None if found is None else -found

    return value


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
        ("frac_reward_zero_std", "zero_std"), of=_dead_share, how="record reward and group_id of every sequence"
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
        of=_sum("clip_fraction_low", "clip_fraction_high"),
        how=_RATIO,
    ),
    "log_ratio_spread": Reading(("log_ratio_std",), how=_RATIO),
    "log_ratio_extreme": Reading(of=_largest("log_ratio_min", "log_ratio_max"), how=_RATIO),
    "contraction": Reading(of=_negated("log_ratio_p001_adv_neg"), how=_RATIO),
    "expansion": Reading(("log_ratio_p999_adv_pos",), how=_RATIO),
    "ess": Reading(("ess_fraction",), how=_RATIO),
    "hazard": Reading(("hazard_mean",), how="train with an objective that has a hazard (mhpo)"),
    "restoring_lost": Reading(("restoring_lost_fraction",), how=_RATIO),
    "gradient_share": Reading(("logit_grad_norm_top1_share",), how=_RATIO),
    "token_gradient": Reading(("logit_grad_norm_max",), how=_RATIO),
    "mismatch_largest": Reading(
        ("lpdiff_max", "sampling/sampling_logp_difference/max", "training/rollout_probs_diff_max"),
        of=_largest("mismatch_min", "mismatch_max"),
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


def readings_of(scalars: Scalars) -> dict[str, float]:
    """The readings that a step has; NaN and ±Inf are values, None is none.

    Args:
        scalars: columns of `steps` and metrics of the trainer, by name.
    """
    plain = {_plain(name): value for name, value in scalars.items()} | dict(scalars)
    found: dict[str, float] = {}
    for name, reading in READINGS.items():
        value = reading.of(plain) if reading.of else None
        if value is None:
            value = next((plain[n] for n in reading.names if plain.get(n) is not None), None)
        if value is not None:
            found[name] = float(value)
    return found


def _plain(name: str) -> str:
    return next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)
