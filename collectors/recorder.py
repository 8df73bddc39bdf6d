"""Recorder: the training thread hands a step over and goes on; a writer thread measures, encodes and commits it."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collectors import layout, schema
from collectors.intake import owned_batch, owned_sequences, sequence_scalars, trainer_scalars
from collectors.schema import StepKey, StepScalars
from collectors.store import StoreWriter
from mhpo_core import objectives
from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.errors import BatchError, StoreError
from mhpo_core.gradients import GradientNorms
from mhpo_core.objectives import Objective
from mhpo_core.telemetry import Scalar, StepTelemetry, measure

_LOG = logging.getLogger(__name__)

# Steps that may wait with all their tokens; beyond it only their summaries wait, beyond the second they are dropped.
TOKENS_MAY_WAIT = 32
SUMMARIES_MAY_WAIT = 1024


@dataclass(frozen=True)
class _Step:
    """A step on its way to the writer thread, all tensors owned by it and on the CPU."""

    key: StepKey
    wall_time: float
    batch: TokenBatch | None
    sequences: Sequences
    sequence_id: NDArray[np.int64]
    trainer: StepScalars
    telemetry: StepTelemetry | None
    scalars: dict[str, Scalar]


@dataclass(frozen=True)
class _Event:
    kind: str
    detail: str


class Recorder:
    """Writes the telemetry of a training run into a run folder. Implements `mhpo_core.sink.Sink`.

    `record` copies the step's tensors to the CPU and returns; everything else happens in one writer thread. If the
    disk cannot keep up, tokens are dropped and counted before anything else is; training is never blocked and never
    fails because of a disk.

    Args:
        path: the run folder; created, or continued if it holds a run.
        objective: the objective that trains, or its name.
        config: anything JSON that describes the run; stored in run.json.
        updates_per_iteration: optimizer steps per batch of rollouts; the dashboard then draws them as one column.
        vocabulary: token id → text, so that tokens can be read.
        fsync: reach the disk at every commit; False is faster and survives a killed process but not a power cut.

    Raises:
        StoreError: the folder cannot be written, is no run, or has another live writer.
        ObjectiveError: unknown objective.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        objective: Objective | str,
        config: Mapping[str, Any] | None = None,
        updates_per_iteration: int = 1,
        vocabulary: Mapping[int, str] | None = None,
        fsync: bool = True,
    ) -> None:
        self.objective = objectives.create(objective) if isinstance(objective, str) else objective
        # a training script may change its working directory later
        self.path = Path(path).absolute()
        self._store = StoreWriter(self.path, self._manifest(config, updates_per_iteration), vocabulary, fsync=fsync)
        self._attempt, self._last_step = self._store.attempt, self._store.last_step
        self._sequences_seen = self._store.next_sequence_id
        # steps that found no place in the queue, that could not be written, and those of both an event tells about
        self._overflowed = self._unwritten = self._reported = 0
        self._failure: Exception | None = None
        self._queue: queue.SimpleQueue[_Step | _Event | None] = queue.SimpleQueue()
        self._thread = _start_on_one_core(self._write_until_closed)
        self._closed = False
        atexit.register(self.close, "stopped", "the process exited without closing the recorder")
        self.event("resumed" if self._store.resumed else "started", f"pid {os.getpid()} on {socket.gethostname()}")

    def _manifest(self, config: Mapping[str, Any] | None, updates_per_iteration: int) -> dict[str, Any]:
        return {
            "run_id": self.path.name,
            "created": time.time(),
            "objective": {"name": self.objective.name, "hyperparameters": self.objective.hyperparameters()},
            "on_policy": self.objective.on_policy_terms(),
            "updates_per_iteration": updates_per_iteration,
            "config": dict(config or {}),
            "environment": _environment(),
        }

    def record(
        self,
        step: int,
        batch: TokenBatch,
        *,
        loss: float | Tensor | None = None,
        reward: Tensor | Sequence[float] | None = None,
        grad_norm: float | Tensor | None = None,
        gradient_norms: GradientNorms | Mapping[str, float] | None = None,
        sequences: Sequences | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Hand over one optimizer step. A step number that does not rise opens a new attempt at it.

        Args:
            step: optimizer step, ≥ 0.
            batch: its tokens; nothing is kept of the caller's tensors, they may change afterwards.
            loss: as the trainer computed it, NaN and ±Inf too.
            reward: one per sequence, (B,).
            grad_norm: global L2 norm before clipping.
            gradient_norms: parameter group → L2 norm before clipping.
            sequences: what is known about each sequence.
            metrics: the trainer's own scalars; `lr`, `loss` and `grad_norm` also fill the column of that name.

        Raises:
            BatchError: step is negative, a per-sequence field does not have one fitting entry per row, or a scalar is
                no number.
            StoreError: the recorder is closed.
        """
        began = time.perf_counter()
        if self._closed:
            raise StoreError(
                f"Recorder.record: {self.path} is closed. Record before close() and inside the with block."
            )
        sequences = owned_sequences(sequences or Sequences(), reward, batch.n_sequences)
        trainer = trainer_scalars(loss, grad_norm, gradient_norms, metrics or {})
        key = self._key_of(step)
        waiting = self._queue.qsize()
        if waiting >= SUMMARIES_MAY_WAIT:
            self._overflowed += 1
            return
        owned = owned_batch(batch)
        dropped, telemetry = 0, None
        if waiting >= TOKENS_MAY_WAIT:
            telemetry, dropped = measure(owned, self.objective), int(owned.mask.sum())
        scalars = sequence_scalars(sequences) | {
            "loss": trainer.loss, "lr": trainer.metrics.get("lr"), "grad_norm": trainer.grad_norm,
            "dropped_tokens": dropped,
        }  # fmt: skip
        item = _Step(
            key, time.time(), None if dropped else owned, sequences, self._sequence_ids(sequences, batch.n_sequences),
            trainer, telemetry, scalars,
        )  # fmt: skip
        scalars["recorder_ms"] = (time.perf_counter() - began) * 1e3
        self._queue.put(item)

    def event(self, kind: str, detail: str = "") -> None:
        """Note that something happened to the run."""
        self._queue.put(_Event(kind, detail))

    def close(self, kind: str = "finished", detail: str = "") -> None:
        """Write everything that waits, note how the run ended, give the folder back. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self.event(kind, detail)
        self._queue.put(None)
        self._thread.join()
        self._store.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif isinstance(error, SystemExit) and not error.code:
            self.close("stopped", "the process exited")
        elif issubclass(kind, KeyboardInterrupt):
            self.close("stopped", "interrupted")
        else:
            self.close("failed", f"{kind.__name__}: {error}")

    def _key_of(self, step: int) -> StepKey:
        if not isinstance(step, int | np.integer) or step < 0:
            raise BatchError(
                f"Recorder.record: step is {step!r}, allowed are integers ≥ 0. Count optimizer steps from 0."
            )
        if step <= self._last_step:
            self._attempt += 1
            self.event("rewound", f"from step {self._last_step} to step {step}, attempt {self._attempt}")
        self._last_step = int(step)
        return StepKey(int(step), self._attempt)

    def _sequence_ids(self, sequences: Sequences, n_sequences: int) -> NDArray[np.int64]:
        if sequences.sequence_id is not None:
            return np.asarray(sequences.sequence_id, dtype=np.int64)
        first, self._sequences_seen = self._sequences_seen, self._sequences_seen + n_sequences
        return np.arange(first, first + n_sequences, dtype=np.int64)

    def _write_until_closed(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, _Event):
                self._try(self._report_dropped)
                self._try(self._store.event, item.kind, item.detail)
            elif not self._try(self._commit, item):
                self._unwritten += 1
            elif self._queue.empty():
                self._try(self._report_dropped)
        self._try(self._store.seal)

    def _report_dropped(self) -> None:
        dropped = self._overflowed + self._unwritten
        if dropped > self._reported:
            why = f"writing failed: {self._failure}" if self._failure else "the disk could not keep up"
            self._store.event("dropped", f"{dropped - self._reported} steps: {why}")
            self._reported, self._failure = dropped, None

    def _commit(self, item: _Step) -> None:
        self._store.commit_step(item.key, self._tables(item))

    def _tables(self, item: _Step) -> dict[str, Any]:
        telemetry = item.telemetry
        tables = {}
        if item.batch is not None:
            telemetry = measure(item.batch, self.objective)
            tables[layout.TOKENS] = schema.token_table(item.key, item.batch, telemetry, item.sequence_id)
            tables[layout.SEQUENCES] = schema.sequence_table(item.key, item.batch, item.sequences, item.sequence_id)
        assert telemetry is not None
        tables[layout.ROLLUP] = schema.rollup_table(
            item.key, item.wall_time, telemetry.scalars | item.scalars, telemetry.histograms, item.trainer
        )
        return tables

    def _try(self, action: Callable[..., None], *arguments: Any) -> bool:
        try:
            action(*arguments)
            return True
        except Exception as error:  # the trainer must go on whatever happens to its telemetry
            if self._failure is None:
                _LOG.warning("Recorder: a step of %s could not be written (%s); training goes on.", self.path, error)
            self._failure = error
            return False


def _start_on_one_core(work: Callable[[], None]) -> threading.Thread:
    """A thread whose tensor operations use no second core.

    Otherwise OpenMP gives it a team of its own, whose threads spin on the cores that the trainer's team needs: on two
    cores that cost a third of the trainer's speed, for 16 ms of work per step.
    """
    trainer_threads = torch.get_num_threads()
    limited = threading.Event()

    def run() -> None:
        torch.get_num_threads()  # a thread takes the process's number at its first operation; take it now, then change
        torch.set_num_threads(1)
        limited.set()
        work()

    thread = threading.Thread(target=run, name="mhpo-recorder", daemon=True)
    thread.start()
    limited.wait()
    torch.set_num_threads(trainer_threads)  # the number of the process, which the new thread has changed too
    return thread


def _environment() -> dict[str, Any]:
    packages = {}
    for name in ("mhpo", "torch", "transformers", "trl", "verl", "duckdb", "pyarrow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    python, host = sys.version.split()[0], socket.gethostname()
    return {"python": python, "platform": platform.platform(), "host": host, "packages": packages}
