"""The reward that trains and the one that is wanted part ways."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from mhpo_core.alarms.rules.base import CRITICAL, Finding, State


class ProxyDivergence:
    """The reward is near its best while the held-out or verified one has lost a good part of its own."""

    name = "proxy-divergence"
    about = "the reward that trains is at its best and the held-out one falls"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Means over three values of each."""
        s = state.settings
        if "true_reward" not in state.readings or not (state.true_reward.full and state.reward.full):
            return
        wanted = state.true_reward.kept(fmean(state.true_reward.recent))
        trained = state.reward.kept(fmean(state.reward.recent))
        if wanted < s.reward_kept and trained >= s.proxy_kept:
            yield Finding(
                self.name, CRITICAL,
                f"the reward is at {trained:.0%} of its best and the held-out reward at {wanted:.0%}", wanted,
                s.reward_kept, ("true_reward_fall",), mode="reward-hacking",
            )  # fmt: skip
