"""The alarm engine: one step after the other in, evaluations and alarms out.

It looks at no later step, so a live run and the stored one give the same alarms. A run that is rewound starts a new
engine, fed with the steps that still count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from mhpo_core.alarms.detector import Detector
from mhpo_core.alarms.modes import Sign, advice_for, mode_of
from mhpo_core.alarms.readings import readings_of
from mhpo_core.alarms.rules import (
    CRITICAL,
    RULES,
    WARNING,
    Finding,
    LastCritical,
    Rule,
    State,
    fused_score,
    recovered_share,
)
from mhpo_core.alarms.settings import Settings
from mhpo_core.alarms.signals import FAMILIES, SIGNALS, Signal

_REWARD_SPAN = 0.08  # a spread below this share of the reward's range is noise
_SIGN = 2.0  # cumulative sum from which a signal is named as evidence
_LR_FACTOR = 1.8
_LAYER_FACTOR = 3.0
_LAYERS = 5
_TOLD = 5  # signs that a message names; the evidence has all


@dataclass(frozen=True)
class Alarm:
    """One thing that a rule raised.

    Args:
        id: unique in a run.
        rule: which rule.
        mode: key of MODES.
        severity: "warning" or "critical".
        step: at which it could first be raised, knowing nothing later.
        onset_step: of its first sign.
        value, threshold: that were compared.
        message: one sentence.
        evidence: signs in order of their onsets, the last step before the first of them, and what collectors add.
        advice: what to do, with sources.
    """

    id: str
    rule: str
    mode: str
    severity: str
    step: int
    onset_step: int
    value: float
    threshold: float
    message: str
    evidence: dict[str, Any]
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As `mhpo check --json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """What the engine made of one step; every step has one, whether or not anything was raised.

    Args:
        level: "", "warning" or "critical": whether a rule holds now, newly raised or not.
        score: fused score of all families.
        signals: cumulative sum of every signal that has one.
        alarms: raised at this step.
        lasting: there was a critical alarm, and the reward has not come back since.
    """

    step: int
    level: str
    score: float
    signals: dict[str, float]
    alarms: tuple[Alarm, ...]
    lasting: bool = False


@dataclass
class _Raised:
    """When a rule last held, and when it has raised what since it began to."""

    row: int
    raised: dict[str, int] = field(default_factory=dict)


class AlarmEngine:
    """Watches one run.

    Args:
        settings: thresholds.
        updates_per_iteration: optimizer steps per batch of rollouts: as many steps belong together.
        rules: those that are evaluated.
    """

    def __init__(
        self, settings: Settings | None = None, updates_per_iteration: int = 1, rules: Iterable[Rule] = RULES
    ) -> None:
        self.settings = settings or Settings()
        self._rules = tuple(rules)
        updates = max(1, updates_per_iteration)
        detectors = {n: Detector(self.settings, s.floor, updates if s.lagged else 1) for n, s in SIGNALS.items()}
        self._state = State(self.settings, detectors=detectors)
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=self.settings.memory) for name in FAMILIES}
        self._lagged: dict[str, deque[float]] = {name: deque(maxlen=updates) for name, s in SIGNALS.items() if s.lagged}
        self._episodes: dict[str, _Raised] = {}
        self._steps: deque[int] = deque(maxlen=256)
        self._layers: dict[str, deque[float]] = {}

    @property
    def missing(self) -> dict[str, str]:
        """Signal that never had data → how to have it."""
        return {n: s.how for n, s in SIGNALS.items() if s.reading not in self._state.past}

    def observe(
        self, step: int, scalars: Mapping[str, float | None], layers: Mapping[str, float] | None = None
    ) -> Evaluation:
        """Take one step in.

        Args:
            step: later than those before it.
            scalars: columns of `steps` and the trainer's metrics; NaN and ±Inf are values, None and absence are none.
            layers: parameter group → gradient norm, to say which of them rose.
        """
        for name, norm in (layers or {}).items():
            self._layers.setdefault(name, deque(maxlen=self.settings.window)).append(norm)
        factors = [f for name in layers or {} if math.isfinite(f := self._layer_factor(name)[1])]
        if factors:
            scalars = {**scalars, "layer_gradient": max(factors)}
        state, readings = self._state, readings_of(scalars)
        state.remember(step, readings)
        self._steps.append(step)
        if "reward" in readings:
            state.reward.observe(readings["reward"])
            state.slow_reward.observe(readings["reward"])
        if "true_reward" in readings:
            state.true_reward.observe(readings["true_reward"])
        self._detect(step, readings)
        held: dict[str, Finding] = {}
        for finding in (f for rule in self._rules for f in rule.evaluate(state)):
            if finding.rule not in held or finding.severity == CRITICAL:
                held[finding.rule] = finding
        alarms = tuple(alarm for finding in held.values() for alarm in self._raise(finding))
        if recovered_share(state) >= self.settings.recovered:
            state.critical = None
        for alarm in (a for a in alarms if a.severity == CRITICAL):
            before = self._usual_reward() if state.critical is None else state.critical.reward
            state.critical = LastCritical(alarm.id, state.row, alarm.mode, alarm.onset_step, before)
        level = max((f.severity for f in held.values()), key=(WARNING, CRITICAL).index, default="")
        signals = {name: d.score for name, d in state.detectors.items() if d.score > 0}
        lasting = state.critical is not None and math.isfinite(state.critical.reward)
        return Evaluation(step, level, fused_score(state), signals, alarms, lasting)

    def _detect(self, step: int, readings: Mapping[str, float]) -> None:
        strongest = dict.fromkeys(FAMILIES, 0.0)
        spans = {"reward": self._state.reward.span, "true_reward": self._state.true_reward.span}
        for name, signal in SIGNALS.items():
            detector = self._state.detectors[name]
            if signal.reading in readings:
                floor = _REWARD_SPAN * spans.get(signal.reading, 0.0)
                detector.observe(step, self._judged(signal, readings[signal.reading]), floor)
            strongest[signal.family] = max(strongest[signal.family], detector.score * signal.weight)
        for family, value in strongest.items():
            self._recent[family].append(value)
            self._state.families[family] = max(self._recent[family])

    def _judged(self, signal: Signal, value: float) -> float:
        """The value on the signal's scale; the worst of one batch where it grows within a batch."""
        scaled = signal.transformed(value)
        if not signal.lagged or not math.isfinite(scaled):
            return scaled
        self._lagged[signal.name].append(scaled)
        return max(self._lagged[signal.name])

    def _raise(self, finding: Finding) -> Iterable[Alarm]:
        """The alarm if the rule did not hold lately, holds more severely now, or is critical for long."""
        row, episode = self._state.row, self._episodes.get(finding.rule)
        if episode is None or row - episode.row > self.settings.clear:
            episode = self._episodes[finding.rule] = _Raised(row)
        episode.row = row
        is_critical = finding.severity == CRITICAL
        told = [at for severity, at in episode.raised.items() if severity == CRITICAL or not is_critical]
        if told and not (is_critical and row - max(told) >= self.settings.remind):
            return
        episode.raised[finding.severity] = row
        yield self._alarm(finding)

    def _alarm(self, finding: Finding) -> Alarm:
        step, signs = self._state.step, self._signs(finding)
        onsets = [s.onset_step for s in signs]
        onset = finding.onset_step if finding.onset_step is not None else min(onsets, default=step)
        first = min([onset, *onsets])
        mode = finding.mode or mode_of(signs, self._lr_jumped())
        before = [s for s in self._steps if s < first]
        evidence = {
            "signs": [asdict(s) for s in signs],
            "last_good_step": before[-1] if before else None,
            "score": fused_score(self._state),
            "layers": self._risen_layers(),
        }
        order = ", ".join(f"{s.label} from {s.onset_step}" for s in signs[:_TOLD])
        message = f"Step {step}: {finding.message}." + (f" In order: {order}." if len(signs) > 1 else "")
        return Alarm(
            f"{finding.rule}@{step}", finding.rule, mode, finding.severity, step, onset, finding.value,
            finding.threshold, message, evidence, advice_for(mode),
        )  # fmt: skip

    def _signs(self, finding: Finding) -> list[Sign]:
        """The signals that the finding rests on and all others that have risen, in order of their onsets."""
        found = []
        for name, detector in self._state.detectors.items():
            newest = self._state.last(SIGNALS[name].reading, 1)
            named = name in finding.signals and newest
            if not newest or not (named or detector.score >= _SIGN):
                continue
            signal = SIGNALS[name]
            onset = detector.onset if detector.onset is not None else self._state.step
            if named and detector.onset is None and finding.onset_step is not None:
                onset = finding.onset_step
            found.append(
                Sign(name, signal.family, signal.label, onset, newest[0][1], self._usual(name), detector.score)
            )
        return sorted(found, key=lambda s: (s.onset_step, -s.score))

    def _risen_layers(self) -> list[dict[str, Any]]:
        """Parameter groups whose gradient norm stands out from its own past most, or is not finite."""
        found: list[dict[str, Any]] = []
        for name, norms in self._layers.items():
            usual, factor = self._layer_factor(name)
            if not math.isfinite(norms[-1]) or factor >= _LAYER_FACTOR:
                found.append({"layer": name, "grad_norm": norms[-1], "usual": usual, "factor": factor})
        found.sort(key=lambda row: -row["factor"] if math.isfinite(row["factor"]) else -math.inf)
        return found[:_LAYERS]

    def _layer_factor(self, name: str) -> tuple[float, float]:
        """Median of the norms before, and the newest one over it; NaN where there is none."""
        norms = list(self._layers[name])
        before = [v for v in norms[:-1] if math.isfinite(v)]
        usual = median(before) if before else math.nan
        return usual, norms[-1] / usual if usual > 0 else math.nan

    def _usual_reward(self) -> float:
        return self._state.typical("reward", self.settings.window)

    def _usual(self, name: str) -> float:
        return self._state.typical(SIGNALS[name].reading, self.settings.window)

    def _lr_jumped(self) -> bool:
        rates = [v for _, v in self._state.last("lr", self.settings.window) if 0 < v < math.inf]
        return any(b > _LR_FACTOR * a for a, b in zip(rates, rates[1:], strict=False))
