"""A run that was called critical and has not come back."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from mhpo_core.alarms.rules.base import CRITICAL, Finding, State


class Unrecovered:
    """The reward stays down after a critical alarm; baselines follow what they see and would fall silent."""

    name = "unrecovered"
    about = "the reward has not come back since a critical alarm"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """The mean of three rewards, `remind` rows after the newest critical alarm."""
        s, last = state.settings, state.critical
        if last is None or "reward" not in state.readings or not state.reward.full:
            return
        kept = state.reward.kept(fmean(state.reward.recent))
        if state.row - last.row >= s.remind and kept < s.recovered:
            yield Finding(
                self.name, CRITICAL,
                f"the reward is at {kept:.0%} of its best, {state.row - last.row} logged steps after {last.id}", kept,
                s.recovered, ("reward_fall",), mode=last.mode, onset_step=last.onset_step,
            )  # fmt: skip
