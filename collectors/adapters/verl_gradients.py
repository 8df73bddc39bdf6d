"""Gradient norms per layer of verl's FSDP2 engine, as they are after the backward pass and before it clips them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from collectors.adapters.harmless import harmless
from collectors.adapters.imports import when_imported
from mhpo_core.gradients import GradientNorms, gradient_norms

_ENGINES = "verl.workers.engine.fsdp.transformer_impl"


def measure_gradients(wanted: Callable[[], bool], take: Callable[[GradientNorms], None]) -> None:
    """Measure before each optimizer step of an actor's FSDP engine, once verl has imported it.

    Args:
        wanted: whether to measure; the same on every rank, since the norms of shards are summed over the ranks.
        take: gets the norms.
    """
    when_imported(_ENGINES, lambda engines: _watch(engines, wanted, take))


@harmless
def _watch(engines: ModuleType, wanted: Callable[[], bool], take: Callable[[GradientNorms], None]) -> None:
    kind = engines.FSDPEngine
    step = kind.optimizer_step

    @wraps(step)
    def optimizer_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        _measure(engines, self, wanted, take)
        return step(self, *args, **kwargs)

    kind.optimizer_step = optimizer_step


@harmless
def _measure(
    engines: ModuleType, engine: Any, wanted: Callable[[], bool], take: Callable[[GradientNorms], None]
) -> None:
    # whatever decides here is the same on every rank; FSDP1 keeps shards that do not say what they are shards of
    critic = isinstance(engine, engines.FSDPEngineWithValueHead)
    scaled = getattr(engine, "scaler", None) is not None
    if wanted() and not critic and not scaled and isinstance(engine.module, engines.FSDPModule):
        take(gradient_norms(engine.module.named_parameters()))
