"""Any transformers Trainer: a callback that records its scalars and the gradient norms of its layers.

    trainer = Trainer(..., callbacks=[ScalarsAndGradients("runs/my-run")])

A callback sees no tokens; for those use an adapter of the trainer, or `Recorder.record`. It sees gradients after
clipping, which multiplied all of them by one number: where transformers logs the norm before clipping (logging_steps=1)
the norms of the layers are those before clipping too, elsewhere they are not recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from collectors.recorder import Recorder
from mhpo_core.gradients import GradientNorms, gradient_norms


class ScalarsAndGradients(TrainerCallback):
    """Records one row per optimizer step, under the number that transformers logs.

    Args:
        path: the run folder, created or continued.
        options: of `Recorder`; `objective` is by default "grpo".
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.recorder = Recorder(path, **{"objective": "grpo"} | options)
        self._norms: GradientNorms | None = None
        self._clips = False
        self._step: int | None = None
        self._logs: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure the gradients that the step is about to use."""
        self._clips = bool(args.max_grad_norm)
        self._norms = gradient_norms(model.named_parameters())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the record of the step; its scalars are logged after this."""
        self._flush()
        self._step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Take the scalars of the step."""
        if self._step == state.global_step:
            self._logs |= {name: float(v) for name, v in (logs or {}).items() if isinstance(v, int | float)}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the step before."""
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the last step and give the folder back."""
        self._flush()
        self.recorder.close()

    def _flush(self) -> None:
        if self._step is None or self.recorder.closed:
            return
        logs, norms, before = self._logs, self._norms, self._logs.get("grad_norm")
        if norms is not None and before is not None:
            norms = _scaled(norms, before)
        elif self._clips:
            norms = None
        loss = logs.get("loss")
        if loss == 0.0 and before is not None and math.isnan(before):
            loss = math.nan  # transformers logs it as 0.0
        self.recorder.record(
            self._step, None, metrics=logs, loss=loss, grad_norm=before,
            columns={"lr": logs["learning_rate"]} if "learning_rate" in logs else {},
            gradient_norms=norms if norms is not None and norms.by_group else None,
        )  # fmt: skip
        self._step, self._logs, self._norms = None, {}, None


def _scaled(norms: GradientNorms, total: float) -> GradientNorms:
    """The norms as they were before all gradients were multiplied by one number."""
    if not (math.isfinite(total) and norms.total > 0):
        return norms
    return replace(norms, total=total, by_group={n: v * total / norms.total for n, v in norms.by_group.items()})
