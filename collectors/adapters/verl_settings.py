"""What verl's actor configuration says about a run, and which of its ranks repeat one another."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from mhpo_core import objectives
from mhpo_core.objectives import Objective

PREFIX = "mhpo_"
"""In front of the name of the policy loss that is recorded."""


def setting(config: Any, name: str, default: Any = None) -> Any:
    """A setting of a dataclass, a DictConfig or a dict; `default` where it is missing or None."""
    value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return default if value is None else value


def objective_of(loss_mode: str, config: Any) -> Objective:
    """The objective of `mhpo_core` that a policy loss of verl is, without weights and without KL and entropy terms.

    clip_cov and losses that are not verl's own are taken for the clipped objective, kl_cov for the unclipped one and
    dro for its linear part: their further terms reach few tokens or have no counterpart.
    """
    band = _band(config)
    low, high = band["eps_low"], band["eps_high"]
    cap = setting(config, "clip_ratio_c", 3.0)
    near = {"delta_low": low, "delta_high": high, "ratio_cap": cap}
    known: dict[str, tuple[str, dict[str, float]]] = {
        "vanilla": ("dual_clip", band | {"dual_c": cap}),
        "dppo_tv": ("dppo_tv", near),
        "dppo_kl": ("dppo_kl", near),
        "gspo": ("gspo", band),
        "geo_mean": ("gmpo", band),
        "cispo": ("cispo", {"ratio_min": 1 - low, "ratio_max": 1 + high}),
        "sapo": ("sapo", {"tau_pos": setting(config, "tau_pos", 1.0), "tau_neg": setting(config, "tau_neg", 1.05)}),
        "gpg": ("reinforce", {}),
        "dro": ("reinforce", {}),
        "kl_cov": ("is_pg", {}),
    }
    known["bypass_mode"] = _bypassed(config, known["vanilla"])
    name, hyperparameters = known.get(loss_mode.removeprefix(PREFIX), ("ppo_clip", band))
    return objectives.create(name, **hyperparameters)


def _band(config: Any) -> dict[str, float]:
    width = setting(config, "clip_ratio", 0.2)
    return {"eps_low": setting(config, "clip_ratio_low", width), "eps_high": setting(config, "clip_ratio_high", width)}


def _bypassed(config: Any, clipped: tuple[str, dict[str, float]]) -> tuple[str, dict[str, float]]:
    correction = setting(setting(config, "policy_loss"), "rollout_correction")
    if setting(correction, "loss_type", "ppo_clip") != "reinforce":
        return clipped
    by_level = {"token": "tis", "sequence": "seq_tis"}
    kind = by_level.get(str(setting(correction, "rollout_is")))
    threshold = setting(correction, "rollout_is_threshold", 2.0)
    return (kind, {"ratio_max": float(threshold)}) if kind else ("reinforce", {})


def plain_settings(config: Any) -> dict[str, Any]:
    """The settings that are numbers, texts and switches, those of the policy loss too."""
    found = {n: v for n, v in _items(config) if isinstance(v, bool | int | float | str)}
    nested = {n: v for n, v in _items(setting(config, "policy_loss")) if isinstance(v, bool | int | float | str)}
    return found | ({"policy_loss": nested} if nested else {})


def _items(config: Any) -> Iterable[tuple[str, Any]]:
    if is_dataclass(config):
        return [(f.name, getattr(config, f.name, None)) for f in fields(config)]
    return [(str(n), v) for n, v in config.items()] if isinstance(config, Mapping) else []


def repeats_another_rank() -> bool:
    """Whether another rank computes the same log-probabilities and records them: Ulysses, or Megatron's TP and CP."""
    ulysses = sys.modules.get("verl.utils.ulysses")
    group = ulysses.get_ulysses_sequence_parallel_group() if ulysses else None
    if group is not None:
        return torch.distributed.get_rank(group) > 0
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is None or not megatron.model_parallel_is_initialized():
        return False
    return bool(megatron.get_tensor_model_parallel_rank() or megatron.get_context_parallel_rank())


def number_of(*texts: Any) -> int:
    """The same 53 bits, which a browser can hold, for the same texts on every rank and in every process."""
    digest = hashlib.blake2b("\0".join(map(str, texts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 11
