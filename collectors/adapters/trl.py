"""TRL's GRPOTrainer: `attach(trainer, "runs/my-run")` records every optimizer step and changes nothing of the training.

    trainer = GRPOTrainer(...)
    attach(trainer, "runs/my-run")
    trainer.train()

Steps have the numbers that TRL logs, from 1 on. A step's tokens are those of all its micro-batches; the policy being
trained is read where the loss reads it, by a forward hook where TRL has its fused head (1.15 and later), before that by
one private method; `trl_versions` has the other differences between versions. The loss is the one that was trained on:
transformers logs a NaN as 0.0, here it stays NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collectors.adapters.trl_actions import acting, require_action
from collectors.adapters.trl_settings import objective_of
from collectors.adapters.trl_steps import StepTelemetry
from collectors.adapters.trl_versions import refuse_others
from collectors.recorder import Recorder

__all__ = ["RecordsTelemetry", "attach", "objective_of"]


def attach(trainer: Any, path: str | Path, *, on_critical: str | None = None, **options: Any) -> Recorder:
    """Record a trainer that is already made; call it before `train()`.

    Args:
        trainer: a GRPOTrainer or a subclass of it.
        path: the run folder, created or continued.
        on_critical: what a critical alarm has the trainer do, once per incident: "stop" ends training cleanly, "save"
            saves a checkpoint, "lower-lr" halves the learning rate; None = nothing. It happens at the end of a later
            step, usually the next, since an alarm is found in another thread after TRL has logged its step.
        options: of `Recorder`; `objective` is by default the one that the trainer's arguments describe.

    Raises:
        ConfigError: the trainer is no GRPOTrainer, or on_critical cannot be done.
        StoreError: the run folder cannot be written.
    """
    kind = type(trainer)
    if not isinstance(trainer, RecordsTelemetry):
        refuse_others(trainer)
        trainer.__class__ = type(kind.__name__, (RecordsTelemetry, kind), {"__module__": kind.__module__})
    recorder: Recorder = trainer.record_to(path, on_critical=on_critical, **options)
    return recorder


class RecordsTelemetry:
    """Mixin in front of GRPOTrainer, `class MyTrainer(RecordsTelemetry, GRPOTrainer)`; records after `record_to`."""

    telemetry: StepTelemetry | None = None

    def record_to(self, path: str | Path, *, on_critical: str | None = None, **options: Any) -> Recorder:
        """Record into a run folder from now on; see `attach`."""
        refuse_others(self)
        if on_critical is not None:
            n_ranks = self.accelerator.num_processes  # type: ignore[attr-defined]
            require_action(on_critical, n_ranks=n_ranks, watched=options.get("alarms", "") is not None)
        telemetry = self.telemetry = StepTelemetry(self, path, options)
        if on_critical is not None:
            callback = acting(on_critical, telemetry.take_critical, telemetry.event, telemetry.stopped)
            self.add_callback(callback)  # type: ignore[attr-defined]
        return telemetry.recorder

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and note how it ended."""
        if self.telemetry is None:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        self.telemetry.reopen()
        with self.telemetry.recorder, self.telemetry:
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A micro-batch; what it returns is what the logged loss is summed from."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.telemetry is not None:
            self.telemetry.losses.append(loss.detach())
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch, whose tokens are kept until the step ends."""
        if self.telemetry is None or not self.model.training:  # type: ignore[attr-defined]
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        with self.telemetry.reading(inputs["completion_ids"].shape[1]):
            loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.telemetry.keep(inputs)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        if self.telemetry is not None:
            self.telemetry.saw(found[0], found[1])
        return found

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._generate_and_score_completions(*args, **kwargs)  # type: ignore[misc]
        if self.telemetry is not None and self.model.training:  # type: ignore[attr-defined]
            found.update(self.telemetry.generated(found) or {})
        return found

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]
        if self.telemetry is not None and self.model.training:  # type: ignore[attr-defined]
            self.telemetry.sampled(found)
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        if self.telemetry is not None:
            self.telemetry.rewards = found
        return found
