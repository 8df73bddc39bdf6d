"""Range checks of hyperparameters; each raises one sentence with what was given and what is allowed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mhpo_core.errors import ObjectiveError

if TYPE_CHECKING:
    from mhpo_core.objectives.base import Objective


def is_number(value: object) -> bool:
    """True for a Python int or float, NaN and ±Inf too; False for a bool, which is an int to Python only."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_number(objective: Objective, name: str, *, low: float = -math.inf, above: float = -math.inf) -> None:
    """Raise ObjectiveError unless the hyperparameter is finite, ≥ low and > above."""
    value = getattr(objective, name)
    if is_number(value) and math.isfinite(value) and low <= value and above < value:
        return
    bounds = [f"{sign} {limit:g}" for sign, limit in (("≥", low), (">", above)) if math.isfinite(limit)]
    raise ObjectiveError(
        f"{objective.name}: {name} = {value!r}, allowed are finite numbers{' ' if bounds else ''}"
        f"{' and '.join(bounds)}. Change it in [objective]."
    )


def require_positive(objective: Objective, *names: str) -> None:
    """Raise ObjectiveError unless the named hyperparameters are finite and > 0."""
    for name in names:
        require_number(objective, name, above=0)


def require_ratio_range(objective: Objective, low_name: str, high_name: str) -> None:
    """Raise ObjectiveError unless low ≤ high, both finite and high > 0; None, or a low ≤ 0, is no bound."""
    if getattr(objective, low_name) is not None:
        require_number(objective, low_name)
    if getattr(objective, high_name) is not None:
        require_number(objective, high_name, above=0)
    low, high = getattr(objective, low_name), getattr(objective, high_name)
    if low is not None and high is not None and low > high:
        raise ObjectiveError(
            f"{objective.name}: {low_name} = {low!r} with {high_name} = {high!r}, "
            f"allowed are {low_name} ≤ {high_name}. Change them in [objective]."
        )
