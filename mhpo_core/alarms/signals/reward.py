"""The reward falls. It is the effect, and so the last sign; its noise is measured against its own range."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, linear

FAMILY = Family(
    "reward",
    weight=1.0,
    label="reward",
    signals=(
        Signal(
            "reward_fall",
            "reward",
            "reward, falling",
            "reward",
            scale=linear,
            floor=1e-3,
            falling=True,
            healthy="dips below 65 % of its best and recovers in one healthy run of thirteen",
            source="186 public runs",
        ),
        Signal(
            "true_reward_fall",
            "reward",
            "held-out reward, falling",
            "true_reward",
            scale=linear,
            floor=1e-3,
            falling=True,
            healthy="rises with the reward that trains",
            source="Gao et al., arXiv 2210.10760",
        ),
    ),
)
