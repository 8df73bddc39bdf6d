"""From the loss calls of a worker to one record per optimizer step.

A loss call is a micro-batch, and nothing tells it where a step ends: that is when an optimizer has stepped. Where a
framework leaves an update out because the gradient is not finite, no optimizer steps; the next mini-batch then tells
it, by its number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from collectors.adapters.harmless import harmless
from collectors.recorder import Recorder
from mhpo_core.batch import Sequences, TokenBatch, concatenate
from mhpo_core.gradients import GradientNorms

_JOIN: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values), "sum": math.fsum, "min": min, "max": max,
}  # fmt: skip


@dataclass
class MicroBatch:
    """What one loss call knows.

    Args:
        batch: its tokens; None where none trains.
        loss: what is differentiated, None where it is not known; those of a step are summed.
        metrics: name → how the micro-batches of a step become one ("mean", "sum", "min" or "max"), and values.
        weights: importance weights at the trained tokens, (N,); they multiply the loss, not the advantage.
        sequences: fields of `Sequences`, one entry per row each.
        expected: trained tokens of the whole mini-batch on all data-parallel ranks; None where nobody says.
        n_ranks: that share the mini-batch.
    """

    batch: TokenBatch | None
    loss: Tensor | None = None
    metrics: Mapping[str, tuple[str, Sequence[float | Tensor]]] = field(default_factory=dict)
    weights: Tensor | None = None
    sequences: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    expected: int | None = None
    n_ranks: int = 1

    @property
    def n_tokens(self) -> int:
        """Trained tokens."""
        return 0 if self.batch is None else int(self.batch.mask.sum())


class StepTelemetry:
    """Collects loss calls until an optimizer steps, then records them as one step."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._parts: list[MicroBatch] = []
        self._n_tokens = 0
        self._updates = 0
        self._before: int | None = None
        self._norms: GradientNorms | None = None
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

    def measured(self, norms: GradientNorms) -> None:
        """Keep the gradient norms of the update that is about to be made."""
        if self._parts:  # else a critic's, or those of another training
            self._norms = norms

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
        norms, self._norms = self._norms, None
        self._updates += 1
        trained = [part for part in parts if part.batch is not None]
        losses = [part.loss for part in parts if part.loss is not None]
        self.recorder.record(
            self._number,
            concatenate([part.batch for part in trained if part.batch is not None]) if trained else None,
            loss=torch.stack([loss.float() for loss in losses]).sum() if len(losses) == len(parts) else None,
            sequences=_joined(trained),
            gradient_norms=norms,
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
    """Those of the micro-batches, each as its framework reduces it, and of the weights."""
    values: dict[str, list[float]] = {}
    how: dict[str, str] = {}
    for part in parts:
        for name, (rule, found) in part.metrics.items():
            values.setdefault(name, []).extend(float(v) for v in found)
            how[name] = rule
    metrics = {name: _JOIN[how[name]](found) for name, found in values.items() if found}
    weights = [part.weights for part in parts if part.weights is not None]
    if weights:
        all_of_them = torch.cat(weights)
        bounds = {"mean": all_of_them.mean(), "min": all_of_them.min(), "max": all_of_them.max()}
        metrics |= {f"mhpo/rollout_is_weight_{name}": float(value) for name, value in bounds.items()}
    return metrics


def steps_made(optimizer: Any) -> int:
    """Steps that an Adam has made, those before a checkpoint too; 0 for an optimizer that does not count."""
    of_parameter: Mapping[str, Any] = next(iter(optimizer.state.values()), {})
    of_group: Mapping[str, Any] = next(iter(optimizer.param_groups), {})
    return int(of_parameter.get("step", of_group.get("step", 0)))
