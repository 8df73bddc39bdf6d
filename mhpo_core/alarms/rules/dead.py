"""Runs that are over, or as good as: nothing is learned any more. No lead time, but a dead run is never missed."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from mhpo_core.alarms.rules.base import CRITICAL, Finding, State

_ROWS = 3


class DeadRun:
    """The reward is gone and nearly every group has equal rewards, so that nothing pulls it back."""

    name = "dead-run"
    about = "reward lost and no group left that could teach"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Three rows in a row."""
        s = state.settings
        rewards, dead = state.last("reward", _ROWS), state.last("dead_groups", _ROWS)
        if "reward" not in state.readings or len(rewards) < _ROWS or len(dead) < _ROWS:
            return
        kept = [state.reward.kept(value) for _, value in rewards]
        if all(k < s.dead_reward for k in kept) and all(v >= s.dead_groups for _, v in dead):
            yield Finding(
                self.name, CRITICAL,
                f"reward is {rewards[-1][1]:.3g}, {kept[-1]:.0%} of its best, and {dead[-1][1]:.0%} of the groups "
                "teach nothing", kept[-1], s.dead_reward, ("reward_fall", "dead_groups"), onset_step=rewards[0][0],
            )  # fmt: skip


class Saturated:
    """Nearly every completion is cut off, which was not so before, and the reward falls for it."""

    name = "truncation-saturated"
    about = "nearly all completions are truncated and the reward falls"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Means over three rows."""
        s = state.settings
        cut, rewards = state.last("truncated", _ROWS), list(state.reward.recent)
        if "truncated" not in state.readings or len(cut) < _ROWS or len(rewards) < _ROWS:
            return
        share, kept = fmean(v for _, v in cut), state.reward.kept(fmean(rewards))
        usual = state.typical("truncated", s.window, _ROWS)
        if share >= s.truncated and usual <= s.truncated / 2 and kept < s.reward_kept:
            yield Finding(
                self.name, CRITICAL,
                f"{share:.0%} of the completions are truncated and the reward is at {kept:.0%} of its best", share,
                s.truncated, ("truncation", "length_growth", "reward_fall"),
            )  # fmt: skip
