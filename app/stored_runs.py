"""Runs and thresholds as commands take them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from collectors import layout
from mhpo_core.errors import ConfigError


def named_runs(given: Iterable[str]) -> dict[str, str]:
    """Name → path of the runs given, and of those directly below a folder that is none itself."""
    found: dict[str, str] = {}
    for path in given:
        folder = Path(path)
        below = [] if "://" in path or layout.is_run(folder) or not folder.is_dir() else sorted(folder.iterdir())
        inside = [str(p) for p in below if p.is_dir() and layout.is_run(p)]
        for run in inside or [path]:
            name = run.rstrip("/").rsplit("/", 1)[-1] if "://" in run else Path(run).resolve().name
            found[_unused(name, found)] = run
    return found


def _unused(name: str, taken: dict[str, str]) -> str:
    unused, number = name, 2
    while unused in taken:
        unused, number = f"{name} ({number})", number + 1
    return unused


def changes(given: Iterable[str]) -> dict[str, float]:
    """Thresholds from texts like name=value.

    Raises:
        ConfigError: a text is something else.
    """
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f"--set: got {text!r}, allowed is name=number. `mhpo check RUN --thresholds` prints the names."
            ) from None
    return found
