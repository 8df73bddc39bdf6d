"""TRL adapter: its share of the training thread of a real GRPOTrainer

A Llama of 2.4 million parameters, 16 completions of at most 48 tokens a step, one thread. The share is the CPU time
that the training thread spends in the adapter and in `Recorder.record`, divided by that of the whole training step,
generation included; "loss and update alone" leaves generation out of the step.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS, WARM = 12, 2
_SHAPE = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5}
_WORK = ("generated", "keep", "step_ended", "flush", "measure_gradients", "saw")


def run() -> Iterator[str]:
    """One row per way of generating."""
    os.environ["CI"] = "1"
    from collectors.adapters.trl import attach
    from tests.collectors.adapters.tiny_trl import build

    torch.set_num_threads(1)
    yield "| generation every | step, ms CPU | adapter, ms CPU | of the step | of loss and update alone |"
    yield "|---|---|---|---|---|"
    for iterations in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            trainer = build(
                f"{folder}/out", max_steps=STEPS, num_iterations=iterations, per_device_train_batch_size=16,
                gradient_accumulation_steps=1, max_completion_length=48, shape=_SHAPE,
            )  # fmt: skip
            attach(trainer, Path(folder) / "run")
            steps, spent, generating = _measured(trainer)
            trainer.train()
        share = [100 * s / t for s, t in zip(spent[WARM:], steps[WARM:], strict=False)]
        alone = [100 * s / (t - g) for s, t, g in zip(spent[WARM:], steps[WARM:], generating[WARM:], strict=False)]
        yield (
            f"| {iterations} step{'s' if iterations > 1 else ''} | {np.median(steps[WARM:]) * 1e3:.0f} | "
            f"{np.median(spent[WARM:]) * 1e3:.2f} | {np.median(share):.2f} % | {np.median(alone):.2f} % |"
        )


def _measured(trainer: Any) -> tuple[list[float], list[float], list[float]]:
    """CPU seconds of each training step, of the adapter in it, and of generation in it."""
    now = {"adapter": 0.0, "generation": 0.0, "step": time.thread_time()}
    steps: list[float] = []
    spent: list[float] = []
    generating: list[float] = []

    def timed(action: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(action)
        def spy(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return action(*args, **kwargs)
            finally:
                now[name] += time.thread_time() - began

        return spy

    telemetry = trainer.telemetry
    for name in _WORK:
        setattr(telemetry, name, timed(getattr(telemetry, name), "adapter"))
    trainer._generate = timed(trainer._generate, "generation")
    ended = telemetry.step_ended

    def step_ended(step: int) -> None:
        ended(step)
        steps.append(time.thread_time() - now["step"])
        spent.append(now["adapter"])
        generating.append(now["generation"])
        now.update(adapter=0.0, generation=0.0, step=time.thread_time())

    telemetry.step_ended = step_ended
    return steps, spent, generating
