"""The training loop: sample, judge, update, record.

Left out on purpose: several devices, a reference policy and a separate inference engine. They belong to the
frameworks whose runs `collectors` records; this loop is here to be read and to make telemetry with a known cause.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhpo_core.errors import StoreError
from mhpo_core.gradients import GradientNorms, clip_gradients
from mhpo_core.sink import Sink
from mhpo_core.training import checkpoint as checkpoints
from mhpo_core.training.checkpoint import Position
from mhpo_core.training.config import Config
from mhpo_core.training.experience import Experience, collect
from mhpo_core.training.intervention import CHECKPOINT, LOWER_LR, LR_FACTOR, STOP, Intervene
from mhpo_core.training.model import build_policy, resolve_device
from mhpo_core.training.randomness import seeded
from mhpo_core.training.tasks import Task
from mhpo_core.training.update import accumulate_gradient
from mhpo_core.training.warm_start import warm_start

Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended.

    Args:
        steps: optimizer steps recorded, those before a resume too.
        skipped_steps: of them, not taken because the loss or a gradient was NaN or ±Inf.
        iterations: rollouts completely trained.
        stopped: ended by `stop` or an intervention before the last iteration.
        reason: that of the intervention which ended it, empty if none did.
        rewards: mean reward of every iteration that sampled, the last one perhaps not completely trained.
        seconds: wall time of this call.
    """

    steps: int
    skipped_steps: int
    iterations: int
    stopped: bool
    rewards: tuple[float, ...]
    seconds: float
    reason: str = ""

    @property
    def final_reward(self) -> float:
        """Mean reward of the last tenth of the iterations, at least one; NaN when none was trained."""
        last = self.rewards[-max(1, len(self.rewards) // 10) :]
        return sum(last) / len(last) if last else math.nan


def open_task(config: Config) -> Task:
    """The task of the configuration; `decode_token` of it gives the text of a token id.

    Raises:
        ConfigError, DataError: see the task.
    """
    return config.task.open(config.model.path)


def train(
    config: Config,
    sink: Sink,
    device: str | torch.device = "auto",
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    intervene: Intervene | None = None,
    checkpoint: Path | None = None,
    resume: Path | None = None,
) -> TrainingSummary:
    """Train, and hand every optimizer step to the sink.

    Args:
        sink: gets one `record` per optimizer step, counted from 0, and an event when the warm start begins.
        device: auto, cpu or cuda.
        progress: called as progress(phase, done, total, info) after every step; phase is warm_start or train.
        stop: asked before every step; True ends the run cleanly.
        intervene: asked before every step too, what to do to the run; an event says what was done.
        checkpoint: folder for checkpoints; none are written without it. One that an intervention asks for is saved
            beside it, as <folder>-alarm-<step>.
        resume: folder of the checkpoint to continue from.

    Raises:
        ConfigError, DataError: the model or the task cannot be opened, or the checkpoint has other settings.
        StoreError: a checkpoint cannot be read or written.
    """
    started = time.perf_counter()
    trainer = _Trainer(config, sink, resolve_device(device), progress or _ignore, stop or _never, intervene or _nothing)
    if resume is not None:
        trainer.resume(resume)
    stopped = trainer.run(checkpoint)
    position = trainer.position
    return TrainingSummary(
        steps=position.step,
        skipped_steps=position.skipped_steps,
        iterations=position.iteration,
        stopped=stopped,
        rewards=tuple(position.rewards),
        seconds=time.perf_counter() - started,
        reason=trainer.stopped_because,
    )


class _Trainer:
    """One run: what it works with, and how far it is."""

    def __init__(
        self,
        config: Config,
        sink: Sink,
        device: torch.device,
        progress: Progress,
        stop: Callable[[], bool],
        intervene: Intervene,
    ) -> None:
        self.config, self.sink, self.progress, self.stop = config, sink, progress, stop
        self.intervene, self.stopped_because, self.aside_because = intervene, "", ""
        self.task = open_task(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.policy = build_policy(config.model, self.task, device)
        self.objective = config.objective.create()
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.policy.model.parameters(),
            settings.lr,
            (settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.position = Position()

    def resume(self, folder: Path) -> None:
        self.position = checkpoints.restore(folder, self.config, self.policy.model, self.optimizer)
        self.sink.event("resumed", f"from the checkpoint before step {self.position.step}")

    def run(self, checkpoint: Path | None) -> bool:
        """True if it was stopped."""
        if self.position.step == 0 and self.warm_start():
            return True
        every = self.config.checkpoint.every
        for iteration in range(self.position.iteration, self.config.iterations):
            stopped = self.intervened()
            self.save_aside(checkpoint)
            if stopped or self.iterate(iteration):
                return True
            self.position.iteration = iteration + 1
            last = iteration + 1 == self.config.iterations
            if checkpoint and (last or (every and (iteration + 1) % every == 0)):
                checkpoints.save(checkpoint, self.config, self.policy.model, self.optimizer, self.position)
        self.save_aside(checkpoint)
        return False

    def intervened(self) -> bool:
        """Do what is asked for; True if that ends the run."""
        asked = self.intervene()
        if asked is None:
            return False
        done = {STOP: self._end, CHECKPOINT: self._want_aside, LOWER_LR: self._lower_lr}[asked.action](asked.reason)
        self.sink.event("alarm_action", f"{asked.action} before step {self.position.step}, {asked.reason}: {done}")
        return bool(self.stopped_because)

    def _end(self, reason: str) -> str:
        self.stopped_because = reason
        return "the run ends"

    def _want_aside(self, reason: str) -> str:
        # a checkpoint within an iteration could not be continued from: its rollouts are not in it
        self.aside_because = reason
        return "a checkpoint is saved aside when the iteration ends"

    def _lower_lr(self, reason: str) -> str:
        self.position.lr_factor *= LR_FACTOR
        return f"the learning rate is that of the schedule times {self.position.lr_factor:g} from now on"

    def save_aside(self, checkpoint: Path | None) -> None:
        """Save the checkpoint that an intervention asked for; training goes on where it cannot be saved."""
        reason, self.aside_because = self.aside_because, ""
        if not reason:
            return
        if checkpoint is None:
            self.sink.event("alarm_action", f"checkpoint, {reason}: nothing is saved, this run writes no checkpoints")
            return
        folder = checkpoints.aside(checkpoint, self.position.step)
        if (folder / checkpoints.FILE_NAME).exists():
            self.sink.event("alarm_action", f"checkpoint, {reason}: {folder.name} is there already and stays")
            return
        try:
            checkpoints.save(folder, self.config, self.policy.model, self.optimizer, self.position)
            self.sink.event("alarm_action", f"checkpoint, {reason}: saved as {folder.name}")
        except StoreError as error:
            self.sink.event("alarm_action", f"checkpoint, {reason}: {error}")

    def warm_start(self) -> bool:
        settings = self.config.warm_start
        stopped = self.stop()
        if settings.steps == 0 or stopped:
            return stopped
        self.sink.event("warm_start", f"{settings.steps} supervised steps of {settings.batch_size} examples")

        def on_step(done: int, loss: float) -> bool:
            nonlocal stopped
            self.progress("warm_start", done, settings.steps, {"loss": loss})
            stopped = self.stop()
            return stopped

        warm_start(self.policy, self.task, settings, self.config.seed, on_step)
        return stopped

    def iterate(self, iteration: int) -> bool:
        if self.stop():
            return True
        experience = collect(self.policy, self.task, self.config, iteration)
        self.position.rewards.append(float(experience.reward.mean()))
        generator = seeded("cpu", self.config.seed, "minibatches", iteration)
        for epoch in range(self.config.optimizer.epochs):
            order = torch.randperm(len(experience.reward), generator=generator).to(self.policy.device)
            for minibatch, rows in enumerate(order.chunk(self.config.optimizer.minibatches)):
                if self.stop() or self.intervened():
                    return True
                self.update(experience, rows, epoch, minibatch)
        return False

    def update(self, experience: Experience, rows: Tensor, epoch: int, minibatch: int) -> None:
        config = self.config
        batch, loss = accumulate_gradient(
            self.policy,
            self.objective,
            experience,
            rows,
            aggregation=config.objective.resolved_aggregation,
            loss_scale=float(config.rollout.max_new_tokens),
            temperature=config.rollout.temperature,
            micro_batch_size=config.optimizer.micro_batch_size,
        )
        norms = clip_gradients(self.policy.model.named_parameters(), config.optimizer.max_grad_norm)
        lr = self.step_optimizer(loss, norms, experience.iteration)
        lag = epoch * config.optimizer.minibatches + minibatch
        metrics = {
            "lr": lr,
            "iteration": experience.iteration,
            "epoch": epoch,
            "minibatch": minibatch,
            "reward_batch_mean": self.position.rewards[-1],
            "skipped_steps": self.position.skipped_steps,
        }
        if config.fault.has_proxy:
            metrics["true_reward_mean"] = float(experience.true_reward[rows].mean())
        self.sink.record(
            self.position.step,
            batch,
            loss=loss,
            reward=experience.reward[rows],
            grad_norm=norms.total,
            gradient_norms=norms,
            sequences=experience.sequences(rows, config.rollout.group_size, lag),
            metrics=metrics,
        )
        self.position.step += 1
        self.report(loss, norms, lr)

    def step_optimizer(self, loss: float, norms: GradientNorms, iteration: int) -> float:
        """Step and return the learning rate; a NaN or ±Inf would destroy the weights for good, so it skips."""
        lr = self.learning_rate(iteration)
        if math.isfinite(loss) and math.isfinite(norms.total):
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        else:
            self.position.skipped_steps += 1
        self.optimizer.zero_grad()
        return lr

    def learning_rate(self, iteration: int) -> float:
        """Linear warm-up, linear decay to lr_final, times the factors of the fault and of interventions."""
        settings, step = self.config.optimizer, self.position.step
        warmup = min(1.0, (step + 1) / max(1, settings.lr_warmup))
        done = step / (self.config.iterations * self.config.updates_per_iteration)
        factor = self.config.fault.lr_factor(iteration) * self.position.lr_factor
        return settings.lr * warmup * (1 - (1 - settings.lr_final) * done) * factor

    def report(self, loss: float, norms: GradientNorms, lr: float) -> None:
        total = self.config.iterations * self.config.updates_per_iteration
        info = {"reward": self.position.rewards[-1], "loss": loss, "grad_norm": norms.total, "lr": lr}
        self.progress("train", self.position.step, total, info)


def _ignore(*_: Any) -> None:
    pass


def _never() -> bool:
    return False


def _nothing() -> None:
    return None
