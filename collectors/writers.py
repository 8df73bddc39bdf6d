"""Who writes a run: one living writer per rank, and the launch of the job that they belong to.

Ranks write side by side without waiting for each other. The lock of a rank only refuses a second writer of the same
rank, and tells readers that the run is alive; the kernel releases it when its holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping

from collectors.layout import WRITERS
from collectors.storage import Storage
from mhpo_core.errors import StoreError

_READERS_ARE_DONE_WITHIN = 2.0  # seconds; a reader holds the lock only for the time of one system call
_LAUNCH = "launch.lock"


class WriterLock:
    """The right to write one rank of a run; acquired on construction. A bucket has no locks and refuses nobody.

    Args:
        launch: name of the launch of the job, the same on all its ranks; None = found out: that of the ranks that are
            alive, or a new one.

    Raises:
        StoreError: another live recorder writes this rank.
    """

    def __init__(self, storage: Storage, rank: int, world_size: int, launch: str | None) -> None:
        self._handle = -1
        self._storage = storage
        if storage.local is None:
            self.launch = launch or _launch_on_a_bucket(storage, world_size)
            return
        os.makedirs(storage.local / WRITERS, exist_ok=True)
        own = f"r{rank:03d}.lock"
        try:
            # a lock that is held must never tell the launch of its holder before
            with _exclusive(storage.location(f"{WRITERS}/{_LAUNCH}")):
                self._handle = _acquire(storage, own, rank)
                self.launch = launch or _living_launch(storage, own) or uuid.uuid4().hex[:12]
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, self.launch.encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the right back; harmless when called twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def launch_of(environment: Mapping[str, str]) -> str | None:
    """The launch that torchrun or Slurm tells of, None where neither does."""
    run, restart = environment.get("TORCHELASTIC_RUN_ID", ""), environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if run and run != "none":
        return f"{run}-{restart}"
    job, requeued = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")
    # torchrun inside of a Slurm job starts its ranks again without Slurm's knowing
    return f"slurm-{job}-{environment.get('SLURM_STEP_ID', '0')}-{requeued}-{restart}" if job else None


def has_writer(storage: Storage) -> bool | None:
    """True while a live process on this machine writes the run; None on a bucket, where nobody can tell."""
    if storage.local is None:
        return None
    return any(is_held(storage, f"{WRITERS}/{name}") for name in storage.list(WRITERS) if name != _LAUNCH)


def _launch_on_a_bucket(storage: Storage, world_size: int) -> str:
    if world_size > 1:
        raise StoreError(
            f"Recorder: {storage.url} is a bucket and {world_size} ranks write to it, so they must name the launch "
            "they belong to. Give all ranks the same new launch=… at every start of the job."
        )
    return uuid.uuid4().hex[:12]


def _acquire(storage: Storage, name: str, rank: int) -> int:
    handle = os.open(storage.location(f"{WRITERS}/{name}"), os.O_RDWR | os.O_CREAT, 0o644)
    give_up = time.monotonic() + _READERS_ARE_DONE_WITHIN
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(handle)
                raise StoreError(
                    f"Recorder: rank {rank} of {storage.url} is being written by another recorder. "
                    "Close or stop that one first, or record into another folder."
                ) from None
            time.sleep(0.02)


@contextlib.contextmanager
def _exclusive(path: str) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # held for a few small reads, or until a rank's second writer is refused
        yield
    finally:
        os.close(handle)


def _living_launch(storage: Storage, own: str) -> str | None:
    for name in sorted(storage.list(WRITERS)):
        if name not in (own, _LAUNCH) and is_held(storage, f"{WRITERS}/{name}"):
            with contextlib.suppress(OSError):
                return storage.read(f"{WRITERS}/{name}").decode() or None
    return None


def is_held(storage: Storage, name: str) -> bool:
    """True while a live process on this machine holds the lock in that file; never on a bucket."""
    if storage.local is None:
        return False
    try:
        handle = os.open(storage.location(name), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
