"""Messages about critical alarms, to the addresses in the environment variable MHPO_NOTIFY, through `apprise`.

Addresses contain passwords and tokens: they come from the environment alone, and nothing that is stored, logged or
raised here repeats any part of them.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from collectors.events import note
from collectors.reader import Run
from mhpo_core.alarms import MODES, Alarm
from mhpo_core.errors import ConfigError

_LOG = logging.getLogger(__name__)

VARIABLE = "MHPO_NOTIFY"
NOTIFIED, FAILED = "notified", "notification_failed"
AGAIN_AFTER = 86_400.0
"""Seconds after which an incident that does not end is told of once more."""

SECONDS = 10.0
"""An address has so long to take a message."""

_STARTING_SECONDS = 20.0  # for a Python that imports apprise from a slow disk
_PROCESS = Path(__file__).with_name("notify_process.py")
_MISSING = "the package apprise is not installed; pip install 'mhpo[notify]'"
_TOLD = 5  # incidents that one message about a stored run describes


@dataclass(frozen=True)
class Outcome:
    """What became of a message.

    Args:
        problem: empty if every address took it.
        addresses: how many there are.
    """

    problem: str
    addresses: int = 0

    def event(self, alarms: str) -> tuple[str, str]:
        """Kind and detail of the event that says so."""
        if self.problem:
            return FAILED, f"{alarms}: {self.problem}"
        return NOTIFIED, f"{alarms}: {self.addresses} address{'es' if self.addresses > 1 else ''}"


class Notifier:
    """Sends a message per incident, each in a thread of its own; training neither waits for it nor fails with it.

    Args:
        run: its name.
        said: notes an event, of kind `notified` or `notification_failed`.
    """

    def __init__(self, run: str, said: Callable[[str, str], None]) -> None:
        self._run, self._said = run, said
        self._lock = threading.Lock()
        self._waiting: dict[str, threading.Thread] = {}
        if problem := _unready():
            _LOG.warning("Recorder: %s is set, but %s.", VARIABLE, problem)

    def __call__(self, alarm: Alarm) -> None:
        """Send a message about the alarm; returns at once."""
        thread = threading.Thread(target=self._send, args=(alarm,), name="mhpo-notify", daemon=True)
        with self._lock:
            thread.start()
            self._waiting[alarm.id] = thread

    def finish(self, seconds: float = SECONDS) -> None:
        """Wait for what is on its way; what has not arrived by then is noted as failed, and still goes on."""
        deadline = time.monotonic() + seconds
        for thread in list(self._waiting.values()):
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            late, self._waiting = list(self._waiting), {}
        for alarm in late:
            self._said(FAILED, f"{alarm}: no answer when the recording ended")

    def _send(self, alarm: Alarm) -> None:
        outcome = deliver(f"Critical alarm in {self._run} at step {alarm.step}", _text(alarm))
        with self._lock:
            if self._waiting.pop(alarm.id, None) is not None:
                self._said(*outcome.event(alarm.id))


def notifier_of(run: str, said: Callable[[str, str], None]) -> Notifier | None:
    """The notifier that the environment asks for; None if it asks for none."""
    return Notifier(run, said) if os.environ.get(VARIABLE, "").split() else None


def require_ready() -> None:
    """Refuse to send where nothing could be sent.

    Raises:
        ConfigError: no address is given, or apprise is not installed.
    """
    if not os.environ.get(VARIABLE, "").split():
        raise ConfigError(
            f"notify: the environment variable {VARIABLE} is not set, allowed are addresses as apprise understands "
            "them, separated by spaces. Set it."
        )
    if problem := _unready():
        raise ConfigError(f"notify: {problem}.")


def tell_of(name: str, run: Run, incidents: list[Alarm]) -> Outcome | None:
    """One message about the incidents of a stored run of which none was told yet; an event says so.

    Args:
        incidents: the first alarm of each.

    Returns:
        What became of it; None where there was nothing to tell.
    """
    events = run.sql(f"SELECT detail FROM events WHERE kind = '{NOTIFIED}'").fetchall()
    told = {alarm for (detail,) in events for alarm in detail.split(": ")[0].split(", ")}
    new = [alarm for alarm in incidents if alarm.id not in told]
    if not new:
        return None
    more = f"\n\nAnd {len(new) - _TOLD} more." if len(new) > _TOLD else ""
    steps = ", ".join(str(alarm.step) for alarm in new[:_TOLD])
    outcome = deliver(
        f"Critical alarm in {name} at step {steps}", "\n\n".join(_text(alarm) for alarm in new[:_TOLD]) + more
    )
    note(run.storage, *outcome.event(", ".join(alarm.id for alarm in new)))
    return outcome


def deliver(title: str, body: str, seconds: float = SECONDS) -> Outcome:
    """Send a message to all addresses and wait, at most half a minute; raises nothing."""
    if problem := _unready():
        return Outcome(problem)
    message = json.dumps({"title": title, "body": body, "seconds": seconds})
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_PROCESS)], input=message, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, encoding="utf-8", timeout=_STARTING_SECONDS + seconds, start_new_session=True,
        )  # fmt: skip
        problems = [str(problem) for problem in json.loads(done.stdout)]
    except subprocess.TimeoutExpired:
        return Outcome(f"no answer within {_STARTING_SECONDS + seconds:g} seconds")
    except (OSError, ValueError) as error:
        return Outcome(f"the process that sends it failed ({type(error).__name__})")
    failed = [f"address {i} of {len(problems)} {problem}" for i, problem in enumerate(problems, 1) if problem]
    return Outcome("; ".join(failed), len(problems))


def _unready() -> str:
    return "" if find_spec("apprise") else _MISSING


def _text(alarm: Alarm) -> str:
    mode, good = MODES.get(alarm.mode), alarm.evidence.get("last_good_step")
    lines = [alarm.message, "" if mode is None else f"{mode.title}: {mode.cause}."]
    lines += [f"Last step before the first sign: {'none' if good is None else good}.", *alarm.advice[:1]]
    return "\n".join([*filter(None, lines), f"On {socket.gethostname()}."])
