"""What the live page shows of a run, as one JSON text per state of the run, shared by every browser that looks."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa

from app.figures.board import LIVE_METRICS, board
from app.text import human_bytes, visible
from app.theme import PALETTES
from collectors.alarm_files import newest_critical
from collectors.bins import Bins
from collectors.layout import is_run
from collectors.listing import run_size
from collectors.retention import pin_ring
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from collectors.window import Window
from mhpo_core.alarms import MODES
from mhpo_core.errors import StoreError

# Nothing new for this long, and for ten times the usual pause between steps, is worth a warning.
STALE_SECONDS = 30.0

DISK_SECONDS = 5.0
ALARM_SECONDS = 1.0
ALARM_STEPS = 200
"""An alarm that is further back is on its page alone: while a run stays broken it is said again every 20 steps."""

MAX_COLUMNS = 2000
"""Of a zoomed window; more cannot be told apart on a screen."""

_PAYLOADS = 8  # kept for viewers that look at different windows


class LiveRun:
    """A run followed once for all viewers; `payload` is rebuilt only when the run changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tail: RunTail | None = None
        self._lock = threading.Lock()
        self._built: OrderedDict[object, tuple[Any, str]] = OrderedDict()
        self._size = (-DISK_SECONDS, 0)
        self._alarm: tuple[float, dict[str, Any] | None] = (-ALARM_SECONDS, None)

    def payload(self, window: str, steps: tuple[int, int] | None = None) -> str:
        """The board's data as JSON; the same text object until something changed.

        Args:
            window: "all", or one of collectors.tail.RECENT.
            steps: first and last step that the reader has zoomed to; they are then drawn in finer columns.
        """
        with self._lock:
            try:
                return self._payload(window, steps)
            except (StoreError, pa.ArrowException, OSError) as error:
                return _message("critical", "unreadable", visible(str(error).splitlines()[0], 300))

    def pin(self) -> str:
        """Keep the ring for good; returns a sentence that says which steps."""
        try:
            pinned = pin_ring(LocalStorage(self._path))
        except OSError as error:
            return f"The steps cannot be kept: {visible(str(error.strerror or error), 200)}."
        if not pinned:
            return "There is nothing to keep: all tokens of this run are kept, or its ring is empty."
        return f"All tokens of steps {min(f.first for f in pinned):,} to {max(f.last for f in pinned):,} are kept."

    def close(self) -> None:
        """Release the store; the follower is of no use afterwards."""
        with self._lock:
            if self._tail is not None:
                self._tail.close()

    def _payload(self, window: str, steps: tuple[int, int] | None) -> str:
        if self._tail is None:
            if not is_run(self._path):
                return _message("idle", "waiting", f"Waiting for {visible(self._path.name)} to begin.")
            self._tail = RunTail(self._path, LIVE_METRICS)
        tail = self._tail
        tail.poll()
        stale, size, alarm = _is_stale(tail), self._disk_size(), self._newest_alarm()
        if tail.windows[window].width <= int(tail.manifest.get("updates_per_iteration") or 1):
            steps = None  # drawn as finely as it can be
        version, place = (tail.version, stale, size, alarm and alarm["id"]), (window, steps)
        if place not in self._built or self._built[place][0] != version:
            drawn = tail.windows[window] if steps is None else tail.zoom(*steps, max_points=MAX_COLUMNS)
            self._built[place] = (version, json.dumps(_content(tail, window, drawn, stale, size, alarm)))
        self._built.move_to_end(place)
        while len(self._built) > _PAYLOADS:
            self._built.popitem(last=False)
        return self._built[place][1]

    def _newest_alarm(self) -> dict[str, Any] | None:
        """The newest critical alarm, looked for again every second or so."""
        if time.monotonic() - self._alarm[0] >= ALARM_SECONDS:
            self._alarm = (time.monotonic(), newest_critical(LocalStorage(self._path)))
        return self._alarm[1]

    def _disk_size(self) -> int:
        """Bytes of the run, counted again every few seconds."""
        if time.monotonic() - self._size[0] >= DISK_SECONDS:
            self._size = (time.monotonic(), run_size(self._path))
        return self._size[1]


def _content(
    tail: RunTail, window: str, drawn: Window | Bins, stale: bool, size: int, alarm: dict[str, Any] | None
) -> dict[str, Any]:
    with tail.locked():
        manifest = tail.manifest
        level, text = _banner(tail, stale)
        recent = alarm is not None and tail.last is not None and tail.last.step - alarm["step"] <= ALARM_STEPS
        if alarm is not None and recent and level in ("ok", "idle"):
            title = MODES[alarm["mode"]].title if alarm["mode"] in MODES else visible(alarm["mode"])
            level, text = "critical", f"Alarm at step {alarm['step']:,}: {title}. {text or 'The page Alarms says why.'}"
        return {
            "run": tail.name,
            "window": window,
            "version": tail.version,
            "state": tail.state.name,
            "level": level,
            "banner": text,
            "step": None if tail.last is None else tail.last.step,
            "wall_time": None if tail.last is None else tail.last.wall_time,
            "tiles": [*_tiles(tail), _disk_tile(manifest, size)],
            "figure": board(drawn, manifest.get("on_policy") or {}, _objective(tail)) if drawn.size else None,
            "palettes": PALETTES,
        }


