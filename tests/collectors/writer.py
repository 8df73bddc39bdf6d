"""A process that records steps until it is killed. Started through a fork server, because importing torch is slow."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from collectors import Recorder, store
from tests.collectors.support import token_batch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

SEEDS = 40
"""Steps that far apart have the same batch, so that a writer is limited by the disk and not by random numbers."""


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
def writing(path: Path, *, first: int = 0, seal_after: int = 256, grace: float = 60.0) -> Iterator[Writer]:
    """A process that records first, first + 1, … for as long as the block lasts."""
    reports, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_record, args=(path, theirs, first, seal_after, grace), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Writer(process, reports)
    finally:
        process.kill()
        process.join()
        reports.close()


def _record(path: Path, reports: Connection, first: int, seal_after: int, grace: float) -> None:
    torch.set_num_threads(1)
    store.SEAL_AFTER_STEPS, store.GRACE_SECONDS = seal_after, grace
    batches = [token_batch(seed) for seed in range(SEEDS)]
    recorder = Recorder(path, objective="mhpo", fsync=False)
    for step in itertools.count(first):
        recorder.record(step, batches[step % SEEDS], gradient_norms={"layer": step + 0.5})
        reports.send(step)
        while recorder._queue.qsize() > 8:  # never so fast that tokens are dropped
            time.sleep(0.001)
