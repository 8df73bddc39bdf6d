"""The gradient explodes. A norm of exactly 0 is a dead step, not a small gradient."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, log_from, log_unless_zero

_NAME = "gradient"
FAMILY = Family(
    _NAME,
    weight=0.7,
    label="gradient",
    signals=(
        Signal(
            "grad_norm",
            _NAME,
            "global gradient norm before clipping",
            "grad_norm",
            scale=log_unless_zero,
            floor=0.5,
            healthy="isolated spikes are common and harmless; a trend on a log scale is not",
            source="TRL issue 2980; 24 % of healthy public runs pass ten times the median",
        ),
        Signal(
            "layer_gradient",
            _NAME,
            "largest rise of a layer's gradient over its own median",
            "layer_gradient",
            scale=log_from(0.1),
            floor=0.5,
            healthy="below 3; one layer far above the others' factor shows where it begins",
            source="norms per parameter group, before clipping",
        ),
    ),
)
