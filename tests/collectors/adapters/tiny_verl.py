"""A real verl worker that trains in a second: FSDP2 and gloo on the CPU, two layers, sixteen tokens."""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM

from collectors.adapters.verl import close, recording_ppo_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # verl names every engine that is not installed
    import tests.collectors.adapters.verl_on_cpu  # noqa: F401, I001
    from verl.models.transformers import monkey_patch
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import (
        ActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

N_ROWS, PROMPT, RESPONSE, VOCABULARY = 8, 3, 6, 16

monkey_patch.is_trl_available = lambda: False  # verl 0.9.1 imports a name that TRL has given up
EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")(FSDPEngineWithLMHead)


def save_model(folder: Path) -> None:
    """The same model every time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).save_pretrained(folder)


def actor_config(**settings: Any) -> ActorConfig:
    """An actor of four sequences per update and two per loss call."""
    given: dict[str, Any] = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 2}
    return ActorConfig(**given | {"use_dynamic_bsz": False} | settings)


def worker(model: Path, config: ActorConfig, loss: Any = ppo_loss) -> TrainingWorker:
    """A worker whose loss is the given one."""
    engine = FSDPEngineConfig(
        strategy="fsdp2", use_dynamic_bsz=False, micro_batch_size_per_gpu=2, infer_micro_batch_size_per_gpu=2,
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"}, use_torch_compile=False,
    )  # fmt: skip
    training = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(model), load_tokenizer=False, use_remove_padding=False, enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "eager"},
        ),
        engine_config=engine,
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, clip_grad=0.5, total_training_steps=10),
    )  # fmt: skip
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")  # verl's own call names the CPU twice
    made = TrainingWorker(training)
    made.reset()
    made.set_loss_fn(partial(loss, config=config))
    return made


def rollouts(seed: int, rank: int = 0, n_ranks: int = 1) -> TensorDict:
    """Eight responses of one to six tokens to four prompts, as the agent loop leaves them; a rank's share of them."""
    generator = torch.Generator().manual_seed(seed)

    def rows(make: Any) -> torch.Tensor:
        return torch.nested.as_nested_tensor([make(n) for n in lengths], layout=torch.jagged)

    share = N_ROWS // n_ranks
    mine = slice(rank * share, (rank + 1) * share)
    lengths = torch.randint(1, RESPONSE + 1, (N_ROWS,), generator=generator).tolist()
    ids = [torch.randint(0, VOCABULARY, (PROMPT + n,), generator=generator) for n in lengths]
    old = [-2.7 + 0.3 * torch.randn(n, generator=generator) for n in lengths]
    advantage = torch.randn(N_ROWS, generator=generator)
    weight = [torch.rand(n, generator=generator) + 0.5 for n in lengths]
    lists = {
        "input_ids": ids, "position_ids": [torch.arange(PROMPT + n) for n in lengths],
        "prompts": [row[:PROMPT] for row in ids], "responses": [row[PROMPT:] for row in ids],
        "response_mask": [torch.ones(n, dtype=torch.int64) for n in lengths],
        "loss_mask": [torch.ones(n, dtype=torch.int64) for n in lengths], "old_log_probs": old,
        "rollout_log_probs": [row + 0.01 for row in old], "rollout_is_weights": weight,
        "advantages": [a.expand(n).clone() for a, n in zip(advantage, lengths, strict=True)],
        "rm_scores": [torch.zeros(n).index_fill(0, torch.tensor([n - 1]), float(i)) for i, n in enumerate(lengths)],
    }  # fmt: skip
    tensors = {name: torch.nested.as_nested_tensor(rows[mine], layout=torch.jagged) for name, rows in lists.items()}
    found: TensorDict = tu.get_tensordict(
        tensors | {
            "uid": [f"prompt {seed} {i // 2}" for i in range(N_ROWS)][mine],
            "session_id": [i % 2 for i in range(N_ROWS)][mine],
        },
        {
            "global_batch_size": N_ROWS // 2, "mini_batch_size": N_ROWS // 2, "epochs": 2, "seed": 1,
            "temperature": 1.0, "calculate_entropy": True, "dataloader_kwargs": {"shuffle": True},
        },
    )  # fmt: skip
    return found


def full_weights(made: TrainingWorker) -> list[torch.Tensor]:
    """Every parameter, whole."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in made.engine.module.parameters()]


if __name__ == "__main__":  # one rank of a job, under torchrun
    torch.distributed.init_process_group("gloo")
    here = {"rank": torch.distributed.get_rank(), "n_ranks": torch.distributed.get_world_size()}
    made = worker(Path(sys.argv[1]), actor_config(), recording_ppo_loss)
    logged = [tu.get(made.train_mini_batch(rollouts(seed, **here)), "metrics") for seed in (0, 1)]
    close()
    if here["rank"] == 0:
        Path(sys.argv[2]).write_text(json.dumps([[m["loss"], m["grad_norm"]] for m in logged]))
    torch.distributed.destroy_process_group()
