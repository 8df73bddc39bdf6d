"""The policy becomes random, or certain. A fall is normal while the reward is near its best."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, log_from

FAMILY = Family(
    "entropy",
    weight=1.0,
    label="entropy",
    signals=(
        Signal(
            "entropy_rise",
            "entropy",
            "entropy, rising",
            "entropy",
            scale=log_from(0.02),
            floor=0.25,
            healthy="falls slowly as the policy learns; a rise above twice its start in 19 % of healthy runs",
            source="186 public runs; INTELLECT-2, arXiv 2505.07291",
        ),
        Signal(
            "entropy_fall",
            "entropy",
            "entropy, falling",
            "entropy",
            scale=log_from(1e-4),
            floor=0.35,
            falling=True,
            weight=0,
            healthy="below 0.1 nats in 52 % of healthy runs: it says which collapse, not that there is one",
            source="186 public runs; arXiv 2505.22617: the reward saturates as entropy is spent",
        ),
    ),
)
