"""The newest numbers of every run for Prometheus, made when it asks; a run's files are read once for all scrapes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from collectors.alarm_files import AlarmCounts
from collectors.listing import run_folders
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from mhpo_core.errors import ServerError, StoreError
from mhpo_core.metrics import METRICS

SHOWN = ("reward_mean", "grad_norm", "entropy_mean", "kl_old_new_k1", "kl_old_new_k3", "kl_rollout_old_k3")
"""Metrics of the newest step, each as mhpo_<name>."""


def require_prometheus() -> None:
    """Refuse what needs the package where it is not installed.

    Raises:
        ServerError: it is not installed.
    """
    if find_spec("prometheus_client") is None:
        raise ServerError("--metrics: the package prometheus_client is not installed. pip install 'mhpo[prometheus]'.")


def scraper(runs: Path) -> Callable[[str], tuple[bytes, str]]:
    """A function that answers a scrape, given its Accept header, with a text and its content type."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry()
    registry.register(RunsCollector(runs))

    def answer(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return answer


class RunsCollector:
    """A collector of prometheus_client over a folder of runs.

    A metric that a run does not have is left out; NaN is a value. A run that cannot be read has mhpo_readable 0.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._followed: dict[Path, tuple[RunTail, AlarmCounts]] = {}

    def collect(self) -> Iterator[Any]:
        """Families of all runs, asked of their files now."""
        from prometheus_client.core import GaugeMetricFamily

        told = {
            "readable": "1 if the run can be read",
            "step": "Newest optimizer step",
            "wall_time_seconds": "When the newest step was recorded, seconds since 1970",
        } | {name: f"{METRICS[name].label} of the newest step, {METRICS[name].unit or 'no unit'}" for name in SHOWN}
        families = {n: GaugeMetricFamily(f"mhpo_{n}", text, labels=["run"]) for n, text in told.items()}
        alarms = GaugeMetricFamily("mhpo_alarms", "Alarms raised so far", labels=["run", "severity"])
        with self._lock:
            for path in self._folders():
                run = path.name.encode("utf-8", "backslashreplace").decode("utf-8")
                values, counts = self._read(path)
                for name, value in values.items():
                    families[name].add_metric([run], value)
                for severity, count in counts.items():
                    alarms.add_metric([run, severity], count)
        yield from (*families.values(), alarms)

    def _folders(self) -> list[Path]:
        try:
            found = run_folders(self._runs)
        except StoreError:  # not there yet
            found = []
        self._followed = {path: known for path, known in self._followed.items() if path in found}
        return found

    def _read(self, path: Path) -> tuple[dict[str, float], dict[str, int]]:
        try:
            if path not in self._followed:
                self._followed[path] = (RunTail(path, SHOWN), AlarmCounts(LocalStorage(path)))
            tail, alarms = self._followed[path]
            tail.poll()
            with tail.locked():
                last = tail.last
            values = {"readable": 1.0}
            if last is not None:
                known = {name: last.metrics.get(name) for name in SHOWN}
                values |= {"step": last.step, "wall_time_seconds": last.wall_time}
                values |= {name: value for name, value in known.items() if value is not None}
            return values, alarms.read()
        except (StoreError, pa.ArrowException, OSError):
            self._followed.pop(path, None)
            return {"readable": 0.0}, {}
