"""From the micro-batches of a GRPOTrainer to one record per optimizer step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collectors.adapters.harmless import harmless
from collectors.adapters.trl_settings import (
    ends,
    objective_of,
    plain_settings,
    texts,
    unmasked,
    vocabulary,
)
from collectors.adapters.trl_versions import ENGINE, engine_column, engine_logps, engine_said, longest_completion
from collectors.recorder import Recorder
from mhpo_core.alarms import Alarm
from mhpo_core.batch import Sequences, TokenBatch, concatenate
from mhpo_core.gradients import GradientNorms, gradient_norms

_LOG = logging.getLogger(__name__)
ROW = "mhpo_sequence_id"
"""Rides with the completions through TRL's shuffling and splitting."""


class StepTelemetry:
    """What is known of the step in hand, and of the completions that are being trained on."""

    def __init__(self, trainer: Any, path: str | Path, options: dict[str, Any]) -> None:
        self._trainer = trainer
        accelerator = trainer.accelerator
        given = {
            "objective": objective_of(trainer.args), "config": {"trl": plain_settings(trainer.args)},
            "vocabulary": vocabulary(trainer),
            "rank": accelerator.process_index, "world_size": accelerator.num_processes,
        }  # fmt: skip
        self._open = partial(Recorder, path, **given | options)
        self.recorder = self._open()
        self.rewards: Tensor | None = None
        self._said: Any = None
        self.losses: list[Tensor] = []
        self._batches: list[TokenBatch] = []
        self._ids: list[Tensor] = []
        self._read: dict[str, Tensor] | None = None
        self._norms: GradientNorms | None = None
        self._known: dict[int, dict[str, Any]] = {}
        self._generations = 0
        self._told: set[str] = set()
        self._stopped_because = ""
        self._pending: tuple[int, dict[str, float]] | None = None
        self._ready: dict[str, Any] = {}
        trainer.add_callback(_boundaries(self))

    def reopen(self) -> None:
        """Continue the run if an earlier `train()` has ended it."""
        if self.recorder.closed:
            self.recorder = self._open()
        self._stopped_because = ""

    def take_critical(self) -> Alarm | None:
        """See `Recorder.take_critical`."""
        return self.recorder.take_critical()

    def event(self, kind: str, detail: str) -> None:
        """See `Recorder.event`."""
        self.recorder.event(kind, detail)

    def stopped(self, reason: str) -> None:
        """The run is about to end before its time, for this reason."""
        self._stopped_because = reason

    def __enter__(self) -> None:
        """While training, clipping tells the norms that it clips."""
        accelerator = self._trainer.accelerator
        self._clip: Callable[..., Any] = accelerator.clip_grad_norm_

        def clip(*args: Any, **kwargs: Any) -> Any:
            if getattr(accelerator, "scaler", None) is None:
                self.measure_gradients()
            return self._clip(*args, **kwargs)

        accelerator.clip_grad_norm_ = clip

    def __exit__(self, *error: object) -> None:
        self.flush()
        if self._stopped_because and not any(error):
            self.recorder.close("stopped", f"because of the {self._stopped_because}")
        del self._trainer.accelerator.clip_grad_norm_

    @harmless
    def measure_gradients(self) -> None:
        """Norms of the gradients as they are now, unless clipping has measured them before it changed them."""
        if self._norms is None:
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            self._norms = gradient_norms(model.named_parameters())

    @contextmanager
    def reading(self, width: int) -> Iterator[None]:
        """Read the log-probabilities of the forward passes that the loss makes.

        Args:
            width: of the completions.
        """
        self._read = {}

        def take(module: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
            if kwargs.get("fused_lm_head") and getattr(out, "log_probs", None) is not None:
                entropy = getattr(out, "entropy", None)
                self.saw(out.log_probs[:, -width:], None if entropy is None else entropy[:, -width:])

        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        handle = model.register_forward_hook(take, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def saw(self, logp: Tensor, entropy: Tensor | None) -> None:
        """Log-probabilities of a pass; the first with a graph within a loss is that of the policy being trained."""
        if self._read == {} and torch.is_grad_enabled():
            self._read = {"logp_new": logp.detach()}
            if entropy is not None:
                self._read["entropy"] = entropy.detach()

    @harmless
    def sampled(self, found: Any) -> None:
        """Note what the engine said of the completions; tools call it again, and extend the lists of the first call."""
        if self._said is None:
            self._said = engine_said(found)

    @harmless
    def generated(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        """Note rewards, groups and texts of new completions.

        Returns:
            What is to ride with the completions: their ids, unlike on any other rank, and the engine's column.
        """
        said, self._said = self._said, None
        n_rows, rank = len(found["completion_ids"]), self._trainer.accelerator.process_index
        everywhere = n_rows * self._trainer.accelerator.num_processes
        local = torch.arange(rank * n_rows, (rank + 1) * n_rows)
        ids = (local + self._generations * everywhere).tolist()
        group = self._trainer.num_generations
        rewards = self._rewards_of(local)
        width = found["completion_ids"].shape[1]
        mask = unmasked(self._trainer, found)
        lengths, left_out = mask.sum(dim=1).tolist(), (found["completion_mask"].sum(dim=1) == 0).tolist()
        prompts = texts(self._trainer, found["prompt_ids"], found["prompt_mask"])
        completions = texts(self._trainer, found["completion_ids"], mask)
        limit = longest_completion(self._trainer, width)
        ended = ends(self._trainer, found)
        self._known = {
            sequence: {
                "group_id": sequence // group, "reward": rewards[row], "prompt": prompts[row],
                "completion": completions[row],
                "truncated": left_out[row] or (not ended[row] and lengths[row] >= limit),
                "born": self._trainer.state.global_step,
            }
            for row, sequence in enumerate(ids)
        }  # fmt: skip
        self._generations += 1
        columns = {ROW: torch.tensor(ids, device=found["completion_ids"].device), ENGINE: engine_column(said, found)}
        return {name: column for name, column in columns.items() if column is not None}

    def _rewards_of(self, rows: Tensor) -> list[float]:
        if self.rewards is None or len(self.rewards) <= int(rows.max()):
            return [math.nan] * len(rows)
        weights = getattr(self._trainer, "reward_weights", None)
        each = self.rewards[rows.to(self.rewards.device)].detach().float()
        if weights is not None:
            each = each * weights.to(each.device)
        # as TRL does: a function that gives no reward to a row counts as 0
        return [float(v) for v in each.nansum(dim=1).tolist()]

    @harmless
    def keep(self, inputs: Mapping[str, Any]) -> None:
        """The tokens of a micro-batch whose loss has just been computed."""
        read, self._read = self._read, None
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        if not read:
            self._without("tokens", "the loss read no log-probabilities that can be seen, as with use_liger_loss")
            return
        rollout = engine_logps(inputs)
        if rollout is None and getattr(self._trainer, "use_vllm", False):
            self._without("logp_rollout", "this version of TRL does not hand on the log-probabilities of vLLM")
        if not bool(mask.any()):
            return
        logp_new = read["logp_new"]
        old = inputs.get("old_per_token_logps")
        self._batches.append(
            TokenBatch(
                logp_new=logp_new, logp_old=logp_new if old is None else old, advantage=inputs["advantages"],
                mask=mask, logp_rollout=rollout,
                logp_ref=inputs.get("ref_per_token_logps"), entropy=read.get("entropy"),
                token_id=inputs["completion_ids"],
            )
        )  # fmt: skip
        if ROW in inputs:
            self._ids.append(inputs[ROW])

    def _without(self, what: str, reason: str) -> None:
        """Say once that something is not recorded."""
        if what not in self._told:
            self._told.add(what)
            _LOG.warning("trl: %s; steps are recorded without their %s.", reason, what)
            self.recorder.event("dropped", f"{what}: {reason}")

    @harmless
    def step_ended(self, step: int) -> None:
        """Gather what belongs to the optimizer step that has just been made; its scalars are logged after this."""
        self.flush()
        self._pending = (step, {})
        sequence_id = torch.cat(self._ids).tolist() if len(self._ids) == len(self._batches) and self._ids else None
        norms = self._norms
        self._ready = {
            "batch": concatenate(self._batches) if self._batches else None,
            "loss": torch.stack([loss.float() for loss in self.losses]).sum() if self.losses else None,
            "gradient_norms": norms if norms is not None and norms.by_group else None,
            "sequences": self._sequences(sequence_id, step) if sequence_id else None,
        }
        self._batches, self._ids, self.losses, self._norms = [], [], [], None

    def _sequences(self, ids: list[int], step: int) -> Sequences:
        known = [self._known.get(one, {}) for one in ids]
        fields = ("reward", "truncated", "prompt", "completion")
        given: dict[str, Any] = {name: [k.get(name) for k in known] for name in fields}
        lag = [step - 1 - k.get("born", step - 1) for k in known]
        return Sequences(sequence_id=ids, group_id=[k.get("group_id", -1) for k in known], policy_lag=lag, **given)

    @harmless
    def logged(self, step: int, logs: Mapping[str, Any]) -> None:
        """Scalars that TRL logs about the step that has just ended."""
        if self._pending is not None and self._pending[0] == step:
            self._pending[1].update({n: float(v) for n, v in logs.items() if isinstance(v, int | float)})

    @harmless
    def flush(self) -> None:
        """Record the step that ended, with what was logged about it."""
        if self._pending is None:
            return
        (step, metrics), ready = self._pending, self._ready
        self._pending, self._ready = None, {}
        metrics.pop("loss", None)  # a NaN would be 0.0 there
        columns = {"lr": metrics["learning_rate"]} if "learning_rate" in metrics else {}
        batch = ready.pop("batch")
        if ready["gradient_norms"] is None and "grad_norm" in metrics:
            ready["grad_norm"] = metrics["grad_norm"]
        self.recorder.record(step, batch, metrics=metrics, columns=columns, **ready)


def _boundaries(telemetry: StepTelemetry) -> Any:
    from transformers import TrainerCallback

    class Boundaries(TrainerCallback):
        """Tells the telemetry where a step begins and ends."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            telemetry.flush()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            telemetry.measure_gradients()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            telemetry.step_ended(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            telemetry.logged(state.global_step, logs or {})

    return Boundaries()
