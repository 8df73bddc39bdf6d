"""A real GRPOTrainer that trains in a second: two layers, sixteen characters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from collectors.adapters.trl import attach

CHARACTERS = "0123456789+=ab"
BATCH, GROUP, LONGEST = 8, 4, 12


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    named = ["input_ids", "attention_mask"]  # transformers 4 adds token types, which the model does not take
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", model_input_names=named
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """Share of ones."""
    return [text.count("1") / max(1, len(text)) for text in completions]


SHAPE = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def build(
    out: Any, cls: type = GRPOTrainer, shape: dict[str, int] | None = None, config: type = GRPOConfig, **settings: Any
) -> Any:
    """The same trainer for the same settings."""
    torch.manual_seed(0)
    llama = LlamaConfig(**SHAPE | (shape or {}), eos_token_id=1, pad_token_id=0)
    defaults: dict[str, Any] = {
        "report_to": "none", "use_cpu": True, "bf16": False, "per_device_train_batch_size": BATCH,
        "num_generations": GROUP, "max_completion_length": LONGEST, "max_steps": 6, "logging_steps": 1,
        "learning_rate": 1e-2, "max_grad_norm": 0.3, "save_strategy": "no", "seed": 1, "disable_tqdm": True,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    model = LlamaForCausalLM(llama)
    if settings.get("beta"):  # TRL loads the reference from where the model came
        model.save_pretrained(f"{out}/model")
        model = LlamaForCausalLM.from_pretrained(f"{out}/model")
    return cls(
        model=model,
        processing_class=tokenizer(),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+3=", "4+4=", "5+0="] * 8}),
        args=config(str(out), **defaults | settings),
    )


if __name__ == "__main__":  # one rank of a job, under torchrun
    trainer = build(sys.argv[1], max_steps=3, num_iterations=2, ddp_backend="gloo")
    attach(trainer, sys.argv[2], tokens="all", fsync=False)
    trainer.train()
    if trainer.is_world_process_zero():
        logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        Path(sys.argv[1], "losses.json").write_text(json.dumps(logged))
