"""The rules, each a way in which a run can be seen to fail; a new one is a class and an entry here."""

from mhpo_core.alarms.rules.base import CRITICAL, WARNING, Finding, LastCritical, Reward, Rule, State
from mhpo_core.alarms.rules.dead import DeadRun, EntropySpent, Saturated
from mhpo_core.alarms.rules.fusion import Fusion, SingleSignal, fused_score
from mhpo_core.alarms.rules.hacking import ProxyDivergence
from mhpo_core.alarms.rules.levels import (
    ColdDivergence,
    EntropyExplosion,
    GradientExplosion,
    ImpossibleTokens,
    MismatchLevel,
)
from mhpo_core.alarms.rules.nonfinite import NonFinite
from mhpo_core.alarms.rules.trend import MismatchProjection
from mhpo_core.alarms.rules.unrecovered import Unrecovered, recovered_share

RULES: tuple[Rule, ...] = (
    NonFinite(), MismatchLevel(), EntropyExplosion(), GradientExplosion(), ColdDivergence(), Saturated(),
    ProxyDivergence(), Fusion(), DeadRun(), EntropySpent(), Unrecovered(),
    MismatchProjection(), ImpossibleTokens(), SingleSignal(),
)  # fmt: skip

__all__ = [
    "CRITICAL",
    "RULES",
    "WARNING",
    "Finding",
    "LastCritical",
    "Reward",
    "Rule",
    "State",
    "fused_score",
    "recovered_share",
]
