"""verl: every policy loss again as `mhpo_<name>`, which trains the same and records each optimizer step.

    python -m verl.trainer.main_ppo actor_rollout_ref.actor.policy_loss.loss_mode=mhpo_vanilla \
        actor_rollout_ref.model.external_lib=collectors.adapters.verl \
        +ray_kwargs.ray_init.runtime_env.env_vars.MHPO_RUN=/shared/runs/my-run ...

Another way to have this module imported is VERL_USE_EXTERNAL_MODULES=collectors.adapters.verl; verl passes neither that
nor MHPO_RUN on to its workers, Ray's runtime_env does. MHPO_RUN is a folder that all workers reach, or a bucket;
MHPO_OPTIONS is a JSON object of further options of `Recorder`. A policy loss sees log-probabilities, advantages and
mask; `recording_ppo_loss` sees entropy, token ids, the engine's log-probabilities, rewards and groups too, where verl
has them.

Steps have the number of updates that the optimizer has made, from 1 on and across checkpoints. An update that verl
leaves out because its gradient is not finite is a step too, with an event `update_skipped`. The loss is a rank's own,
of which verl logs the mean over the ranks; a policy loss knows it only where verl adds no entropy and no KL term. Ray
ends its workers without notice: unless a worker calls `close`, the run looks like one whose process died.
`python -m collectors.adapters.verl` says what would happen here.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from collectors.adapters.harmless import harmless
from collectors.adapters.optimizer_steps import MicroBatch
from collectors.adapters.verl_calls import policy_loss_call, whole_loss_call
from collectors.adapters.verl_gradients import measure_gradients
from collectors.adapters.verl_settings import PREFIX, objective_of, plain_settings, repeats_another_rank, setting
from collectors.adapters.worker import RUN, Worker, version_of
from mhpo_core.gradients import GradientNorms

__all__ = ["RECORDED", "active", "close", "objective_of", "recording", "recording_ppo_loss", "register"]

_LOG = logging.getLogger(__name__)
RECORDED = "mhpo/recorded_tokens"
"""Metric that a recording loss adds: trained tokens of the call that were handed over, 0 where none was."""

_HERE = Worker("verl")
_within = False
"""While the whole loss is recorded its policy loss is not recorded once more."""


def active() -> str | None:
    """What records in this process, such as "policy loss mhpo_vanilla"; None before the first loss that trains."""
    return _HERE.recipe


def close() -> None:
    """End the recording of this process; the next loss that trains continues it."""
    _HERE.close()


def register() -> list[str]:
    """Register `mhpo_<name>` for every policy loss that verl knows by now; returns all names of that kind.

    Raises:
        ImportError: verl is not installed or does not import.
    """
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    for name in list(core.POLICY_LOSS_REGISTRY):
        if not name.startswith(PREFIX) and PREFIX + name not in core.POLICY_LOSS_REGISTRY:
            core.register_policy_loss(PREFIX + name)(recording(name, core.get_policy_loss_fn(name)))
    return [name for name in core.POLICY_LOSS_REGISTRY if name.startswith(PREFIX)]


def recording(name: str, base: Callable[..., Any]) -> Callable[..., Any]:
    """A policy loss that returns what `base` returns, and one metric more.

    Args:
        name: of the policy loss, without a prefix.
        base: the policy loss.
    """
    signature = inspect.signature(base)

    @wraps(base)
    def loss(*args: Any, **kwargs: Any) -> Any:
        _HERE.obey()
        found = base(*args, **kwargs)
        two = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)
        if not two or _within or not _HERE.wanted():
            return found
        value, metrics = found
        given = signature.bind(*args, **kwargs).arguments

        def read() -> MicroBatch:
            # a copy: verl's ppo_loss adds its further terms to this very tensor
            return policy_loss_call(name, given, value.detach().clone(), metrics)

        kept = _keep(f"policy loss {PREFIX}{name}", name, given.get("config"), read) or 0
        return value, {**metrics, RECORDED: kept}

    return loss


def recording_ppo_loss(
    config: Any, model_output: Any, data: Any, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `ppo_loss`, recorded; needs verl 0.8.

        worker.set_loss_fn(partial(recording_ppo_loss, config=actor_config))

    The policy loss is the one that `config` names. Replaces no other loss than `ppo_loss`: a distillation has its own.
    """
    losses = importlib.import_module("verl.workers.utils.losses")
    if not _HERE.wanted():
        found: tuple[Tensor, dict[str, Any]] = losses.ppo_loss(config, model_output, data, dp_group)
        return found
    _HERE.obey()
    with _inside():
        value, metrics = losses.ppo_loss(config, model_output, data, dp_group)
    loss_mode = setting(setting(config, "policy_loss"), "loss_mode", "vanilla")

    def read() -> MicroBatch:
        with torch.no_grad():
            return whole_loss_call(config, model_output, data, value.detach().clone(), metrics)

    kept = _keep("recording_ppo_loss", loss_mode, config, read) or 0
    metric = importlib.import_module("verl.utils.metric").Metric
    return value, {**metrics, RECORDED: metric(value=kept, aggregation="sum")}


def _measured(norms: GradientNorms) -> None:
    if _HERE.telemetry is not None:
        _HERE.telemetry.measured(norms)


@contextmanager
def _inside() -> Iterator[None]:
    global _within
    _within = True
    try:
        yield
    finally:
        _within = False


@harmless
def _keep(recipe: str, loss_mode: str, config: Any, read: Callable[[], MicroBatch]) -> int:
    def settings() -> dict[str, Any]:
        return {"objective": objective_of(loss_mode, config), "config": {"verl": plain_settings(config)}}

    return 0 if repeats_another_rank() else _HERE.keep(recipe, settings, read) or 0


def main() -> int:
    """Say whether verl is installed, what is wrapped and where it would be recorded; 1 if nothing could be."""
    if version_of("verl") is None and find_spec("verl") is None:
        print("verl is not installed in this Python.")
        return 1
    try:
        names = register()
    except Exception as error:
        print(f"verl {version_of('verl')} does not import: {type(error).__name__}: {error}")
        return 1
    print(f"verl {version_of('verl')}, {len(names)} policy losses recorded as {', '.join(names)}")
    run = os.environ.get(RUN)
    print(f"{RUN} is {run}" if run else f"{RUN} is not set: these losses pass through and nothing is recorded")
    here = "collectors.adapters.verl"
    named = os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")
    if here not in [*named, *(plugin.value for plugin in entry_points(group="verl.plugins"))]:
        print(f"neither VERL_USE_EXTERNAL_MODULES nor a plugin names {here}; give actor_rollout_ref.model.external_lib")
    return 0


if find_spec("verl") is not None:
    try:
        register()
        measure_gradients(lambda: _HERE.wanted(), _measured)
    except Exception as error:  # a plugin that raises would be swallowed by verl without a word
        _LOG.warning("verl: its policy losses cannot be wrapped (%s: %s).", type(error).__name__, error)

if __name__ == "__main__":
    raise SystemExit(main())
