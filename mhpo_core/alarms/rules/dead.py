"""Runs that are over, or as good as: nothing is learned any more. No lead time, but a dead run is never missed."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median

from mhpo_core.alarms.rules.base import CRITICAL, SLOW, Finding, State

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


class EntropySpent:
    """The policy has become certain of answers that are worth less than what it gave before, and little is explored.

    Source: 0 of 67 healthy public runs, 0 of 24 healthy runs of the training core; arXiv 2505.22617.
    """

    name = "entropy-spent"
    about = "entropy is a quarter of what it was, the reward fades and half of the groups teach nothing"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Medians and means over twenty rows, from sixty on."""
        s = state.settings
        entropies, dead = state.last("entropy", SLOW), state.last("dead_groups", SLOW)
        if state.row < 3 * SLOW or not state.slow_reward.full or len(entropies) < SLOW or len(dead) < SLOW:
            return
        entropy, before = median(v for _, v in entropies), state.first_entropy()
        kept = state.slow_reward.kept(fmean(state.slow_reward.recent))
        share = fmean(v for _, v in dead)
        if entropy < s.entropy_left * before and kept < s.reward_kept and share >= s.dead_half:
            yield Finding(
                self.name, CRITICAL,
                f"entropy is {entropy:.3g} nats, {before:.3g} at the start, the reward is at {kept:.0%} of its best "
                f"and {share:.0%} of the groups teach nothing", entropy, s.entropy_left * before,
                ("entropy_fall", "reward_fall", "dead_groups"), mode="mode-collapse", onset_step=entropies[0][0],
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
