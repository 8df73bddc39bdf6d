"""Recorder: the training thread hands a step over and goes on; other threads measure, encode and commit it."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from collectors.formulas import derivation
from collectors.intake import batch_bytes, owned_batch, owned_sequences, sequence_scalars, step_columns, trainer_scalars
from collectors.packing import Packed, pack
from collectors.pipeline import Pipeline
from collectors.policy import TokenPolicy, parse_bytes
from collectors.prepared import Step
from collectors.retention import PIN_AFTER
from collectors.schema import StepKey
from collectors.storage import Storage, open_storage
from collectors.store import FSYNC, StoreWriter
from collectors.token_rows import COMPACT, EXACT, FULL, MINIMAL, TokenColumns
from collectors.watching import Watch
from collectors.writers import launch_of
from mhpo_core import objectives
from mhpo_core.alarms import Alarm, Settings
from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.errors import BatchError, StoreError
from mhpo_core.gradients import GradientNorms
from mhpo_core.objectives import Objective

_LOG = logging.getLogger(__name__)

DISK_LIMIT = "4GB"
DEFAULT_ALARMS = Settings()


class Recorder:
    """Writes the telemetry of a training run into a run folder. Implements `mhpo_core.sink.Sink`.

    `record` copies the step's tensors to the CPU and returns; everything else happens in two threads. If the disk
    cannot keep up, tokens are dropped and counted before anything else is; training is never blocked and never fails
    because of a disk. Every step has a row in `steps`, whatever happened to its tokens.

    What a killed process loses is what waited: usually the step in hand. Everything that was committed is whole.
    `close` writes what waits and waits for the disk; leaving the `with` block by an exception closes too.

    Args:
        path: the run folder, or s3://bucket/folder; created, or continued if it holds a run.
        objective: the objective that trains, or its name.
        config: anything JSON that describes the run; stored in run.json.
        updates_per_iteration: optimizer steps per batch of rollouts; the dashboard then draws them as one column.
        vocabulary: token id → text, so that tokens can be read.
        tokens: which tokens are kept. "flight:K": all of the last K steps in a ring, and of every step a uniform sample
            of 8 sequences, the 64 smallest and 64 largest log-ratios and non-finite tokens; the ring is kept for good
            when tokens or the loss are non-finite, the process died or the run failed, or `pin` asks for it.
            "sample:N": N sequences of every step. "all".
        columns: "full", or "minimal", which leaves out columns that follow from others.
        precision: "exact" float32, or "compact": 10 bits of mantissa, relative error ≤ 4.9e-4, about half the bytes.
        disk_limit: bytes that the run may use on disk, such as "4GB"; None = no limit. Divided among the ranks.
        fsync: when a commit reaches the disk: "step" (it survives a power cut), "seal" (only every 256th step does),
            "never" (a killed process loses nothing, a power cut may). True and False are "step" and "never".
        when_full: "drop" tokens when the disk cannot keep up, or let `record` "wait".
        rank, world_size: of this process; default: those of torchrun (RANK, WORLD_SIZE), else one rank. Ranks write
            side by side, each through a recorder of its own; readers merge them.
        launch: name of this start of the job, the same on all ranks; default: torchrun's or Slurm's, or found out.
        alarms: thresholds of the alarm engine, which watches the run, all ranks of it from rank 0; None = nobody
            watches. `mhpo check` finds the same alarms afterwards.
        on_alarm: called with each alarm, on rank 0, in a thread of the recorder.
        by_segment: commit up to 256 steps at a time, for what is not live: a tenth of the work, and none of the steps
            since the last commit survives the process.

    Raises:
        StoreError: the folder cannot be written, is no run, or another live recorder writes this rank; or an argument
            is not one of those above.
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
        tokens: str = "flight",
        columns: str = FULL,
        precision: str = EXACT,
        disk_limit: int | str | None = DISK_LIMIT,
        fsync: str | bool = "step",
        when_full: str = "drop",
        rank: int | None = None,
        world_size: int | None = None,
        launch: str | None = None,
        alarms: Settings | None = DEFAULT_ALARMS,
        on_alarm: Callable[[Alarm], None] | None = None,
        by_segment: bool = False,
    ) -> None:
        self.objective = objectives.create(objective) if isinstance(objective, str) else objective
        what = TokenPolicy.parse(tokens)
        _require("columns", columns, (FULL, MINIMAL))
        _require("precision", precision, (EXACT, COMPACT))
        _require("when_full", when_full, ("drop", "wait"))
        fsync = {True: "step", False: "never"}.get(fsync, fsync) if isinstance(fsync, bool) else fsync
        _require("fsync", fsync, FSYNC)
        self.rank, self.world_size = _place_in_job(rank, world_size)
        self.disk_limit = parse_bytes(disk_limit, "disk_limit", self.world_size)
        storage = open_storage(path)
        self.path: Path | str = storage.url if storage.local is None else storage.local
        settings = {
            "tokens": str(what), "columns": columns, "precision": precision, "disk_limit": self.disk_limit,
        }  # fmt: skip
        self._store = StoreWriter(
            storage, self._manifest(storage, config, updates_per_iteration, settings), what=what, rank=self.rank,
            world_size=self.world_size, vocabulary=vocabulary, fsync=str(fsync), launch=launch or launch_of(os.environ),
            limit=None if self.disk_limit is None else self.disk_limit // self.world_size, by_segment=by_segment,
        )  # fmt: skip
        self._attempt: int | None = None
        self._last_step = self._store.last_step
        self._sequences_seen = self._store.next_sequence_id
        how = _stored_columns(self._store.manifest, self.objective)
        self._watch = Watch(self._store, alarms, on_alarm, self.event)
        waits = when_full == "wait"
        self._pipeline = Pipeline(self._store, self.objective, what, how, waits=waits, alarms=self._watch.live)
        self._watch.start(self._pipeline)
        self._closed = False
        atexit.register(self.close, "stopped", "the process exited without closing the recorder")
        self._say_how_it_starts(what)

    def _say_how_it_starts(self, what: TokenPolicy) -> None:
        resumed = self._store.resumed
        if resumed:
            self._pipeline.call(self._store.pin_what_a_dead_writer_left)
            self._pipeline.call(self._store.seal_what_a_dead_writer_left)
        rank = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        self.event("resumed" if resumed else "started", f"pid {os.getpid()} on {socket.gethostname()}{rank}")
        _LOG.info("Recorder: %s", self.describe())

    @property
    def watched(self) -> bool:
        """True if an alarm engine watches the run."""
        return self._watch.active

    @property
    def closed(self) -> bool:
        """True once nothing can be recorded any more."""
        return self._closed

    def describe(self) -> str:
        """What will be kept and how much of the disk it may take, in one sentence."""
        limit = "no limit on disk" if self.disk_limit is None else f"at most {self.disk_limit / 1e9:.3g} GB on disk"
        stored = self._store.manifest.get("store") or {}
        text = f"{self.path}: {limit}, tokens {stored.get('tokens')}, {stored.get('precision')} {stored.get('columns')}"
        free = self._store.storage.free_bytes()
        if free is not None and (self.disk_limit is None or free < self.disk_limit):
            text += f"; only {free / 1e9:.3g} GB are free"
        return text + "."

    def _manifest(
        self, storage: Storage, config: Mapping[str, Any] | None, updates: int, store: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "run_id": storage.url.rstrip("/").rsplit("/", 1)[-1] if storage.local is None else storage.local.name,
            "created": time.time(),
            "objective": {"name": self.objective.name, "hyperparameters": self.objective.hyperparameters()},
            "on_policy": self.objective.on_policy_terms(),
            "updates_per_iteration": updates,
            "store": store,
            "config": dict(config or {}),
            "environment": _environment(),
        }

    def record(
        self,
        step: int,
        batch: TokenBatch | None,
        *,
        loss: float | Tensor | None = None,
        reward: Tensor | Sequence[float] | None = None,
        grad_norm: float | Tensor | None = None,
        gradient_norms: GradientNorms | Mapping[str, float] | None = None,
        sequences: Sequences | None = None,
        metrics: Mapping[str, float] | None = None,
        columns: Mapping[str, float] | None = None,
        ratio_known: bool = True,
        wall_time: float | None = None,
    ) -> None:
        """Hand over one optimizer step. A step number that does not rise opens a new attempt at it.

        Args:
            step: optimizer step, ≥ 0.
            batch: its tokens; nothing is kept of the caller's tensors, they may change afterwards. None where no token
                is known.
            loss: as the trainer computed it, NaN and ±Inf too.
            reward: one per sequence, (B,).
            grad_norm: global L2 norm before clipping.
            gradient_norms: parameter group → L2 norm before clipping.
            sequences: what is known about each sequence.
            metrics: the trainer's own scalars; `lr`, `loss` and `grad_norm` also fill the column of that name.
            columns: columns of `steps` that the trainer computed itself; what is measured from the batch wins.
            ratio_known: False where logp_new is not known and holds logp_old; what follows from it is not computed.
            wall_time: seconds since the epoch; default: now.

        Raises:
            BatchError: step is negative, a column is none of `steps`, a per-sequence field does not have one fitting
                entry per row, or a scalar is no number.
            StoreError: the recorder is closed.
        """
        began = time.perf_counter()
        if self._closed:
            raise StoreError(
                f"Recorder.record: {self.path} is closed. Record before close() and inside the with block."
            )
        sequences = sequences or Sequences()
        n_sequences = sequences.count(reward) if batch is None else batch.n_sequences
        sequences = owned_sequences(sequences, reward, n_sequences)
        trainer = trainer_scalars(loss, grad_norm, gradient_norms, metrics or {})
        sequence_id = self._sequence_ids(sequences, n_sequences)
        key = self._key_of(step)
        scalars = sequence_scalars(sequences) | {
            "loss": trainer.loss, "lr": trainer.metrics.get("lr"), "grad_norm": trainer.grad_norm, "dropped_tokens": 0,
        }  # fmt: skip
        owned = None
        if batch is not None and self._pipeline.has_room(batch_bytes(batch)):
            owned = self._owned(batch)
        elif batch is not None:
            scalars |= dict.fromkeys(("n_tokens", "dropped_tokens"), int(batch.mask.sum()))
        scalars = {name: value for name, value in scalars.items() if value is not None}
        item = Step(
            key, time.time() if wall_time is None else wall_time, owned, sequences, sequence_id, trainer, scalars,
            step_columns(columns or {}), ratio_known,
        )  # fmt: skip
        scalars["recorder_ms"] = (time.perf_counter() - began) * 1e3
        self._pipeline.put(item)

    def _owned(self, batch: TokenBatch) -> TokenBatch | Packed:
        # a copy of everything is faster than picking, unless most of it is padding
        mask = batch.mask
        trained = np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else int(mask.sum())
        padded = 2 * trained < mask.numel()
        return pack(batch) if padded and self.objective.follows_from_ratio else owned_batch(batch)

    def event(self, kind: str, detail: str = "") -> None:
        """Note that something happened to the run."""
        self._pipeline.event(kind, detail)

    def pin(self, reason: str, after: int = PIN_AFTER) -> None:
        """Keep all tokens of the steps in the ring, and of the next `after` steps, for good."""
        step = self._last_step
        self._pipeline.call(lambda: self._store.pin(reason, step, after))

    def take_critical(self) -> Alarm | None:
        """The first critical alarm of an incident, once, as soon as it was found; None as long as there is none.

        A training loop that wants to react asks before every step. It costs nothing, and never waits.
        """
        return self._watch.take_critical()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything handed over so far is written; False after `timeout` seconds or if the disk refuses."""
        return self._pipeline.flush(timeout)

    def close(self, kind: str = "finished", detail: str = "") -> None:
        """Write everything that waits, note how the run ended, give the folder back. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if kind == "failed":
            self.pin(detail or "the run failed")
        self._watch.finish()
        self._pipeline.close(kind, detail)
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
        if self._attempt is None or step <= self._last_step:
            before, self._attempt = self._store.last_attempt, self._begin_attempt(int(step))
            if self._attempt > before:
                # the steps that are given up are the ones that somebody will want to look at
                self.pin(f"rewound from step {self._last_step} to step {step}", after=0)
                self.event("rewound", f"from step {self._last_step} to step {step}, attempt {self._attempt}")
            self._store.last_attempt = self._attempt
        self._last_step = int(step)
        self._store.attempts.saw(self._attempt, int(step))
        return StepKey(int(step), self._attempt, self.rank)

    def _begin_attempt(self, step: int) -> int:
        try:
            return self._store.attempts.begin(step)
        except OSError as error:  # the trainer must go on whatever happens to its telemetry
            _LOG.warning("Recorder: %s cannot note that it begins at step %d (%s).", self.path, step, error)
            return self._store.last_attempt + (step <= self._last_step)

    def _sequence_ids(self, sequences: Sequences, n_sequences: int) -> NDArray[np.int64]:
        if sequences.sequence_id is not None:
            try:
                return np.asarray(sequences.sequence_id, dtype=np.int64)
            except OverflowError:
                raise BatchError(
                    "Recorder.record: a sequence_id does not fit 64 bits, allowed are integers from −2⁶³ to 2⁶³ − 1. "
                    "Number the sequences, or leave sequence_id out."
                ) from None
        first, self._sequences_seen = self._sequences_seen, self._sequences_seen + n_sequences
        return np.arange(first, first + n_sequences, dtype=np.int64)


