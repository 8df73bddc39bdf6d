"""A GRPO-family training loop over transformers models that hands its telemetry to a sink."""

from mhpo_core.training.config import (
    Config,
    apply_overrides,
    from_dict,
    list_presets,
    load_config,
    load_preset,
    to_toml,
)
from mhpo_core.training.intervention import Intervention
from mhpo_core.training.trainer import TrainingSummary, open_task, train

__all__ = [
    "Config",
    "Intervention",
    "TrainingSummary",
    "apply_overrides",
    "from_dict",
    "list_presets",
    "load_config",
    "load_preset",
    "open_task",
    "to_toml",
    "train",
]
