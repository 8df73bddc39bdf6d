"""Labels by rule, from the numbers alone.

A run has collapsed if one of two things holds until its end:
- reward: the mean of the task's reward over the last 10 iterations is below half of the largest such mean before it;
- dead: no optimizer step is taken any more, because loss or gradient norm is not finite, for at least 10 iterations.
The onset is the first step of the first iteration from which on that is so. What a fault did is no part of the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 10  # iterations
COLLAPSED, HEALTHY, SURVIVED = "collapsed", "healthy", "survived"


@dataclass(frozen=True)
class Label:
    """What the rule says of a run.

    Args:
        label: collapsed; healthy; or survived = a cause of collapse that led to none, in no score.
        onset_step: optimizer step, None unless collapsed.
        reason: in words.
        peak: largest mean reward of 10 iterations.
        end: mean reward of the last 10 iterations.
    """

    label: str
    onset_step: int | None
    reason: str
    peak: float
    end: float


def label(reward: NDArray[np.float64], step_taken: NDArray[np.bool_], faulty: bool) -> Label:
    """Judge a run.

    Args:
        reward: the task's mean reward of each iteration, at least 10.
        step_taken: for each optimizer step, whether its loss and gradient norm were finite; a whole number of steps
            per iteration.
        faulty: it was given a cause of collapse.
    """
    updates = len(step_taken) // len(reward)
    means = moving_mean(reward)
    low = below_half_until_the_end(means)
    dead = len(step_taken) - trailing(~step_taken)
    onsets = []
    if low is not None:
        onsets.append(((low + WINDOW - 1) * updates, "reward"))
    if len(step_taken) - dead >= WINDOW * updates:
        onsets.append((dead, "dead"))
    peak, end = float(means.max()), float(means[-1])
    if not onsets:
        words = f"mean reward of 10 iterations {end:.2f} at the end, {peak:.2f} at its peak"
        return Label(SURVIVED if faulty else HEALTHY, None, words, peak, end)
    onset, which = min(onsets)
    words = {
        "reward": f"mean reward of 10 iterations stays below half of its peak of {peak:.2f}; {end:.2f} at the end",
        "dead": "no step is finite any more",
    }[which]
    return Label(COLLAPSED, onset, words, peak, end)


def moving_mean(reward: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each 10 neighbouring iterations; entry i ends with iteration i + 9."""
    return np.convolve(reward, np.full(WINDOW, 1 / WINDOW), mode="valid")


def below_half_until_the_end(means: NDArray[np.float64]) -> int | None:
    """First index from which on every mean is below half of the largest one, which then lies before it; or None."""
    count = trailing(means < means.max() / 2)
    return len(means) - count if count else None


def trailing(flags: NDArray[np.bool_]) -> int:
    """How many of the last flags are all True."""
    return len(flags) if flags.all() else int(np.argmin(flags[::-1]))
