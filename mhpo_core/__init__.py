"""Ratio-control objectives, their telemetry and a training loop that emits it."""

from mhpo_core import objectives
from mhpo_core.advantages import group_advantages
from mhpo_core.batch import Sequences, TokenBatch, concatenate
from mhpo_core.errors import MhpoError

__all__ = ["MhpoError", "Sequences", "TokenBatch", "concatenate", "group_advantages", "objectives"]
