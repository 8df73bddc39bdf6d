"""Which diagnostics the data of a run allows, and what to switch on in its framework for the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from collectors.importers.steps import ImportedStep

# What a source can have.
LOSS, GRAD_NORM, REWARD, LENGTH, ENTROPY, CLIP = "loss", "grad_norm", "reward", "length", "entropy", "clip fractions"
TEXT, GROUPS, LAYERS = "texts", "groups", "gradient norms per layer"
LOGP_NEW, LOGP_OLD, LOGP_ROLLOUT, TOKEN_ENTROPY = "logp_new", "logp_old", "logp_rollout", "token entropy"

_OF_COLUMN = {
    "loss": LOSS, "grad_norm": GRAD_NORM, "reward_mean": REWARD, "length_mean": LENGTH, "entropy_mean": ENTROPY,
    "clip_fraction_low": CLIP,
}  # fmt: skip
_OF_FIELD = {"completion": TEXT, "reward": REWARD, "group_id": GROUPS, "length": LENGTH}
_OF_BATCH = {"logp_rollout": LOGP_ROLLOUT, "entropy": TOKEN_ENTROPY}


@dataclass(frozen=True)
class Diagnostic:
    """One thing that can be told about a run.

    Args:
        name: for people.
        needs: all of these; an inner tuple = one of them.
    """

    name: str
    needs: tuple[str | tuple[str, ...], ...]


DIAGNOSTICS = (
    Diagnostic("loss and reward curves", ((LOSS, REWARD),)),
    Diagnostic("gradient norm", (GRAD_NORM,)),
    Diagnostic("gradient norm per layer", (LAYERS,)),
    Diagnostic("entropy collapse", ((ENTROPY, TOKEN_ENTROPY),)),
    Diagnostic("length and truncation", ((LENGTH, TEXT),)),
    Diagnostic("dead groups", (GROUPS, REWARD)),
    Diagnostic("clip fractions", ((CLIP, LOGP_NEW),)),
    Diagnostic("policy shift: log-ratio quantiles, tails, effective sample size", (LOGP_NEW, LOGP_OLD)),
    Diagnostic("hazard and survival weight, replay under another objective", (LOGP_NEW, LOGP_OLD)),
    Diagnostic("engine mismatch", (LOGP_OLD, LOGP_ROLLOUT)),
    Diagnostic("tokens that carry the gradient", (LOGP_NEW, LOGP_OLD)),
    Diagnostic("texts of the completions", (TEXT,)),
)

_ADAPTER = {
    "trl": "attach(trainer, RUN) of collectors.adapters.trl before train()",
    "verl": "loss_mode=mhpo_<name> with collectors.adapters.verl in the workers, see collectors/adapters/README.md",
}
_HOOK = "collectors.adapters.openrlhf.setup as Ray's worker_process_setup_hook, see collectors/adapters/README.md"
ADVICE: dict[str, dict[str, str]] = {
    "trl": {
        LOGP_NEW: _ADAPTER["trl"], LOGP_OLD: _ADAPTER["trl"], TOKEN_ENTROPY: _ADAPTER["trl"], LAYERS: _ADAPTER["trl"],
        GROUPS: _ADAPTER["trl"], LOGP_ROLLOUT: "use_vllm=True, then " + _ADAPTER["trl"],
        TEXT: "GRPOConfig(log_completions=True)", CLIP: "loss_type grpo, bnpo, dr_grpo, dapo or luspo, logging_steps=1",
        ENTROPY: "logging_steps=1", GRAD_NORM: "logging_steps=1", REWARD: "logging_steps=1",
        LENGTH: "logging_steps=1", LOSS: "logging_steps=1",
    },
    "verl": {
        LOGP_NEW: _ADAPTER["verl"], LOGP_OLD: _ADAPTER["verl"], GROUPS: _ADAPTER["verl"],
        TOKEN_ENTROPY: "actor_rollout_ref.actor.calculate_entropy=true, then " + _ADAPTER["verl"],
        LOGP_ROLLOUT: "actor_rollout_ref.rollout.calculate_log_probs=true, then " + _ADAPTER["verl"],
        TEXT: "trainer.rollout_data_dir=DIR", ENTROPY: "actor_rollout_ref.actor.calculate_entropy=true",
        LOSS: "trainer.logger=[console,file]", REWARD: "trainer.logger=[console,file]",
        GRAD_NORM: "trainer.logger=[console,file]", LENGTH: "trainer.logger=[console,file]",
        CLIP: _ADAPTER["verl"], LAYERS: "actor_rollout_ref.actor.strategy=fsdp2, then " + _ADAPTER["verl"],
    },
    "openrlhf": {
        LOGP_NEW: _HOOK, LOGP_OLD: _HOOK, LOGP_ROLLOUT: _HOOK, ENTROPY: "--actor.entropy_coef 0",
        TOKEN_ENTROPY: "--actor.entropy_coef 0, then " + _HOOK,
    },
    "prime-rl": {
        LOGP_NEW: "trainer.enable_token_export = true", LOGP_OLD: "trainer.enable_token_export = true",
        TOKEN_ENTROPY: "trainer.enable_token_export = true",
        LOGP_ROLLOUT: "not separable: prime-rl takes its ratio against the engine's log-probabilities",
        REWARD: "monitors.file, and import its JSONL too", LOSS: "monitors.file, and import its JSONL too",
        GRAD_NORM: "monitors.file, and import its JSONL too",
        TEXT: "rollouts/step_N/*/traces.jsonl has it, which is not read",
        GROUPS: "not exported by prime-rl", LAYERS: "not exported by prime-rl",
    },
    "nemo-rl": {
        LOGP_NEW: "wrap the loss_fn that grpo_train gets: the dump has the log-probabilities before the update only",
        TOKEN_ENTROPY: "wrap the loss_fn that grpo_train gets", GROUPS: "completions of equal prompts form a group",
        LOSS: "logger.tensorboard_enabled=true, and import its folder too",
        GRAD_NORM: "logger.tensorboard_enabled=true, and import its folder too",
        LAYERS: "not exported by NeMo-RL",
    },
    "slime": {
        LOGP_NEW: "--loss-type custom_loss --custom-loss-function-path: the dump has the old policy's only",
        LOSS: "--use-wandb with WANDB_MODE=offline, and import that too",
        GRAD_NORM: "--use-wandb with WANDB_MODE=offline, and import that too",
        TEXT: "rollout_data/*.pt hold it, which only unpickling opens; not read", LAYERS: "not exported by slime",
    },
}  # fmt: skip
_ANY = "record it with collectors.Recorder, see collectors/README.md"


@dataclass(frozen=True)
class Possible:
    """Whether one diagnostic can be had.

    Args:
        name: of the diagnostic.
        missing: what the data lacks; empty = possible.
        how: the setting that would add it.
    """

    name: str
    missing: tuple[str, ...]
    how: str


def diagnose(has: Collection[str], framework: str) -> list[Possible]:
    """Every diagnostic, with what is missing for it and how to get that from this framework."""
    found = []
    advice = ADVICE.get(framework, {})
    for diagnostic in DIAGNOSTICS:
        missing = [_easiest(need, advice) for need in diagnostic.needs if not _given(need, has)]
        how = "; ".join(dict.fromkeys(advice.get(name, _ANY) for name in missing))
        found.append(Possible(diagnostic.name, tuple(missing), how))
    return found


def _given(need: str | tuple[str, ...], has: Collection[str]) -> bool:
    return need in has if isinstance(need, str) else any(name in has for name in need)


def _easiest(need: str | tuple[str, ...], advice: Mapping[str, str]) -> str:
    """Of several that would do, the first that the framework has a setting for."""
    each = (need,) if isinstance(need, str) else need
    return next((name for name in each if name in advice), each[0])


def present(found: ImportedStep, columns: Collection[str]) -> set[str]:
    """What a step has of what diagnostics need.

    Args:
        columns: of `steps` that its scalars give.
    """
    has = {kind for column, kind in _OF_COLUMN.items() if column in columns}
    has |= {LAYERS} if found.gradient_norms else set()
    sequences, batch = found.sequences, found.batch
    has |= {kind for name, kind in _OF_FIELD.items() if getattr(sequences, name, None) is not None}
    if batch is not None:
        has |= {LOGP_OLD, LENGTH} | ({LOGP_NEW} if found.ratio_known else set())
        has |= {kind for name, kind in _OF_BATCH.items() if getattr(batch, name) is not None}
    return has
