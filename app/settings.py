"""What the server was started on, handed to the pages, which Streamlit runs as scripts, through the environment."""

from __future__ import annotations

import os
from pathlib import Path

RUNS_VARIABLE, RUN_VARIABLE = "MHPO_RUNS", "MHPO_RUN"


def remember(runs: Path, run: str) -> None:
    """Set the folder of runs and the run shown first; "" is the newest."""
    os.environ[RUNS_VARIABLE], os.environ[RUN_VARIABLE] = str(runs.absolute()), run


def runs_folder() -> Path:
    """The folder the server was started on."""
    return Path(os.environ.get(RUNS_VARIABLE, "runs"))


def first_run() -> str:
    """Name of the run the server was started for, "" if for none."""
    return os.environ.get(RUN_VARIABLE, "")
