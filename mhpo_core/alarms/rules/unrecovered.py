"""A run that was called critical and has not come back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from mhpo_core.alarms.rules.base import CRITICAL, Finding, State


class Unrecovered:
    """The reward stays down after a critical alarm; baselines follow what they see and would fall silent."""

    name = "unrecovered"
    about = "the reward has not come back since a critical alarm"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Every `remind` rows after the newest critical alarm."""
        last, kept = state.critical, recovered_share(state)
        if last is not None and kept < state.settings.recovered:
            yield Finding(
                self.name, CRITICAL,
                f"the reward is at {kept:.0%} of what it was, {state.row - last.row} logged steps after {last.id}",
                kept, state.settings.recovered, ("reward_fall",), mode=last.mode, onset_step=last.onset_step,
            )  # fmt: skip


def recovered_share(state: State) -> float:
    """Mean of three rewards over that before the critical alarm; NaN before `remind` rows, or where it is not known."""
    last = state.critical
    due = last is not None and state.row - last.row >= state.settings.remind
    if last is None or not due or "reward" not in state.readings or not state.reward.full:
        return math.nan
    return state.reward.kept(fmean(state.reward.recent), last.reward)
