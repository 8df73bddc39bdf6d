"""What a worker process of a framework records, told by its environment: MHPO_RUN and MHPO_OPTIONS."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from collectors.adapters.alarm_stop import ON_CRITICAL, raise_if_alarmed, require_action
from collectors.adapters.harmless import harmless
from collectors.adapters.optimizer_steps import MicroBatch, StepTelemetry
from collectors.recorder import Recorder
from mhpo_core.errors import ConfigError

_LOG = logging.getLogger(__name__)
RUN, OPTIONS = "MHPO_RUN", "MHPO_OPTIONS"


class Worker:
    """The recording of this process, opened by the first loss that trains.

    Args:
        framework: name of its package.
    """

    def __init__(self, framework: str) -> None:
        self.framework = framework
        self.recipe: str | None = None
        self.telemetry: StepTelemetry | None = None
        self._on_critical = ""
        self._failed = False
        self._told = False

    def wanted(self) -> bool:
        """Whether a run folder is given; the same at every call, since ranks may have to agree on their metrics."""
        if os.environ.get(RUN):
            return True
        if not self._told:
            self._told = True
            _LOG.warning(
                "%s: %s is not set in this process, the loss passes through and nothing is recorded.",
                self.framework, RUN,
            )  # fmt: skip
        return False

    @harmless
    def keep(self, recipe: str, settings: Callable[[], dict[str, Any]], read: Callable[[], MicroBatch]) -> int:
        """Keep a loss call that trains; returns its recorded tokens.

        Args:
            recipe: what records, for people.
            settings: `objective` and `config` of the `Recorder`, asked for once.
            read: the call.
        """
        if not torch.is_grad_enabled() or self._failed:
            return 0
        if self.telemetry is None:
            self._open(recipe, settings)
        return 0 if self.telemetry is None else self.telemetry.add(read())

    def obey(self) -> None:
        """Before a loss that trains: raise if that is asked for and an alarm was found.

        Raises:
            AlarmError: so it is; the run ends as stopped.
        """
        if self._on_critical and self.telemetry is not None and torch.is_grad_enabled():
            raise_if_alarmed(self.telemetry)

    def close(self) -> None:
        """End the recording; the next loss that trains continues it."""
        if self.telemetry is not None:
            self.telemetry.close()
        self.telemetry = self.recipe = None

    def _open(self, recipe: str, settings: Callable[[], dict[str, Any]]) -> None:
        on_critical = require_action(os.environ.get(ON_CRITICAL, ""))
        self._failed = True  # a run that cannot be opened is not tried again at every micro-batch
        given = settings() | place_in_job()
        recorder = Recorder(os.environ[RUN], **given | options_of(os.environ.get(OPTIONS, "")))
        self._failed, self.recipe, self.telemetry = False, recipe, StepTelemetry(recorder)
        recorder.event(self.framework, f"{recipe} of {self.framework} {version_of(self.framework)} records")
        self._on_critical = on_critical
        if on_critical and not recorder.watched:
            _LOG.warning("%s: %s is %s, but only rank 0 watches a run.", self.framework, ON_CRITICAL, on_critical)
        _LOG.info("%s: %s records into %s", self.framework, recipe, recorder.path)


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def options_of(text: str) -> dict[str, Any]:
    """Options of `Recorder` from a JSON object; none from an empty text.

    Raises:
        ConfigError: it is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"adapter: MHPO_OPTIONS is {text!r}, allowed is a JSON object of options of collectors.Recorder. "
            'Write {"tokens": "sample:16"} or leave it out.'
        )
    return found


def place_in_job() -> dict[str, int]:
    """Rank and world size as torch.distributed has them; nothing before it is initialised."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    return {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}
