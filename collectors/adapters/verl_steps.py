"""From the loss calls of a verl worker to one record per optimizer step.

A loss call is a micro-batch, and nothing tells it where a step ends: that is when an optimizer has stepped. Where verl
leaves an update out because the gradient is not finite, no optimizer steps; the next mini-batch then tells it, by its
number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from collectors.adapters.harmless import harmless
from collectors.adapters.verl_calls import MicroBatch
from collectors.adapters.verl_settings import steps_made
from collectors.recorder import Recorder
from mhpo_core.batch import Sequences, concatenate

_JOIN: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values), "sum": math.fsum, "min": min, "max": max,
}  # fmt: skip


class StepTelemetry:
    """Collects loss calls until an optimizer steps, then records them as one step."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._parts: list[MicroBatch] = []
        self._n_tokens = 0
        self._updates = 0
        self._before: int | None = None
        self._hook = register_optimizer_step_post_hook(self._stepped)

    def close(self, kind: str = "finished", detail: str = "") -> None:
        """Write what waits, note how it ended and let go of the optimizers."""
        self._hook.remove()
        self.recorder.close(kind, detail)

    @property
    def between_steps(self) -> bool:
        """True if no loss of the next step was computed yet."""
        return not self._parts

    def add(self, part: MicroBatch) -> int:
        """Keep a loss call until its step ends; returns its trained tokens."""
        n_tokens = part.n_tokens
        if self._parts and n_tokens and self._begins_a_mini_batch(part):
            self._record({})
            self.recorder.event("update_skipped", f"no optimizer stepped after the loss of step {self._number}")
        self._parts.append(part)
        self._n_tokens += n_tokens
        return n_tokens

    def _begins_a_mini_batch(self, part: MicroBatch) -> bool:
        before = self._parts[-1]
        if part.expected is None or before.expected is None:
            return False
        complete = part.n_ranks == 1 and self._n_tokens == before.expected
        return part.expected != before.expected or complete

    @harmless
    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._parts:
            return  # a critic's, or a further one of the same update
        if self._before is None:
            self._before = max(0, steps_made(optimizer) - 1)
        rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        self._record({"lr": float(rates[0])} if rates else {})

    @property
    def _number(self) -> int:
        return (self._before or 0) + self._updates

    def _record(self, columns: dict[str, float]) -> None:
        parts, self._parts, self._n_tokens = self._parts, [], 0
        self._updates += 1
        trained = [part for part in parts if part.batch is not None]
        losses = [part.loss for part in parts if part.loss is not None]
        self.recorder.record(
            self._number,
            concatenate([part.batch for part in trained if part.batch is not None]) if trained else None,
            loss=torch.stack([loss.float() for loss in losses]).sum() if len(losses) == len(parts) else None,
            sequences=_joined(trained),
            metrics=_metrics_of(parts),
            columns=columns,
        )


def _joined(parts: list[MicroBatch]) -> Sequences:
    everywhere = set.intersection(*(set(part.sequences) for part in parts)) if parts else set()
    given: dict[str, Any] = {name: [v for part in parts for v in part.sequences[name]] for name in everywhere}
    ids = given.get("sequence_id", [])
    if len(set(ids)) < len(ids):
        del given["sequence_id"]  # several outputs of one session
    return Sequences(**given)


def _metrics_of(parts: list[MicroBatch]) -> dict[str, float]:
    """verl's over the micro-batches, each as verl reduces it, under the names that verl logs; and of the weights."""
    values: dict[str, list[float]] = {}
    how: dict[str, str] = {}
    for part in parts:
        for name, metric in part.metrics.items():
            found = getattr(metric, "values", [metric])
            name = name if name.startswith("actor/") else f"actor/{name}"
            values.setdefault(name, []).extend(float(v) for v in found if isinstance(v, int | float))
            how[name] = getattr(getattr(metric, "aggregation", None), "value", "mean")
    metrics = {name: _JOIN[how[name]](found) for name, found in values.items() if found}
    policy_losses = [float(part.policy_loss) for part in parts if part.policy_loss is not None]
    if policy_losses:
        metrics["actor/pg_loss"] = math.fsum(policy_losses)
    weights = [part.weights for part in parts if part.weights is not None]
    if weights:
        all_of_them = torch.cat(weights)
        bounds = {"mean": all_of_them.mean(), "min": all_of_them.min(), "max": all_of_them.max()}
        metrics |= {f"mhpo/rollout_is_weight_{name}": float(value) for name, value in bounds.items()}
    return metrics
