"""The signals that are watched, by family; a new one is a line in its family's file."""

from mhpo_core.alarms.signals import (
    concentration,
    divergence,
    entropy,
    gradient,
    groups,
    length,
    mismatch,
    ratio,
    reward,
)
from mhpo_core.alarms.signals.base import Family, Signal

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        mismatch.FAMILY,
        ratio.FAMILY,
        concentration.FAMILY,
        divergence.FAMILY,
        entropy.FAMILY,
        gradient.FAMILY,
        length.FAMILY,
        groups.FAMILY,
        reward.FAMILY,
    )
}
SIGNALS: dict[str, Signal] = {s.name: s for family in FAMILIES.values() for s in family.signals}

__all__ = ["FAMILIES", "SIGNALS", "Family", "Signal"]
