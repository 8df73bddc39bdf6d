"""What a critical alarm does to a worker that asked for it by MHPO_ON_CRITICAL."""

from __future__ import annotations

from typing import Protocol

from collectors.recorder import Recorder
from mhpo_core.errors import AlarmError, ConfigError

ON_CRITICAL = "MHPO_ON_CRITICAL"
_STOP = "stop"


class _Telemetry(Protocol):
    @property
    def recorder(self) -> Recorder: ...

    @property
    def between_steps(self) -> bool: ...

    def close(self, kind: str, detail: str) -> None: ...


def require_action(given: str) -> str:
    """The action, empty where none is asked for.

    Raises:
        ConfigError: it is none that is known.
    """
    if given not in ("", _STOP):
        raise ConfigError(f"adapter: {ON_CRITICAL} is {given!r}, allowed is 'stop'. Set it so, or do not set it.")
    return given


def raise_if_alarmed(telemetry: _Telemetry) -> None:
    """End the run if an alarm was found, between two steps.

    Raises:
        AlarmError: one was found.
    """
    alarm = telemetry.recorder.take_critical() if telemetry.between_steps else None
    if alarm is None:
        return
    telemetry.close("stopped", f"because of the critical alarm {alarm.id}")
    raise AlarmError(
        f"adapter: {ON_CRITICAL} is 'stop' and {telemetry.recorder.path} has the critical alarm {alarm.id}. "
        f"{alarm.message} `mhpo check {telemetry.recorder.path}` says what to do."
    )
