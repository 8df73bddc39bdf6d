"""From a step that was handed over to committed files: one thread measures, one writes.

The measuring thread never waits for the disk, so a step's summary is computed whatever the disk does. What waits for
the disk is bounded: beyond the bound, tokens are dropped and counted, and only summaries wait.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from collectors.alarms import LiveAlarms
from collectors.intake import batch_bytes
from collectors.policy import TokenPolicy
from collectors.prepared import Ready, Step, prepare, without_batch, without_rows
from collectors.store import StoreWriter
from collectors.token_rows import TokenColumns
from mhpo_core.alarms import CRITICAL
from mhpo_core.objectives import Objective

_LOG = logging.getLogger(__name__)

WAITING_BYTES = 256 << 20
"""Batches that may wait to be measured, and as much again that may wait for the disk."""

WAITING_STEPS = 64
"""Steps of which none is refused by the disk that may wait before `put` does, where it was asked to."""

WAITING_SUMMARIES = 4096
QUEUED_SUMMARIES = 8192
_RETRY_SECONDS = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Event:
    """Something that happened to the run."""

    kind: str
    detail: str


@dataclass(frozen=True)
class _Call:
    """A request to the writing thread, which answers through the event."""

    action: Callable[[], None]
    done: threading.Event


class Pipeline:
    """Two threads between `put` and the store.

    Args:
        store: written by one of the threads alone from now on.
        waits: block `put` while too much waits, in place of dropping tokens.
        alarms: watches the steps; None where nothing does.
    """

    def __init__(
        self,
        store: StoreWriter,
        objective: Objective,
        what: TokenPolicy,
        how: TokenColumns,
        *,
        waits: bool,
        alarms: LiveAlarms | None = None,
    ) -> None:
        self._alarms = alarms
        self._store, self._objective, self._what, self._how, self._waits = store, objective, what, how, waits
        self._room = threading.Condition()
        self._unmeasured = self._unwritten = 0  # bytes
        self._handed = 0  # steps that wait to be measured
        self._summaries = 0  # steps that wait for the disk
        self._lost = self._reported = 0  # steps of which nothing could be written, and those an event tells about
        self._failure: Exception | None = None
        self._waiting: deque[Ready] = deque()  # what the disk has refused so far, and what came after it
        self._end = Event("", "")
        self._intake: queue.SimpleQueue[Step | Event | _Call | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Ready | Event | _Call | None] = queue.SimpleQueue()
        self._threads = [
            _start_on_one_core(self._measure_until_closed, "mhpo-measure"),
            _start_on_one_core(self._write_until_closed, "mhpo-store"),
        ]

    def put(self, step: Step) -> None:
        """Hand over a step; returns at once unless asked to wait for room."""
        size = 0 if step.batch is None else batch_bytes(step.batch)
        with self._room:
            if self._waits:
                self._room.wait_for(lambda: self._has_room(size) or not self._threads[1].is_alive())
            elif self._unmeasured and self._unmeasured + size > WAITING_BYTES:
                step, size = without_batch(step), 0
            self._unmeasured += size
            self._handed += 1
        self._intake.put(step)

    def has_room(self, size: int) -> bool:
        """True if a batch of that many bytes would be kept; asked before it is copied."""
        with self._room:
            return self._waits or not self._unmeasured or self._unmeasured + size <= WAITING_BYTES

    def event(self, kind: str, detail: str) -> None:
        """Note an event after the steps that were handed over before it."""
        self._intake.put(Event(kind, detail))

    def call(self, action: Callable[[], None]) -> threading.Event:
        """Run an action in the writing thread after what was handed over before; the event is set when it is done."""
        done = threading.Event()
        self._intake.put(_Call(action, done))
        return done

    def flush(self, timeout: float | None) -> bool:
        """True once everything handed over before is written; False after `timeout` seconds or if the disk refuses."""
        if self._threads[1].is_alive() and not self.call(lambda: None).wait(timeout):
            return False
        return not self._waiting

    def close(self, kind: str, detail: str) -> None:
        """Write everything that waits, note how the run ended, then end both threads."""
        self._end = Event(kind, detail)
        self._intake.put(None)
        for thread in self._threads:
            thread.join()

    def _has_room(self, size: int) -> bool:
        if self._handed + self._summaries - len(self._waiting) >= WAITING_STEPS:
            return False
        empty = not self._unmeasured and not self._unwritten
        return empty or max(self._unmeasured, self._unwritten) + size <= WAITING_BYTES

    def _measure_until_closed(self) -> None:
        while (item := self._intake.get()) is not None:
            if isinstance(item, Step):
                self._measure(item)
            else:
                self._ready.put(item)
        self._ready.put(None)

    def _measure(self, step: Step) -> None:
        size = 0 if step.batch is None else batch_bytes(step.batch)
        try:
            # a disk that hangs, and does not even refuse, must not fill the memory
            ready = self._prepared(step) if self._summaries < QUEUED_SUMMARIES else None
            if ready is None:
                self._lost += 1
            else:
                with self._room:
                    self._unwritten += ready.size
                    self._summaries += 1
                self._ready.put(ready)
        finally:
            with self._room:
                self._unmeasured -= size
                self._handed -= 1
                self._room.notify_all()

    def _prepared(self, step: Step) -> Ready | None:
        """The step with its tokens; where that fails with its summary, else with what the trainer said of it."""
        with self._room:
            keeps_tokens = self._waits or self._unwritten <= WAITING_BYTES
        for part, keeps in ((step, keeps_tokens), (step, False), (without_batch(step), False)):
            try:
                ready = prepare(part, self._objective, self._what, self._how, self._store.world_size, keeps)
                return self._watched(ready)
            except Exception as error:  # the trainer must go on whatever happens to its telemetry
                self._warn(error)
        return None

    def _watched(self, ready: Ready) -> Ready:
        if self._alarms is None:
            return ready
        try:
            rollup, alarms = self._alarms.watch(ready.key, ready.rollup)
        except Exception as error:  # a step without an evaluation is better than none
            self._warn(error)
            return ready
        critical = next((a for a in alarms if a.severity == CRITICAL), None)
        incident = ready.incident or (f"alarm {critical.id}" if critical else "")
        return replace(ready, rollup=rollup, alarms=alarms, incident=incident)

    def settle(self, timeout: float) -> None:
        """In the measuring thread: wait until what was measured is written, or so many seconds."""
        done = threading.Event()
        self._ready.put(_Call(lambda: None, done))
        done.wait(timeout)

    def _write_until_closed(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, Ready):
                self._waiting.append(item)
            self._drain()
            if isinstance(item, Event):
                self._try(self._report_lost)
                self._try(partial(self._store.event, item.kind, item.detail))
            elif isinstance(item, _Call):
                self._try(item.action)
                item.done.set()
            elif not self._waiting and self._ready.empty():
                self._try(self._report_lost)
        self._drain()
        self._lost += len(self._waiting)
        if self._try(self._report_lost) is not None:
            _LOG.warning("Recorder: %d steps of %s are lost.", self._lost - self._reported, self._store.storage.url)
        # the last event of a run says how it ended
        self._try(partial(self._store.event, self._end.kind, self._end.detail))
        self._try(self._store.seal)

    def _next(self) -> Ready | Event | _Call | None:
        """The next item; while steps wait for a disk that failed, at most a second passes between two tries."""
        while True:
            try:
                return self._ready.get(timeout=_RETRY_SECONDS if self._waiting else None)
            except queue.Empty:
                self._drain()

    def _drain(self) -> None:
        """Write what waits, in order; stops at the first step that the disk refuses."""
        while self._waiting:
            ready = self._waiting[0]
            error = self._try(partial(self._store.commit_step, ready.key, ready.tables, ready.rollup))
            # other errors are the disk's and may pass
            lasts = not isinstance(error, OSError) or error.errno == errno.EFBIG
            if error is None:
                self._forget(self._waiting.popleft().size, steps=1)
                for alarm in ready.alarms:
                    self._try(partial(self._store.alarm, alarm, ready.key.attempt))
                if ready.incident:
                    self._try(partial(self._store.retention.pin, ready.incident, ready.key.step))
            elif ready.tables and (lasts or getattr(error, "errno", None) in _FULL):
                # a summary may still fit where tokens do not, and it is worth more
                self._strip(0)
            elif lasts:
                self._give_up()
            else:
                break
        self._bound()

    def _bound(self) -> None:
        """While the disk refuses, tokens wait only as far as there is room, and so many summaries."""
        for index in range(len(self._waiting)):
            if self._unwritten <= WAITING_BYTES:
                break
            self._strip(index)
        while len(self._waiting) > WAITING_SUMMARIES:
            self._give_up()

    def _give_up(self) -> None:
        self._forget(self._waiting.popleft().size, steps=1)
        self._lost += 1

    def _strip(self, index: int) -> None:
        if self._waiting[index].tables:
            self._forget(self._waiting[index].size)
            self._waiting[index] = without_rows(self._waiting[index])

    def _forget(self, size: int, steps: int = 0) -> None:
        with self._room:
            self._unwritten -= size
            self._summaries -= steps
            self._room.notify_all()

    def _report_lost(self) -> None:
        if self._lost > self._reported:
            why = f"writing failed: {self._failure}" if self._failure else "the disk could not keep up"
            self._store.event("dropped", f"{self._lost - self._reported} steps: {why}")
            self._reported, self._failure = self._lost, None

    def _try(self, action: Callable[[], Any]) -> Exception | None:
        """Returns what went wrong; the trainer must go on whatever happens to its telemetry."""
        try:
            action()
            return None
        except Exception as error:
            self._warn(error)
            return error

    def _warn(self, error: Exception) -> None:
        if self._failure is None:
            _LOG.warning(
                "Recorder: a step of %s could not be written (%s); training goes on.", self._store.storage.url, error
            )
        self._failure = error


def _start_on_one_core(work: Callable[[], None], name: str) -> threading.Thread:
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

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    limited.wait()
    torch.set_num_threads(trainer_threads)  # the number of the process, which the new thread has changed too
    return thread
