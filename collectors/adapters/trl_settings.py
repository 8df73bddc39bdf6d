"""What a GRPOConfig and a tokenizer say about a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from collectors.adapters.trl_versions import ending_tokens
from mhpo_core import objectives
from mhpo_core.objectives import Objective


def objective_of(args: Any) -> Objective:
    """The objective of `mhpo_core` that a GRPOConfig describes, without its weights and its KL and entropy terms."""
    low, high = args.epsilon, getattr(args, "epsilon_high", None)
    high = low if high is None else high
    kind, level = getattr(args, "loss_type", "grpo"), getattr(args, "importance_sampling_level", "token")
    delta = getattr(args, "delta", None)
    if kind == "cispo":
        return objectives.create("cispo", ratio_min=0.0, ratio_max=high)
    if kind == "sapo":
        return objectives.create("sapo", tau_pos=args.sapo_temperature_pos, tau_neg=args.sapo_temperature_neg)
    if kind == "vespo":
        names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        return objectives.create("vespo", **{n: getattr(args, f"vespo_{n}") for n in names})
    if kind == "luspo" and level == "sequence":
        return objectives.create("luspo", eps_low=low, eps_high=high)
    if level == "sequence":
        return objectives.create("gspo", eps_low=low, eps_high=high)
    if delta is not None:
        return objectives.create("two_sided_clip", eps_low=low, eps_high=high, delta=delta)
    return objectives.create("ppo_clip", eps_low=low, eps_high=high)


def plain_settings(args: Any) -> dict[str, Any]:
    """The arguments that are numbers, texts and switches; a token is none of them."""
    given = args.to_sanitized_dict() if hasattr(args, "to_sanitized_dict") else vars(args)
    return {n: v for n, v in given.items() if isinstance(v, bool | int | float | str) and "token" not in n.split("_")}


def vocabulary(trainer: Any) -> dict[int, str] | None:
    """Token id → text, None where the tokenizer has no list."""
    tokenizer = _tokenizer(trainer)
    known = getattr(tokenizer, "get_vocab", None)
    return None if known is None else {index: text for text, index in known().items()}


def _tokenizer(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def texts(trainer: Any, ids: Tensor, mask: Tensor) -> list[str]:
    """Completions or prompts as text, special tokens too."""
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]
    return list(_tokenizer(trainer).batch_decode(rows, skip_special_tokens=False))


def unmasked(trainer: Any, found: Mapping[str, Any]) -> Tensor:
    """The tokens of completions, also of those that mask_truncated_completions takes from the loss, shape (B, T)."""
    ids: Tensor = found["completion_ids"]
    mask: Tensor = found["completion_mask"]
    pad = _tokenizer(trainer).pad_token_id
    if pad is None:
        return mask
    return torch.where(mask.any(dim=1, keepdim=True), mask.bool(), ids != pad)


def ends(trainer: Any, found: Mapping[str, Any]) -> list[bool]:
    """Whether the completion's last token is one that ends it."""
    ending = torch.tensor(ending_tokens(trainer, _tokenizer(trainer)))
    ids, mask = found["completion_ids"].cpu(), found["completion_mask"].cpu()
    last = ids.gather(1, (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0))[:, 0]
    return [bool(e) for e in torch.isin(last, ending.to(last.dtype))]
