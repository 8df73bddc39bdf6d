"""A few tokens hold the whole update: the mean over the batch says little then, and its variance is large."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, linear_from, log_from

_NAME = "concentration"
FAMILY = Family(
    _NAME,
    weight=1.2,
    label="concentration on few tokens",
    signals=(
        Signal(
            "gradient_share",
            _NAME,
            "gradient held by the top 1 % of tokens",
            "gradient_share",
            scale=linear_from(0.2),
            floor=0.05,
            lagged=True,
            healthy="steady: outliers hold all of it when the ratios have a heavy tail",
            source="DPPO, arXiv 2602.04879",
        ),
        Signal(
            "token_gradient",
            _NAME,
            "largest token gradient norm",
            "token_gradient",
            scale=log_from(1e-6),
            floor=0.5,
            lagged=True,
            healthy="steady",
            source="arXiv 2603.16929",
        ),
    ),
)
