"""Ratio-control objectives by name: `objectives.create("mhpo", c=1.5)`."""

from __future__ import annotations

from mhpo_core.objectives.aggregation import AGGREGATIONS, aggregate
from mhpo_core.objectives.base import AutogradObjective, Objective, Terms
from mhpo_core.objectives.recipes import RECIPES, Recipe, recipe
from mhpo_core.objectives.registry import ALIASES, OBJECTIVES, create
from mhpo_core.objectives.tokens import Tokens
from mhpo_core.objectives.wrappers import Decoupled, Wrapper

__all__ = [
    "AGGREGATIONS", "ALIASES", "OBJECTIVES", "RECIPES", "AutogradObjective", "Decoupled", "Objective", "Recipe",
    "Terms", "Tokens", "Wrapper", "aggregate", "create", "recipe",
]  # fmt: skip
