"""What may be done to a run from outside while it trains, for instance because of an alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mhpo_core.errors import ConfigError

STOP, CHECKPOINT, LOWER_LR = "stop", "checkpoint", "lower-lr"
ACTIONS = (STOP, CHECKPOINT, LOWER_LR)
LR_FACTOR = 0.5


@dataclass(frozen=True)
class Intervention:
    """One thing that is asked of the trainer.

    Args:
        action: "stop" ends the run cleanly; "checkpoint" saves one aside when the iteration ends; "lower-lr" halves
            the learning rate of all later steps.
        reason: why, as the run's event says it.

    Raises:
        ConfigError: there is no such action.
    """

    action: str
    reason: str

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(
                f"Intervention: action is {self.action!r}, allowed are {', '.join(ACTIONS)}. Give one of them."
            )


Intervene = Callable[[], Intervention | None]
"""Asked before every optimizer step; must return at once, and each intervention only once."""
