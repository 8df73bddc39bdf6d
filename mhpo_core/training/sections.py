"""The tables of a training configuration; their defaults are safe for a pretrained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mhpo_core import objectives
from mhpo_core.errors import ConfigError
from mhpo_core.training.validation import Section, setting


@dataclass(frozen=True)
class ModelConfig(Section):
    """[model]: a transformers causal LM, from scratch or pretrained.

    Args:
        path: local folder or hub id of a pretrained model; empty = a small Qwen2 from scratch with the sizes below.
        hidden_size, layers, heads, intermediate_size: sizes of the model from scratch.
        dtype: arithmetic of the forward pass; master weights are float32 in both.
    """

    section: ClassVar[str] = "[model]"
    path: str = setting("")
    hidden_size: int = setting(64, low=1)
    layers: int = setting(2, low=1)
    heads: int = setting(4, low=1)
    intermediate_size: int = setting(256, low=1)
    dtype: str = setting("float32", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                f"[model]: hidden_size = {self.hidden_size} with heads = {self.heads}, allowed are multiples of "
                f"2·heads, which rotary positions need. Use for instance hidden_size = {16 * self.heads}."
            )


@dataclass(frozen=True)
class WarmStartConfig(Section):
    """[warm_start]: supervised steps before RL, so that some completions earn a reward.

    Args:
        steps: optimizer steps, 0 = none.
        batch_size: examples per step.
        lr: AdamW learning rate after the warm-up.
        lr_warmup: steps of linear warm-up.
    """

    section: ClassVar[str] = "[warm_start]"
    steps: int = setting(0, low=0)
    batch_size: int = setting(128, low=1)
    lr: float = setting(2e-3, above=0)
    lr_warmup: int = setting(50, low=0)


@dataclass(frozen=True)
class RolloutConfig(Section):
    """[rollout]: what one iteration samples.

    Args:
        prompts: prompts per iteration.
        group_size: completions per prompt.
        temperature: of the sampler, and of the log-probabilities that are trained.
        max_new_tokens: completion limit in tokens, the end token included.
        normalize_std: divide advantages by the group's standard deviation, unless the objective is a recipe that does
            not (dr_grpo).
        old_policy: what logp_old is: "rollout" = the sampler's own log-probabilities, "recomputed" = one extra
            forward pass of the trainer.
    """

    section: ClassVar[str] = "[rollout]"
    prompts: int = setting(32, low=1)
    group_size: int = setting(8, low=1)
    temperature: float = setting(1.0, above=0)
    max_new_tokens: int = setting(64, low=1)
    normalize_std: bool = setting(True)
    old_policy: str = setting("rollout", choices=("rollout", "recomputed"))

    @property
    def completions(self) -> int:
        """Completions per iteration, prompts · group_size."""
        return self.prompts * self.group_size


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """[objective]: its name, its hyperparameters as further keys, and the aggregation.

    Args:
        name: an objective of `mhpo_core.objectives` (a key, an alias, or package.module:Class), or one of its recipes,
            which also brings its aggregation and how its advantages are normalized.
        aggregation: one of its aggregations; empty = the recipe's, or the objective's canonical one.
        hyperparameters: fields of the objective's class; of an objective around another one, also `base` by name.

    Raises:
        ConfigError: unknown aggregation.
        ObjectiveError: unknown objective or hyperparameter, or a value of the wrong type or out of range.
    """

    section: ClassVar[str] = "[objective]"
    name: str = setting("mhpo")
    aggregation: str = setting("", choices=("", *objectives.AGGREGATIONS))
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.create()

    def create(self) -> objectives.Objective:
        """The objective."""
        recipe = self._recipe()
        return recipe.objective if recipe else objectives.create(self.name, **self.hyperparameters)

    @property
    def resolved_aggregation(self) -> str:
        """The aggregation that trains."""
        recipe = self._recipe()
        return self.aggregation or (recipe.aggregation if recipe else self.create().canonical_aggregation)

    @property
    def normalizes_std(self) -> bool:
        """False for a recipe whose advantages are not divided by the standard deviation."""
        recipe = self._recipe()
        return recipe is None or recipe.normalize_std

    def _recipe(self) -> objectives.Recipe | None:
        # where a recipe and an objective share a name, the objective's canonical aggregation holds
        if self.name in objectives.OBJECTIVES or self.name not in objectives.RECIPES:
            return None
        return objectives.recipe(self.name, **self.hyperparameters)

    def to_dict(self) -> dict[str, Any]:
        """Keys and values as they would stand in TOML."""
        return {"name": self.name, "aggregation": self.aggregation, **self.hyperparameters}


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """[optimizer]: AdamW and how one rollout is cut into optimizer steps.

    Args:
        lr: peak learning rate.
        lr_warmup: optimizer steps of linear warm-up.
        lr_final: share of the peak that a linear decay reaches at the end; 1 = constant.
        weight_decay, beta1, beta2: of AdamW.
        max_grad_norm: global gradient norm above which the gradient is scaled down.
        epochs: passes over one rollout.
        minibatches: optimizer steps per pass.
        micro_batch_size: completions per forward pass, 0 = the whole minibatch. Changes memory, not the gradient.
    """

    section: ClassVar[str] = "[optimizer]"
    lr: float = setting(1e-6, above=0)
    lr_warmup: int = setting(20, low=0)
    lr_final: float = setting(1.0, low=0, high=1)
    weight_decay: float = setting(0.0, low=0)
    beta1: float = setting(0.9, low=0, high=0.9999)
    beta2: float = setting(0.95, low=0, high=0.9999)
    max_grad_norm: float = setting(1.0, above=0)
    epochs: int = setting(1, low=1)
    minibatches: int = setting(2, low=1)
    micro_batch_size: int = setting(0, low=0)


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """[checkpoint]: every = iterations between two checkpoints, 0 = only at the end."""

    section: ClassVar[str] = "[checkpoint]"
    every: int = setting(50, low=0)
