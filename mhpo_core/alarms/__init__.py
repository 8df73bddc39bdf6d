"""Collapse alarms: summaries of steps in, findings out. Pure: it reads no store and starts no thread."""

from mhpo_core.alarms.engine import Alarm, AlarmEngine, Evaluation
from mhpo_core.alarms.modes import MODES, Mode
from mhpo_core.alarms.rules import CRITICAL, WARNING
from mhpo_core.alarms.settings import Settings

__all__ = ["CRITICAL", "MODES", "WARNING", "Alarm", "AlarmEngine", "Evaluation", "Mode", "Settings"]
