"""Evidence of several families together: each alone rises in many healthy runs, two or more at once seldom do."""

from __future__ import annotations

from collections.abc import Iterator

from mhpo_core.alarms.rules.base import CRITICAL, WARNING, Finding, State
from mhpo_core.alarms.signals import FAMILIES, SIGNALS

_COUNTS = 2.0  # cumulative sum below which a family counts for nothing


class Fusion:
    """Σ over families of weight · min(cumulative sum / full, excess)."""

    name = "several-signs"
    about = "several families of signals have left their past together"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Critical where the sum is, one family leads and a second one follows."""
        s = state.settings
        score = fused_score(state)
        ranked = sorted(state.families.items(), key=lambda item: -item[1])
        if score < s.critical or len(ranked) < 2 or ranked[0][1] < s.leading or ranked[1][1] < s.second:
            return
        active = [name for name, value in ranked if value >= _COUNTS]
        now = [d.score for d in state.detectors.values()]
        if max(now, default=0.0) < _COUNTS:
            return
        labels = [FAMILIES[name].label for name in active]
        yield Finding(
            self.name, CRITICAL, f"{', '.join(labels[:-1])} and {labels[-1]} have left their usual range together",
            score, s.critical, tuple(n for n in state.detectors if SIGNALS[n].family in active and risen(state, n)),
        )  # fmt: skip


class SingleSignal:
    """One signal alone: worth a look, and in many healthy runs harmless."""

    name = "one-sign"
    about = "one signal has left its past"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """A warning for each signal above `warning`."""
        for name, detector in state.detectors.items():
            if detector.score >= state.settings.warning and SIGNALS[name].weight:
                value = state.last(SIGNALS[name].reading, 1)[-1][1]
                yield Finding(
                    f"{self.name}:{name}", WARNING, f"{SIGNALS[name].label}: {value:.3g}, unlike its past",
                    detector.score, state.settings.warning, (name,),
                )  # fmt: skip


def fused_score(state: State) -> float:
    """The sum over families, 0 where nothing has risen."""
    s = state.settings
    return sum(
        FAMILIES[name].weight * min(value / s.full, s.excess)
        for name, value in state.families.items()
        if value >= _COUNTS
    )


def risen(state: State, signal: str) -> bool:
    """True if the signal itself has risen."""
    return state.detectors[signal].score >= _COUNTS