def _require(name: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise StoreError(
            f"Recorder: {name} is {given!r}, allowed are {', '.join(map(repr, allowed))}. Give one of them."
        )


def _place_in_job(rank: int | None, world_size: int | None) -> tuple[int, int]:
    given = rank is not None or world_size is not None
    rank = int(os.environ.get("RANK", 0)) if rank is None and not given else rank or 0
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None and not given else world_size or rank + 1
    if not 0 <= rank < world_size <= 100_000:
        raise StoreError(
            f"Recorder: rank is {rank} and world_size {world_size}, allowed is 0 ≤ rank < world_size. Give both."
        )
    return rank, world_size


def _stored_columns(manifest: Mapping[str, Any], objective: Objective) -> TokenColumns:
    """As the run began: a store whose files differ in their columns could not be read as one table."""
    stored = manifest.get("store") or {}
    derived = derivation({"name": objective.name, "hyperparameters": objective.hyperparameters()}).columns
    return TokenColumns(stored.get("columns", FULL), stored.get("precision", EXACT), frozenset(derived))


def _environment() -> dict[str, Any]:
    packages = {}
    for name in ("mhpo", "torch", "transformers", "trl", "verl", "duckdb", "pyarrow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    python, host = sys.version.split()[0], socket.gethostname()
    return {"python": python, "platform": platform.platform(), "host": host, "packages": packages}
