"""Distance from the reference policy. Many runs have none; spikes of its estimators are common and often harmless."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, log_from

FAMILY = Family(
    "divergence",
    weight=0.5,
    label="divergence from the reference",
    signals=(
        Signal(
            "kl_reference",
            "divergence",
            "KL to the reference policy",
            "kl_reference",
            scale=log_from(1e-3),
            floor=0.5,
            healthy="rises slowly while the reward does; above 1 in 19 % of healthy runs",
            source="186 public runs; Gao et al., arXiv 2210.10760",
        ),
    ),
)
