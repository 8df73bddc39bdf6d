"""A lock on the run folder that the kernel releases when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from collectors.layout import LOCK
from mhpo_core.errors import StoreError

_READERS_ARE_DONE_WITHIN = 2.0  # seconds; a reader holds the lock only for the time of one system call


class WriterLock:
    """Exclusive right to write one run; acquired on construction.

    Raises:
        StoreError: another live recorder writes this run.
    """

    def __init__(self, run: Path) -> None:
        self._handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        give_up = time.monotonic() + _READERS_ARE_DONE_WITHIN
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > give_up:
                    os.close(self._handle)
                    raise StoreError(
                        f"Recorder: {run} is being written by another recorder. "
                        "Close or stop that one first, or record into another folder."
                    ) from None
                time.sleep(0.02)

    def release(self) -> None:
        """Give the right back; harmless when called twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def has_writer(run: Path) -> bool:
    """True while a live process on this machine writes the run."""
    try:
        handle = os.open(run / LOCK, os.O_RDONLY)
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
