"""Objectives by name, and a user's own by import path."""

from __future__ import annotations

import importlib
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.clipping import DapoClip, DualClip, ImportanceSampling, PpoClip, TwoSidedClip
from mhpo_core.objectives.divergence import DppoKl, DppoTv
from mhpo_core.objectives.mhpo import Mhpo, MhpoDhpOnly, MhpoLfmOnly, MhpoNoStopgrad, MhpoSignAware
from mhpo_core.objectives.sapo import Sapo
from mhpo_core.objectives.score_function import (
    Cispo,
    CispoVerl,
    IcePop,
    MaskedSampling,
    Reinforce,
    Topr,
    TruncatedSampling,
)  # fmt: skip
from mhpo_core.objectives.sequence import Gmpo, Gspo, Luspo
from mhpo_core.objectives.sequence_weights import GeometricMis, SequenceMis, SequenceTis, Vespo
from mhpo_core.objectives.wrappers import Decoupled, OffPolicyMask, TrustRegionMaxK2, TrustRegionMeanK3, Wrapper

_CLASSES: tuple[type[Objective], ...] = (
    Mhpo, MhpoLfmOnly, MhpoDhpOnly, MhpoNoStopgrad, MhpoSignAware,
    PpoClip, DapoClip, DualClip, TwoSidedClip, ImportanceSampling,
    Reinforce, Cispo, CispoVerl, Sapo, Topr, TruncatedSampling, MaskedSampling, IcePop, DppoTv, DppoKl,
    Gspo, Luspo, Gmpo, Vespo, SequenceTis, SequenceMis, GeometricMis,
    OffPolicyMask, TrustRegionMaxK2, TrustRegionMeanK3, Decoupled,
)  # fmt: skip

OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in _CLASSES}
ALIASES = {"grpo": "ppo_clip", "dapo": "dapo_clip"}


def create(name: str, **hyperparameters: Any) -> Objective:
    """The objective of that name with these hyperparameters.

    Args:
        name: a key of OBJECTIVES or of ALIASES, or "package.module:Class" of a subclass of Objective, which imports
            that module.
        hyperparameters: fields of the objective's class; the rest keep their defaults. For an objective around another
            one, `base` may be a name, and what the wrapper does not know goes to that objective.

    Raises:
        ObjectiveError: unknown name or hyperparameter, a value out of range, or an import that fails.
    """
    cls = _class_of(name)
    if issubclass(cls, Wrapper):
        hyperparameters = _with_base(cls, hyperparameters)
    allowed = [f.name for f in fields(cls) if f.init]
    unknown = sorted(set(hyperparameters) - set(allowed))
    if unknown:
        raise ObjectiveError(
            f"objectives.create: {name} has no hyperparameter {', '.join(unknown)}, "
            f"valid are {', '.join(allowed) or 'none'}."
        )
    return cls(**hyperparameters)


def _class_of(name: object) -> type[Objective]:
    if isinstance(name, str) and ":" in name:
        return _imported(name)
    cls = OBJECTIVES.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if cls is None:
        valid = [*OBJECTIVES, *ALIASES]
        close = get_close_matches(str(name), valid, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ObjectiveError(
            f"objectives.create: unknown objective {name!r}, valid are {', '.join(valid)}, "
            f"and package.module:Class for your own.{hint}"
        )
    return cls


def _imported(path: str) -> type[Objective]:
    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a user's module may fail in any way
        raise ObjectiveError(
            f"objectives.create: {path!r} cannot be imported ({type(error).__name__}: {error}), allowed is "
            "package.module:Class of something on Python's path. Check its spelling, or install it."
        ) from error
    if not isinstance(found, type) or not issubclass(found, Objective):
        raise ObjectiveError(
            f"objectives.create: {path!r} is not an objective, allowed are subclasses of "
            "mhpo_core.objectives.Objective. Derive it from Objective or AutogradObjective."
        )
    if not hasattr(found, "name") or not hasattr(found, "canonical_aggregation"):
        raise ObjectiveError(
            f"objectives.create: {path!r} lacks name or canonical_aggregation, every objective has both. "
            'Add class attributes such as name = "mine" and canonical_aggregation = "token-mean".'
        )
    return found


def _with_base(cls: type[Wrapper], hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """The wrapper's own hyperparameters, with `base` made into an objective."""
    own = {f.name for f in fields(cls)}
    given = {k: v for k, v in hyperparameters.items() if k in own}
    inner = {k: v for k, v in hyperparameters.items() if k not in own}
    base = given.get("base", cls.default_base())
    if isinstance(base, dict):
        inner = {**base, **inner}
        base = inner.pop("name", cls.default_base())
    if isinstance(base, str):
        return given | {"base": create(base, **inner)}
    return given | inner
