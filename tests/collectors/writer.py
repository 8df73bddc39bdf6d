"""A process that records steps until it is killed. Started through a fork server, because importing torch is slow."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from collectors import store
from tests.collectors.support import B, new_recorder, token_batch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

SEEDS = 40
"""Steps that far apart have the same batch, so that a writer is limited by the disk and not by random numbers."""

FLUSH_EVERY = 8


@dataclass(frozen=True)
class Writer:
    process: BaseProcess
    reports: Connection

    def wait_for_steps(self, count: int, seconds: float = 60.0) -> list[int]:
        """The next `count` steps that were handed to the recorder."""
        steps = []
        while len(steps) < count:
            assert self.reports.poll(seconds), f"no step for {seconds} s, exit code {self.process.exitcode}"
            steps.append(self.reports.recv())
        return steps

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL


@contextlib.contextmanager
def writing(
    path: Path, *, first: int = 0, seal_after: int = 256, grace: float = 60.0, n_sequences: int = B, **options: Any
) -> Iterator[Writer]:
    """A process that records first, first + 1, … for as long as the block lasts."""
    reports, theirs = PROCESSES.Pipe(duplex=False)
    given = (path, theirs, first, seal_after, grace, n_sequences, options)
    process = PROCESSES.Process(target=_record, args=given, daemon=True)
    process.start()
    theirs.close()
    try:
        yield Writer(process, reports)
    finally:
        process.kill()
        process.join()
        reports.close()


def _record(
    path: Path, reports: Connection, first: int, seal_after: int, grace: float, n: int, options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    store.SEAL_AFTER_STEPS, store.GRACE_SECONDS = seal_after, grace
    batches = [token_batch(seed, n) for seed in range(SEEDS)]
    recorder = new_recorder(path, **options)
    for step in itertools.count(first):
        recorder.record(step, batches[step % SEEDS], gradient_norms={"layer": step + 0.5})
        reports.send(step)
        if step % FLUSH_EVERY == FLUSH_EVERY - 1:  # a reader waits for steps on disk, not in memory
            recorder.flush()
