"""What differs between the versions of TRL from 0.20 on, told apart by what a trainer and its batches have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mhpo_core.errors import ConfigError

ENGINE = "mhpo_logp_rollout"
"""Rides with the completions where TRL does not hand on what the engine said of them itself (before 0.27)."""

_READ = ("_generate_and_score_completions", "_calculate_rewards", "_get_per_token_logps_and_entropies")
_ASKED = ("num_generations", "loss_type")


def refuse_others(trainer: Any) -> None:
    """Only a GRPOTrainer has these methods, and arguments that say how many completions a group has and which loss.

    Raises:
        ConfigError: another trainer. RLOOTrainer has the methods, but one ratio per completion and no old
            log-probability of a token.
    """
    args = getattr(trainer, "args", None)
    if all(hasattr(type(trainer), name) for name in _READ) and all(hasattr(args, name) for name in _ASKED):
        return
    raise ConfigError(
        f"trl.attach: trainer is a {type(trainer).__name__}, allowed is a GRPOTrainer of TRL 0.20 or newer. "
        "Record other trainers with transformers.ScalarsAndGradients and other loops with collectors.Recorder."
    )


def ending_tokens(trainer: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a completion; newer versions know more than one end."""
    ends = getattr(trainer, "eos_token_ids", None) or [tokenizer.eos_token_id]
    return [token for token in (*ends, tokenizer.pad_token_id) if token is not None]


def longest_completion(trainer: Any, width: int) -> int:
    """Tokens at which TRL cuts a completion; `width` where there is no limit."""
    return getattr(trainer, "max_completion_length", None) or trainer.args.max_completion_length or width


def engine_said(generated: Any) -> Sequence[Sequence[float]] | None:
    """The log-probabilities among what `_generate_single_turn` returns (0.24 and later), one list per completion.

    Their place differs from version to version; they alone are numbers with a fraction.
    """
    for part in generated:
        if isinstance(part, list) and part and isinstance(part[0], list) and part[0] and isinstance(part[0][0], float):
            return part
    return None


def engine_column(said: Sequence[Sequence[float]] | None, found: Mapping[str, Any]) -> Tensor | None:
    """What the engine said, shaped (B, T) like the completions, where TRL does not hand it on itself."""
    ids, mask = found["completion_ids"], found["completion_mask"]
    if said is None or "sampling_per_token_logps" in found or len(said) != len(ids):
        return None
    if any(kept not in (0, len(row)) for row, kept in zip(said, mask.sum(dim=1).tolist(), strict=True)):
        return None
    column = torch.zeros(ids.shape)
    for row, logps in enumerate(said):
        column[row, : len(logps)] = torch.tensor(logps)
    return column.to(ids.device)


def engine_logps(inputs: Mapping[str, Any]) -> Tensor | None:
    """Log-probabilities that the engine gave to the completions of a micro-batch."""
    column: Tensor | None = inputs.get("sampling_per_token_logps", inputs.get(ENGINE))
    return column
