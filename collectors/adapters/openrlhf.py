"""OpenRLHF, experimental: every optimizer step of its actor, without a change to it.

    ray job submit --runtime-env-json '{"worker_process_setup_hook": "collectors.adapters.openrlhf.setup",
        "env_vars": {"MHPO_RUN": "/shared/runs/my-run"}}' -- python -m openrlhf.cli.train_ppo_ray ...

OpenRLHF has no plugins: Ray calls `setup` in each of its workers, and it waits there until OpenRLHF imports its modules
(nothing of it is imported before). A forward hook on each `PolicyLoss` then sees the log-probabilities of the policy,
of the old one and of vLLM, advantages and mask; one on each `Actor` sees token ids, and entropy where OpenRLHF
computes it (`--actor.entropy_coef 0` makes it do so and changes no loss). MHPO_RUN is a folder that all workers reach,
or a bucket; MHPO_OPTIONS is a JSON object of further options of `Recorder`.

A step ends when an optimizer has stepped, and has the number of updates that it has made. What is differentiated is not
known, since OpenRLHF adds KL, entropy and router terms to what `PolicyLoss` returns: that is the metric
`train/policy_loss`, and the column `loss` stays empty. Rewards, groups and texts never reach these modules.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from collectors.adapters.harmless import harmless
from collectors.adapters.imports import when_imported
from collectors.adapters.optimizer_steps import MicroBatch
from collectors.adapters.worker import Worker
from mhpo_core import objectives
from mhpo_core.batch import TokenBatch
from mhpo_core.objectives import Objective

__all__ = ["active", "close", "objective_of", "setup"]

_LOSS, _ACTOR, _RING = "openrlhf.models.loss", "openrlhf.models.actor", "openrlhf.models.ring_attn_utils"
_FIELDS = {
    "logp_new": "log_probs", "logp_old": "old_log_probs", "advantage": "advantages", "mask": "action_mask",
    "logp_rollout": "rollout_log_probs",
}  # fmt: skip
_HERE = Worker("openrlhf")
_pass: tuple[Tensor, Tensor | None] | None = None
"""Token ids (B, S) and entropy of the newest pass of the actor that trains."""


def setup() -> None:
    """Ray's `worker_process_setup_hook`: watch the modules of OpenRLHF that this process will make."""
    when_imported(_LOSS, lambda module: _watch(module, "PolicyLoss", _policy_loss_called))
    when_imported(_ACTOR, lambda module: _watch(module, "Actor", _actor_called))


def active() -> str | None:
    """What records in this process, "PolicyLoss"; None before the first loss that trains."""
    return _HERE.recipe


def close() -> None:
    """End the recording of this process; the next loss that trains continues it."""
    _HERE.close()


def objective_of(loss: Any) -> Objective:
    """The objective of `mhpo_core` that a `PolicyLoss` is, without the correction for vLLM.

    Args:
        loss: the module.
    """
    band = {"eps_low": float(loss.clip_eps_low), "eps_high": float(loss.clip_eps_high)}
    if getattr(loss, "policy_loss_type", "ppo") == "gspo":
        return objectives.create("gspo", **band)
    if loss.dual_clip is None:
        return objectives.create("ppo_clip", **band)
    return objectives.create("dual_clip", dual_c=float(loss.dual_clip), **band)


@harmless
def _watch(module: ModuleType, name: str, hook: Any) -> None:
    """Every instance that is made of a class from now on gets a forward hook."""
    kind = getattr(module, name)
    made = kind.__init__

    @wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _attach(self, hook)

    kind.__init__ = init


@harmless
def _attach(module: Any, hook: Any) -> None:
    module.register_forward_hook(hook, with_kwargs=True)


@harmless
def _actor_called(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
    global _pass
    if not torch.is_grad_enabled() or not isinstance(output, tuple):
        return  # old log-probabilities, or those of the reference
    given = _arguments(module, args, kwargs)
    entropy = getattr(output[1], "entropy", None)
    _pass = given["sequences"].detach(), None if entropy is None else entropy.detach()


@harmless
def _policy_loss_called(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
    global _pass
    seen, _pass = _pass, None
    if not torch.is_grad_enabled() or not _HERE.wanted() or _repeats_another_rank():
        return

    def settings() -> dict[str, Any]:
        given = {n: v for n, v in vars(module).items() if n != "training" and isinstance(v, bool | int | float | str)}
        return {"objective": objective_of(module), "config": {"openrlhf": given}}

    loss = output[0] if isinstance(output, tuple) else output
    _HERE.keep("PolicyLoss", settings, lambda: _micro_batch(_arguments(module, args, kwargs), loss, seen))


def _micro_batch(given: Mapping[str, Any], loss: Tensor, seen: tuple[Tensor, Tensor | None] | None) -> MicroBatch:
    tokens = {name: given[own].detach() for name, own in _FIELDS.items() if given.get(own) is not None}
    shape = tokens["logp_new"].shape
    tokens["mask"] = tokens["mask"].bool() if "mask" in tokens else torch.ones_like(tokens["logp_new"]).bool()
    if seen is not None:
        for name, values in zip(("token_id", "entropy"), seen, strict=True):
            if values is not None and len(values) == shape[0] and values.shape[1] >= shape[1]:
                tokens[name] = values[:, -shape[1] :]
    # DeepSpeed divides the loss of each micro-batch by their number
    metrics = {"train/policy_loss": ("mean", [loss.detach().clone()])}
    return MicroBatch(TokenBatch(**tokens) if bool(tokens["mask"].any()) else None, metrics=metrics)


def _arguments(module: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def _repeats_another_rank() -> bool:
    """Whether another rank of a ring of attention computes the same log-probabilities and records them."""
    ring = sys.modules.get(_RING)
    group = getattr(ring, "RING_ATTN_GROUP", None)
    return group is not None and torch.distributed.get_rank(group) > 0
