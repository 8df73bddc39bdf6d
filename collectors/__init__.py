"""Between a trainer and a store on disk: the recorder that writes a run, and the reader that opens one."""

from collectors.reader import Run, open_run
from collectors.recorder import Recorder
from mhpo_core.errors import StoreError

__all__ = ["Recorder", "Run", "StoreError", "open_run"]
