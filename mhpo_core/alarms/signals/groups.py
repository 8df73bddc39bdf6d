"""Groups whose rewards are all equal teach nothing."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, linear

FAMILY = Family(
    "groups",
    weight=0.6,
    label="dead groups",
    signals=(
        Signal(
            "dead_groups",
            "groups",
            "groups with equal rewards",
            "dead_groups",
            scale=linear,
            floor=0.15,
            healthy="anything where the task is easy and the groups are small: above 0.9 in 80 % of healthy runs",
            source="186 public runs; DAPO, arXiv 2503.14476",
        ),
    ),
)
