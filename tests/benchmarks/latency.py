"""From a step's commit to changed pixels in a headless browser

The clock starts when the kernel renames the step's file (its ctime) and stops in the animation frame that follows
Plotly's redraw.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from tests.e2e.browser import launch
from tests.e2e.conftest import free_port, mhpo, running, wait_until

STEPS_BEFORE, STEPS_MEASURED, SECONDS_PER_STEP = 400, 80, 0.5
_WRITER = """
import sys, time, torch
from collectors import Recorder
from tests.app.runs import token_batch
torch.set_num_threads(1)
with Recorder(sys.argv[1], objective="mhpo", updates_per_iteration=2) as recorder:
    for step in range({before} + {measured}):
        batch = token_batch(step, n_sequences=256)
        norms = {{f"model.layers.{{i}}.mlp": 1.0 + step % 7 for i in range(12)}}
        recorder.record(step, batch, loss=0.1, reward=torch.rand(256), grad_norm=1.0 + step % 5, gradient_norms=norms)
        time.sleep(0.02 if step < {before} else {pause})
"""
_WATCH = """() => {
  const root = document.querySelector('.mhpo-board');
  window.drawn = [];
  new MutationObserver(() => window.drawn.push([+root.dataset.drawnStep, +root.dataset.drawnAt]))
    .observe(root, { attributes: true, attributeFilter: ['data-drawn-at'] });
}"""


def run() -> Iterator[str]:
    """One table row per window shown."""
    yield "| window | steps | median s | p95 s | max s |"
    yield "|---|---|---|---|---|"
    for window in ("All steps", "Last 250"):
        seconds = _measure(window)
        p50, p95 = np.quantile(seconds, [0.5, 0.95])
        yield f"| {window} | {len(seconds)} | {p50:.3f} | {p95:.3f} | {max(seconds):.3f} |"


def _measure(window: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        runs, port = Path(folder) / "runs", free_port()
        runs.mkdir()
        source = _WRITER.format(before=STEPS_BEFORE, measured=STEPS_MEASURED, pause=SECONDS_PER_STEP)
        writer = subprocess.Popen([sys.executable, "-c", source, str(runs / "run")])
        hot = runs / "run" / "rollup" / "hot"
        wait_until(lambda: hot.exists() and len(list(hot.iterdir())) > 300, 60, "300 steps")
        with running(mhpo("dash", runs, "--port", str(port)), Path(folder) / "log"), sync_playwright() as playwright:
            wait_until(lambda: "Dashboard" in (Path(folder) / "log").read_text(), 60, "the dashboard")
            browser = launch(playwright)
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(f"http://127.0.0.1:{port}/")
            page.locator(".mhpo-board[data-renders]").wait_for()
            page.get_by_text(window, exact=True).click()
            page.evaluate(_WATCH)
            committed: dict[int, float] = {}
            while writer.poll() is None:
                for path in hot.glob("s*.parquet"):
                    committed.setdefault(int(path.name[1:10]), path.stat().st_ctime)
                time.sleep(0.2)
            drawn = page.evaluate("window.drawn")
            browser.close()
    first: dict[int, float] = {}
    for step, at in drawn:
        first.setdefault(int(step), at / 1000)
    wanted = range(STEPS_BEFORE + 5, STEPS_BEFORE + STEPS_MEASURED - 1)
    return [first[s] - committed[s] for s in wanted if s in first and s in committed]
