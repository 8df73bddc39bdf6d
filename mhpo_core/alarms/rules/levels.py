"""Absolute bounds that real runs support; most of them only where the run's own past agrees."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mhpo_core.alarms.rules.base import CRITICAL, WARNING, Finding, State

_RECENT = 20  # rows of the median that a sudden change is compared with
_LONG = 200  # rows of a median that an explosion of a hundred steps does not move


def _repeated(state: State, reading: str, rows: int, needed: int, beyond: float) -> int | None:
    """First step of those beyond the bound, if this one is and so many of the last rows are."""
    hits = [(step, value) for step, value in state.last(reading, rows) if value > beyond]
    newest = state.last(reading, 1)
    if reading in state.readings and len(hits) >= needed and newest[0] == hits[-1]:
        return hits[0][0]
    return None


class MismatchLevel:
    """Sampler and trainer differ by so much that importance weights no longer correct it.

    Source: 0 of 13 healthy public runs that log it pass these bounds, 5 of 9 collapses do; verl rollout_corr.md.
    """

    name = "mismatch-level"
    about = "log-probabilities of sampler and trainer are nats apart, or the mean importance weight left [0.5, 2]"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Where the run has a past, the value must stand out from it too."""
        bound = state.settings.mismatch_largest
        value = state.readings.get("mismatch_largest", 0.0)
        if value > bound and not value <= 3 * state.typical("mismatch_largest", state.settings.window):
            yield Finding(
                self.name, CRITICAL,
                f"log-probabilities of sampler and trainer differ by up to {value:.3g} nats", value, bound,
                ("mismatch_largest",),
            )  # fmt: skip
        weight, limit = state.readings.get("importance_mean"), state.settings.importance_bound
        if weight is None or not math.isfinite(weight):
            return
        distances = [(s, abs(math.log(max(v, 1e-9)))) for s, v in state.last("importance_mean", 3) if math.isfinite(v)]
        beyond = [(s, d) for s, d in distances if d > math.log(limit)]
        usual = abs(math.log(max(state.typical("importance_mean", state.settings.window, 3), 1e-9)))
        stands_out = not usual > distances[-1][1] / 2
        far = distances[-1][1] > 2 * math.log(limit)
        if beyond and beyond[-1] == distances[-1] and stands_out and (far or len(beyond) >= 2):
            yield Finding(
                self.name, CRITICAL, f"mean importance weight of sampler and trainer is {weight:.3g}", weight, limit,
                ("importance_mean",), onset_step=beyond[0][0],
            )  # fmt: skip


class EntropyExplosion:
    """The policy turns to noise: entropy a multiple of its recent median, and not low in itself.

    Source: 0 of 30 healthy public runs that log entropy, 4 of 8 collapses.
    """

    name = "entropy-explosion"
    about = "entropy is a multiple of what it was, in two of three steps"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Two of the last three rows, this one among them."""
        s = state.settings
        usual = state.typical("entropy", _RECENT, 3)
        if math.isnan(usual):
            return
        bound = max(s.entropy_factor * usual, s.entropy_floor)
        onset = _repeated(state, "entropy", 3, 2, bound)
        if onset is not None:
            value = state.readings["entropy"]
            text = f"entropy is {value:.3g} nats, its median was {usual:.3g}"
            yield Finding(self.name, CRITICAL, text, value, bound, ("entropy_rise",), onset_step=onset)


class GradientExplosion:
    """The gradient norm stays orders of magnitude above what it was; single spikes are common and harmless."""

    name = "gradient-explosion"
    about = "gradient norm is far above its median in three of five steps"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Three of the last five rows, this one among them; zeros are dead steps and not in the median."""
        s = state.settings
        history = [v for _, v in state.last("grad_norm", _LONG + 5)[:-5] if 0 < v < math.inf]
        if len(history) < s.warm_up:
            return
        usual = sorted(history)[len(history) // 2]
        bound = s.gradient_factor * usual
        onset = _repeated(state, "grad_norm", 5, 3, bound)
        if onset is not None:
            value = state.readings["grad_norm"]
            text = f"gradient norm is {value:.3g}, its median was {usual:.3g}"
            yield Finding(self.name, CRITICAL, text, value, bound, ("grad_norm",), onset_step=onset)


class ColdDivergence:
    """The first updates wreck the policy; there is no baseline yet, so the bound is absolute."""

    name = "cold-divergence"
    about = "KL to the reference is large within the first steps"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """In the first `cold_rows` rows alone."""
        s, value = state.settings, state.readings.get("kl_reference")
        if value is not None and state.row < s.cold_rows and value > s.cold_kl:
            yield Finding(
                self.name, CRITICAL, f"KL to the reference is {value:.3g} nats after {state.row + 1} logged steps",
                value, s.cold_kl, mode="learning-rate", onset_step=state.past["kl_reference"][0][0],
            )  # fmt: skip


class ImpossibleTokens:
    """Log-probabilities above 0 or entropies below 0 come from a wrong kernel (verl issue 2656)."""

    name = "impossible-tokens"
    about = "log-probabilities above 0: a kernel computes them wrongly"

    def evaluate(self, state: State) -> Iterator[Finding]:
        """Any such token."""
        count = state.readings.get("impossible_tokens", 0.0)
        if count:
            yield Finding(
                self.name, WARNING, f"{count:.0f} tokens have an impossible log-probability or entropy", count, 0.0,
                mode="wrong-kernel",
            )  # fmt: skip
