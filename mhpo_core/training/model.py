"""The policy: a transformers causal LM with the device and arithmetic it runs in.

Shape letters: B sequences, P prompt tokens (padded on the left), T response tokens (padded on the right), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mhpo_core.errors import ConfigError
from mhpo_core.logprobs import TokenStats, token_stats
from mhpo_core.training.chunked_head import ChunkedHead
from mhpo_core.training.pretrained import load_model
from mhpo_core.training.sections import ModelConfig
from mhpo_core.training.tasks import Task


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` = CUDA when there is one, else the CPU.

    Raises:
        ConfigError: not a device, or CUDA is asked for where there is none.
    """
    available = torch.cuda.is_available()
    try:
        resolved = torch.device(("cuda" if available else "cpu") if device == "auto" else device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda") or (resolved.type == "cuda" and not available):
        found = "a CUDA device was found" if available else "no CUDA device was found"
        raise ConfigError(f"device: got {str(device)!r}, allowed are auto, cpu and cuda ({found}). Use auto.")
    return resolved


@dataclass(frozen=True)
class Policy:
    """A model, float32 master weights, and the arithmetic of its forward pass.

    Args:
        model: the causal LM, on `device`.
        device: cpu or cuda.
        dtype: float32, or bfloat16 through autocast.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    _head: ChunkedHead = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_head", ChunkedHead(self.model))

    def logits(self, ids: Tensor, attention_mask: Tensor, keep: int, cache: Any = None) -> tuple[Tensor, Any]:
        """(B, keep, V) logits of the last `keep` positions in the compute dtype, and the grown cache.

        Args:
            ids: (B, S), the tokens that are not yet in the cache.
            attention_mask: (B, tokens in the cache + S), 0 = padding; positions are counted from the first 1.
            keep: number of positions.
            cache: what the previous call returned; None starts one when no graph is recorded.
        """
        with self._arithmetic():
            output = self.model(
                **_inputs(ids, attention_mask),
                past_key_values=cache,
                use_cache=not torch.is_grad_enabled(),
                logits_to_keep=keep,
            )
        return output.logits, output.past_key_values

    def completion_stats(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, *, temperature: float
    ) -> TokenStats:
        """log p, entropy and Σp² of every completion token, (B, T); logp carries the graph.

        Logits of more than 64 MiB are not kept: see ChunkedHead, which also says when a model cannot do without.

        Args:
            prompt_ids, prompt_mask: (B, P), padded on the left.
            completion_ids: (B, T). What follows the end token cannot change what comes before it, so padding is not
                masked.
        """
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        attention_mask = torch.cat([prompt_mask, torch.ones_like(completion_ids)], dim=1)
        keep = completion_ids.shape[1] + 1
        if self._head.applies(completion_ids.numel(), inputs := _inputs(ids, attention_mask)):
            with self._arithmetic():
                hidden = self._head.hidden(inputs)
            return self._head.token_stats(
                hidden[:, -keep:-1], completion_ids, temperature=temperature, dtype=self.dtype
            )
        logits, _ = self.logits(ids, attention_mask, keep=keep)
        return token_stats(logits[:, :-1], completion_ids, temperature=temperature)

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def _inputs(ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": attention_mask, "position_ids": position_ids}


def build_policy(config: ModelConfig, task: Task, device: torch.device) -> Policy:
    """The pretrained model of config.path, or a small Qwen2 from scratch with the task's vocabulary.

    Raises:
        ConfigError: the pretrained model cannot be loaded.
    """
    model = load_model(config.path) if config.path else _from_scratch(config, task)
    # evaluation mode throughout: dropout would make the ratio differ from 1 before the first update
    model.to(device).eval()
    return Policy(model, device, getattr(torch, config.dtype))


def _from_scratch(config: ModelConfig, task: Task) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM  # here because the import takes seconds

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=task.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=task.eos_id,
            pad_token_id=task.pad_id,
        )
    )
