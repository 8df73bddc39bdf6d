"""What watches the run of a recorder for collapse, and whom it tells."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from collectors.alarms import LiveAlarms, Summary, summaries_of, updates_of
from collectors.incidents import Incidents
from collectors.notify import AGAIN_AFTER, Notifier, notifier_of
from collectors.pipeline import Pipeline
from collectors.rank_alarms import RankAlarms
from collectors.reader import Run
from collectors.store import StoreWriter
from mhpo_core.alarms import Alarm, Settings

_SETTLED_SECONDS = 30.0


class Watch:
    """The alarm engine of a recorder. One rank is judged as its steps are measured, several are from rank 0.

    Args:
        settings: thresholds; None = nobody watches.
        told: called with each alarm.
        note: notes an event.
    """

    def __init__(
        self,
        store: StoreWriter,
        settings: Settings | None,
        told: Callable[[Alarm], None] | None,
        note: Callable[[str, str], None],
    ) -> None:
        self._store, self._settings, self._told = store, settings, told or _nobody
        self._critical: deque[Alarm] = deque(maxlen=1)
        self._pipeline: Pipeline | None = None
        self._notifier: Notifier | None = None
        self._ranks: RankAlarms | None = None
        self.live: LiveAlarms | None = None
        self._incidents: list[Incidents] = []
        self.active = settings is not None and store.rank == 0
        if settings is None or not self.active:
            return
        self._incidents.append(Incidents(settings.clear, self._critical.append))
        url = store.storage.url.rstrip("/") if store.storage.local is None else store.storage.local.name
        self._notifier = notifier_of(url.rsplit("/", 1)[-1], note)
        if self._notifier is not None:
            self._incidents.append(Incidents(settings.clear, self._notifier, again_after=AGAIN_AFTER))
        if store.world_size == 1:
            self.live = LiveAlarms(
                settings, self._past, begins=not store.resumed, updates_per_iteration=updates_of(store.manifest),
                told=self._told, incidents=self._incidents,
            )  # fmt: skip

    def start(self, pipeline: Pipeline) -> None:
        """Begin, once there is somebody who writes what is found."""
        self._pipeline = pipeline
        if self._settings is not None and self.active and self.live is None:
            self._ranks = RankAlarms(
                self._store.storage, self._settings, updates_of(self._store.manifest), self._keep, self._told,
                self._incidents,
            )  # fmt: skip

    def take_critical(self) -> Alarm | None:
        """The first critical alarm of an incident, once."""
        try:
            return self._critical.pop()
        except IndexError:
            return None

    def finish(self) -> None:
        """Judge the last steps and wait for what is on its way, before the pipeline ends."""
        if self._pipeline is None or (self._ranks is None and self._notifier is None):
            return
        if self._ranks is not None:
            self._ranks.stop()
        self._pipeline.flush(_SETTLED_SECONDS)  # the last step may be the one that raises an alarm
        if self._ranks is not None:
            self._ranks.finish()
        if self._notifier is not None:
            self._notifier.finish()

    def _keep(self, alarm: Alarm, attempt: int) -> None:
        assert self._pipeline is not None
        self._pipeline.call(lambda: self._store.alarm(alarm, attempt))

    def _past(self, before: int) -> Iterator[Summary]:
        """What is stored of the steps before one; asked by the thread that measures."""
        assert self._pipeline is not None
        self._pipeline.settle(_SETTLED_SECONDS)
        run = Run(self._store.storage)
        try:
            yield from summaries_of(run, before)
        finally:
            run.close()


def _nobody(alarm: Alarm) -> None:
    pass
