"""Every threshold of the engine in one place, so that a back-test can move any of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mhpo_core.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Thresholds, in rows where they count time: a row is one logged step.

    Args:
        window: rows of the baseline, from which median and spread are taken.
        warm_up: values a signal must have had before it is judged by its baseline.
        drift: robust standard deviations per row that the cumulative sum forgives, k of a CUSUM.
        cap: largest contribution of one row, so that a single spike cannot raise it.
        ceiling: largest cumulative sum, so that it falls again in bounded time.
        warning: cumulative sum of one signal that is a warning, h of a CUSUM.
        full: cumulative sum at which a family counts with its whole weight.
        excess: how often its weight a family may count at most.
        memory: rows for which what a family showed still counts.
        critical: fused score that is critical.
        leading: cumulative sum that one family must reach for fusion.
        second: cumulative sum that a second family must reach.
        clear: quiet rows after which a rule may raise again.
        mismatch_largest: largest |logp_old − logp_rollout| of any token, nats, beyond which the engines disagree.
        importance_bound: mean importance weight outside [1/b, b] in two of three rows; outside [1/b², b²] in one.
        entropy_factor: entropy above so many times its recent median, and above `entropy_floor` nats, in two of three.
        entropy_floor: nats.
        gradient_factor: gradient norm above so many times its median in three of five rows.
        cold_rows: first rows, in which no baseline exists and absolute bounds stand in for it.
        cold_kl: KL to the reference, nats, that is critical in those rows.
        truncated: share of truncated completions over three rows, where the median was at most half of it.
        reward_kept: share of the best reward that is left, with `truncated` or `proxy_kept`.
        proxy_kept: share of its best that the reward must keep while the held-out one falls to `reward_kept`.
        dead_reward: share of the best reward below which, with `dead_groups`, a run is dead.
        dead_groups: share of groups with equal rewards, three rows in a row.
        entropy_left: share of its first entropy below which, with `reward_kept` and `dead_half`, it is spent.
        dead_half: share of groups with equal rewards, on average over twenty rows.
        remind: rows after which a critical alarm is said again, while its rule holds or the run has not come back.
        recovered: share of the reward before a critical alarm with which a run has come back.
        nonfinite_rows: rows of the last twenty with a NaN in the gradient norm that are critical; one is a warning.
        projected_mismatch: KL of sampler and trainer, nats, at which training has been seen to fail.
        projected_rows: rows to that point, along the slope, that are a warning.
    """

    window: int = 50
    warm_up: int = 6
    drift: float = 1.5
    cap: float = 8.0
    ceiling: float = 20.0
    warning: float = 8.0
    full: float = 8.0
    excess: float = 1.0
    memory: int = 8
    critical: float = 2.3
    leading: float = 4.0
    second: float = 3.0
    clear: int = 5
    mismatch_largest: float = 5.0
    importance_bound: float = 2.0
    entropy_factor: float = 4.0
    entropy_floor: float = 1.0
    gradient_factor: float = 30.0
    cold_rows: int = 10
    cold_kl: float = 2.0
    truncated: float = 0.85
    reward_kept: float = 0.7
    proxy_kept: float = 0.9
    dead_reward: float = 0.2
    dead_groups: float = 0.8
    entropy_left: float = 0.25
    dead_half: float = 0.5
    remind: int = 20
    recovered: float = 0.75
    nonfinite_rows: int = 3
    projected_mismatch: float = 0.05
    projected_rows: int = 50

    def changed(self, values: Mapping[str, float]) -> Settings:
        """These settings with some of them set.

        Raises:
            ConfigError: there is no such setting, or the value is not a finite number above 0.
        """
        known = {f.name: f.type for f in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(
                    f"alarms: got the setting {name!r}, allowed are {', '.join(known)}. Pick one of them."
                )
            if not (math.isfinite(value) and value > 0) or (known[name] == "int" and value != int(value)):
                raise ConfigError(
                    f"alarms: {name} is {value!r}, allowed are {'whole ' if known[name] == 'int' else ''}numbers above "
                    "0. Give one."
                )
        typed: dict[str, Any] = {n: int(v) if known[n] == "int" else float(v) for n, v in values.items()}
        return replace(self, **typed)
