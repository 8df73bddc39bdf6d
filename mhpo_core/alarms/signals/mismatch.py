"""Sampler and trainer disagree about the tokens that were sampled: logp_old − logp_rollout."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, distance_from_one, log_from

_NAME = "mismatch"
FAMILY = Family(
    _NAME,
    weight=1.3,
    label="engine mismatch",
    signals=(
        Signal(
            "mismatch_largest",
            _NAME,
            "largest difference of log-probabilities between sampler and trainer",
            "mismatch_largest",
            scale=log_from(1e-3),
            floor=0.25,
            healthy="below 1 nat in small batches; its trend counts, not one spike",
            source="0 of 13 healthy runs of 186 public ones pass 5 nats; NVIDIA-NeMo/RL docs/guides/grpo.md",
        ),
        Signal(
            "mismatch_mean",
            _NAME,
            "mean difference of log-probabilities between sampler and trainer",
            "mismatch_mean",
            scale=log_from(1e-5),
            floor=0.25,
            healthy="below 0.02 nats",
            source="NVIDIA-NeMo/RL docs/guides/grpo.md: an upward trend past 1 to 2 % is a problem",
        ),
        Signal(
            "mismatch_kl",
            _NAME,
            "KL(rollout‖old)",
            "mismatch_kl",
            scale=log_from(1e-5),
            floor=0.4,
            healthy="1e-5 to 1e-3 for dense models, up to 1e-1 for mixtures of experts",
            source="IcePop: training fails beyond 0.05; Miles/SGLang: bands of dense and MoE models",
        ),
        Signal(
            "importance_mean",
            _NAME,
            "distance of the mean importance weight from 1",
            "importance_mean",
            scale=distance_from_one,
            floor=0.15,
            healthy="mean weight between 0.5 and 2",
            source="verl docs/algo/rollout_corr.md",
        ),
    ),
)
