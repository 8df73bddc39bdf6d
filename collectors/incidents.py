"""Critical alarms that belong together are one incident: what acts on alarms acts once per incident."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from mhpo_core.alarms import CRITICAL, Alarm, Evaluation

_LOG = logging.getLogger(__name__)


class Incidents:
    """Tells the first critical alarm of every incident.

    It ends when no rule held, not even as a warning, for as many rows in a row as after which a rule may raise again,
    and the reward is back where it is known.

    Args:
        clear: those rows, `Settings.clear`.
        tell: called with the alarm; what it raises is logged and harms nothing.
        again_after: seconds after which a further alarm of the same incident is told too.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        clear: int,
        tell: Callable[[Alarm], None],
        *,
        again_after: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clear, self._tell, self._again_after, self._clock = clear, tell, again_after, clock
        self.restart()

    def restart(self) -> None:
        """Forget everything: the run is judged from its beginning again."""
        self._quiet = 0
        self._told: float | None = None  # when, within an incident

    def observe(self, found: Evaluation, *, past: bool = False) -> None:
        """Take the evaluation of the next row.

        Args:
            past: it was told when it was new.
        """
        first = next((a for a in found.alarms if a.severity == CRITICAL), None)
        now = self._clock()
        self._quiet = 0 if found.level or found.lasting else self._quiet + 1
        if self._quiet >= self._clear:
            self._told = None
        if first is not None and (self._told is None or now - self._told >= self._again_after):
            self._told = now
            if not past:
                tell(self._tell, first)


def tell(listener: Callable[[Alarm], None], alarm: Alarm) -> None:
    """Call a listener; the alarm is stored whatever it raises."""
    try:
        listener(alarm)
    except Exception:
        _LOG.warning("Recorder: what was to be done about %s failed; training goes on.", alarm.id, exc_info=True)
