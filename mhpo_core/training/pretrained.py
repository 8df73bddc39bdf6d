"""Pretrained models and tokenizers, from a local folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mhpo_core.errors import ConfigError


def load_model(path: str) -> nn.Module:
    """The causal LM with float32 weights.

    Raises:
        ConfigError: it cannot be loaded.
    """
    model: nn.Module = _load("AutoModelForCausalLM", "model", path, dtype=torch.float32)
    return model


def load_tokenizer(path: str) -> Any:
    """The tokenizer that belongs to it.

    Raises:
        ConfigError: it cannot be loaded.
    """
    return _load("AutoTokenizer", "tokenizer", path)


def _load(loader: str, what: str, path: str, **options: Any) -> Any:
    import transformers  # here because the import takes seconds and a configuration needs none of it

    try:
        return getattr(transformers, loader).from_pretrained(path, **options)
    except Exception as error:  # missing files, no network, damaged weights: each library in there raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"[model]: no {what} could be loaded from path = {path!r} ({reason}). "
            "Give a local folder made by save_pretrained, or a hub id."
        ) from error
