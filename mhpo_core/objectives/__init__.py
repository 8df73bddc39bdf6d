"""Ratio-control objectives by name: `objectives.create("mhpo", c=1.5)`."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.aggregation import AGGREGATIONS, aggregate
from mhpo_core.objectives.base import Objective, Terms
from mhpo_core.objectives.clipping import DapoClip, ImportanceSampling, PpoClip
from mhpo_core.objectives.mhpo import Mhpo

OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Mhpo, PpoClip, DapoClip, ImportanceSampling)}
ALIASES = {"grpo": "ppo_clip", "dapo": "dapo_clip"}


def create(name: str, **hyperparameters: Any) -> Objective:
    """The objective of that name with these hyperparameters.

    Args:
        name: a key of OBJECTIVES or of ALIASES.
        hyperparameters: fields of the objective's class; the rest keep their defaults.

    Raises:
        ObjectiveError: unknown name or hyperparameter, or a value out of range.
    """
    cls = OBJECTIVES.get(ALIASES.get(name, name))
    if cls is None:
        valid = [*OBJECTIVES, *ALIASES]
        close = get_close_matches(str(name), valid, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ObjectiveError(f"objectives.create: unknown objective {name!r}, valid are {', '.join(valid)}.{hint}")
    allowed = [f.name for f in fields(cls)]
    unknown = sorted(set(hyperparameters) - set(allowed))
    if unknown:
        raise ObjectiveError(
            f"objectives.create: {name} has no hyperparameter {', '.join(unknown)}, "
            f"valid are {', '.join(allowed) or 'none'}."
        )
    return cls(**hyperparameters)


__all__ = ["AGGREGATIONS", "ALIASES", "OBJECTIVES", "Objective", "Terms", "aggregate", "create"]
