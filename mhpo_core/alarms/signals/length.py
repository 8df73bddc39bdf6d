"""Responses grow until they are cut off, or shrink to nothing."""

from __future__ import annotations

from mhpo_core.alarms.signals.base import Family, Signal, linear, log_from

_NAME = "length"
FAMILY = Family(
    _NAME,
    weight=1.2,
    label="length",
    signals=(
        Signal(
            "length_growth",
            _NAME,
            "response length, growing",
            "length",
            scale=log_from(1),
            floor=0.2,
            healthy="grows slowly with the reward",
            source="DAPO, arXiv 2503.14476",
        ),
        Signal(
            "length_shrinkage",
            _NAME,
            "response length, shrinking",
            "length",
            scale=log_from(1),
            floor=0.25,
            falling=True,
            healthy="shrinks slowly with the reward",
            source="186 public runs: 53 → 2.5 tokens within 20 steps",
        ),
        Signal(
            "truncation",
            _NAME,
            "truncated completions",
            "truncated",
            scale=linear,
            floor=0.1,
            healthy="below 0.3, or high from the first step on",
            source="65 % of healthy public runs pass 0.3",
        ),
        Signal(
            "repetition",
            _NAME,
            "tokens that repeat four in a row which the completion had before",
            "repetition",
            scale=linear,
            floor=0.05,
            healthy="steady; loops grow just before completions are cut off",
            source="MiniMax-M1 stops such completions, arXiv 2506.13585",
        ),
    ),
)