def _disk_tile(manifest: dict[str, Any], size: int) -> dict[str, str]:
    limit = (manifest.get("store") or {}).get("disk_limit")
    known = isinstance(limit, int | float) and not isinstance(limit, bool)
    return {
        "name": "disk", "label": "On disk", "value": human_bytes(size),
        "note": f"of {human_bytes(int(limit))}" if known else "no limit",
    }  # fmt: skip


def _message(level: str, state: str, text: str) -> str:
    return json.dumps(
        {
            "run": "", "window": "", "version": 0, "state": state, "level": level, "banner": text, "step": None,
            "wall_time": None, "tiles": [], "figure": None, "palettes": PALETTES,
        }
    )  # fmt: skip


def _objective(tail: RunTail) -> str:
    return str((tail.manifest.get("objective") or {}).get("name", "unknown"))


def _is_stale(tail: RunTail) -> bool:
    if tail.state.name != "running" or tail.last is None:
        return False
    return time.time() - tail.last.wall_time > max(STALE_SECONDS, 10 * (tail.usual_pause() or 0.0))


def _banner(tail: RunTail, stale: bool) -> tuple[str, str]:
    """Level and sentence for the state of the run; the detail is untrusted and goes out as text."""
    name, detail = tail.state.name, visible(tail.state.detail, 300)
    if name == "killed":
        return (
            "critical",
            "The process that wrote this run died without a word. Everything up to the last step is here.",
        )
    if name == "failed":
        return "critical", f"The run failed: {detail}"
    if name == "stopped":
        return "idle", f"The run was stopped: {detail}"
    if name == "finished":
        return "idle", "The run has finished."
    if tail.last is None:
        phase = f"{tail.state.phase.replace('_', ' ')}: {detail}" if tail.state.phase else ""
        return "idle", f"Running, no step yet. {visible(phase)}".strip()
    if tail.damaged:
        n = len(tail.damaged)
        return "warning", f"{n} damaged file{'s' if n > 1 else ''}, left out here; `mhpo verify` names the steps."
    if stale:
        return "warning", "No new step for a while, though the process is alive. The board shows the last one."
    return "ok", ""


def _tiles(tail: RunTail) -> list[dict[str, str]]:
    last = tail.last
    imported = isinstance((tail.manifest.get("config") or {}).get("import"), dict)
    share = None if imported else tail.recorder_share()
    planned = _planned_steps(tail.manifest)
    tiles = [
        {
            "name": "objective", "label": "Objective, assumed" if imported else "Objective",
            "value": visible(_objective(tail), 24), "note": "",
        },
        {
            "name": "step", "label": "Step", "value": "–" if last is None else f"{last.step:,}",
            "note": f"of {planned:,}" if planned else "",
        },
        {"name": "tokens", "label": "Tokens seen", "value": f"{tail.n_tokens:,}" if tail.n_tokens else "–", "note": ""},
        {"name": "age", "label": "Newest data", "value": "–", "note": ""},
        {
            "name": "recorder", "label": "Recorder", "value": "–" if share is None else f"{100 * share:.2f} %",
            "note": "" if share is None else "of step",
        },
    ]  # fmt: skip
    numbers = {} if last is None else last.metrics
    for name, text in (("reward_mean", "Reward"), ("entropy_mean", "Entropy"), ("grad_norm", "Gradient norm")):
        value = numbers.get(name)
        tiles.append({"name": name, "label": text, "value": "–" if value is None else f"{value:.4g}", "note": ""})
    lost = tail.dropped_tokens
    bad = numbers.get("nonfinite_count")
    if bad:
        tiles.append(
            {"name": "nonfinite", "label": "Non-finite", "value": f"{bad:,.0f}", "note": "tokens", "level": "critical"}
        )
    if lost:
        tiles.append(
            {"name": "dropped", "label": "Not stored", "value": f"{lost:,}", "note": "tokens", "level": "warning"}
        )
    return tiles


def _planned_steps(manifest: dict[str, Any]) -> int | None:
    iterations = (manifest.get("config") or {}).get("iterations")
    if not isinstance(iterations, int):
        return None
    return iterations * int(manifest.get("updates_per_iteration") or 1)
