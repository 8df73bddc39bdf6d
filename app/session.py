"""What the pages share: the names of the runs, and one follower per run for the whole process."""

from __future__ import annotations

import threading
from pathlib import Path

from app.incidents import IncidentReader, Incidents
from app.live import LiveRun
from app.settings import first_run, runs_folder
from collectors.listing import run_folders
from mhpo_core.errors import StoreError

_followers: dict[Path, LiveRun] = {}
_incidents = IncidentReader()
_lock = threading.Lock()


def run_names() -> list[str]:
    """Names of the runs, newest first; the one the server was started for leads, even before it exists."""
    try:
        names = [p.name for p in run_folders(runs_folder())]
    except StoreError:
        names = []
    first = first_run()
    return [first, *(n for n in names if n != first)] if first else names


def follow(name: str) -> LiveRun:
    """The follower of a run of the folder.

    Args:
        name: one of run_names(); anything else cannot name a path, since only the last part of it is used.
    """
    path = runs_folder() / Path(name).name
    with _lock:
        return _followers.setdefault(path, LiveRun(path))


def incidents_of(name: str) -> Incidents:
    """The alarms of a run of the folder, one of run_names()."""
    return _incidents.read(runs_folder() / Path(name).name)


def close_followers() -> None:
    """Close every follower; DuckDB complains about connections that are open when the interpreter ends."""
    with _lock:
        while _followers:
            _followers.popitem()[1].close()
    _incidents.close()
