"""The gradient explodes, or a few tokens hold all of it. A norm of exactly 0 is a dead step, not a small gradient."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, linear, log_from, log_unless_zero

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
            "token_gradient",
            _NAME,
            "largest token gradient norm",
            "token_gradient",
            scale=log_from(1e-6),
            floor=0.5,
            healthy="steady",
            source="arXiv 2603.16929",
        ),
        Signal(
            "gradient_share",
            _NAME,
            "gradient held by the top 1 % of tokens",
            "gradient_share",
            scale=linear,
            floor=0.05,
            healthy="steady: outliers hold all of it when the ratios have a heavy tail",
            source="DPPO, arXiv 2602.04879",
        ),
    ),
)
