"""The live page beside a run that moves, dies, is stale, is hostile or is not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from collectors import Recorder, open_run
from mhpo_core import Sequences, TokenBatch
from tests.collectors.rollups import make_long_run
from tests.e2e.conftest import ROOT, Watched, mhpo, running, wait_until

HOSTILE = "<img src=x onerror=window.__xss=1>"


def batch(generator: torch.Generator, scale: float = 0.1) -> TokenBatch:
    old = -torch.rand(32, 6, generator=generator) - 0.5
    return TokenBatch(
        logp_new=old + scale * torch.randn(32, 6, generator=generator), logp_old=old, logp_rollout=old + 1e-3,
        advantage=torch.randn(32, generator=generator), mask=torch.ones(32, 6), entropy=-old,
    )  # fmt: skip


def record_steps(recorder: Recorder, steps: range, layer: str = "model.layers.0.mlp") -> None:
    generator = torch.Generator().manual_seed(0)
    for step in steps:
        recorder.record(
            step, batch(generator), loss=0.1, reward=torch.rand(32, generator=generator), grad_norm=1.0 + step % 3,
            gradient_norms={layer: 0.5 + step % 2, "lm_head": 1.0}, metrics={"lr": 1e-6},
            sequences=Sequences(prompt=[HOSTILE] * 32, completion=[HOSTILE] * 32),
        )  # fmt: skip


@contextmanager
def moving(path: Path, seconds_per_step: float = 0.3) -> Iterator[Recorder]:
    """A recorder fed by a thread until the block ends."""
    stop = threading.Event()
    with Recorder(path, objective="mhpo") as recorder:

        def feed() -> None:
            step = 0
            while not stop.wait(seconds_per_step):
                record_steps(recorder, range(step, step + 1))
                step += 1

        record_steps(recorder, range(0))
        thread = threading.Thread(target=feed)
        thread.start()
        try:
            yield recorder
        finally:
            stop.set()
            thread.join()


def test_zoom_hover_and_node_survive_refreshes(
    tmp_path: Path, dashboard: Callable[[Path], str], watch: Callable[..., Watched]
) -> None:
    with moving(tmp_path / "runs" / "moving"):
        page = watch(dashboard(tmp_path / "runs"))
        page.wait_drawn()
        wait_until(lambda: int(page.board("drawn-step") or 0) >= 8, 30, "eight steps")
        plot = page.page.locator(".mhpo-plot .draglayer .xy .nsewdrag")
        box = plot.bounding_box()
        assert box
        middle = box["y"] + box["height"] / 2
        before = page.page.evaluate("document.querySelector('.mhpo-plot').layout.xaxis.range.reduce((a, b) => b - a)")
        page.page.mouse.move(box["x"] + box["width"] * 0.3, middle)
        page.page.mouse.down()
        page.page.mouse.move(box["x"] + box["width"] * 0.6, middle, steps=8)
        page.page.mouse.up()
        width = "document.querySelector('.mhpo-plot').layout.xaxis.range.reduce((a, b) => b - a)"
        page.page.wait_for_function(f"{width} < {0.5 * before}")
        page.page.evaluate("window.node = document.querySelector('.mhpo-plot .main-svg')")
        read = "() => [...document.querySelector('.mhpo-plot').layout.xaxis.range].map(v => Math.round(v * 1e6))"
        kept = page.page.evaluate(read)
        hover = page.page.locator(".mhpo-plot .hoverlayer .hovertext")
        for share in range(5, 95):  # a label appears near a point, wherever the points are now
            page.page.mouse.move(box["x"] + box["width"] * share / 100, middle)
            time.sleep(0.2)  # Plotly answers a move after up to 50 ms; until then it shows the label of the last place
            if hover.count():
                break
        assert hover.count(), "a label appeared"
        first, missed = int(page.board("renders")), 0
        while int(page.board("renders")) < first + 10:
            missed += hover.count() == 0
            time.sleep(0.1)
        assert page.page.evaluate(read) == kept, "the zoom survived ten refreshes"
        assert page.page.evaluate("window.node.isConnected"), "the plot was never taken away"
        assert missed == 0, "the hover label was never taken away"
        assert page.problems == []


def test_a_trainer_killed_in_the_middle_of_a_step(
    tmp_path: Path, dashboard: Callable[[Path], str], watch: Callable[..., Watched]
) -> None:
    runs = tmp_path / "runs"
    command = mhpo("train", "--preset", "healthy", "--out", runs, "--name", "victim", "--set", "warm_start.steps=5")
    with running(command, tmp_path / "train.log") as trainer:
        wait_until(lambda: len(list(runs.glob("victim/rollup/hot/*.parquet"))) > 5, 60, "five steps are committed")
        page = watch(dashboard(runs))
        page.wait_drawn()
        with open_run(runs / "victim") as run:
            committed = run.sql("SELECT step, n_tokens FROM steps ORDER BY step").fetchall()
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.wait()
    wait_until(lambda: page.board("state") == "killed", 10, "the page says that the run died")
    assert "died without a word" in page.page.locator(".mhpo-banner").inner_text()
    with open_run(runs / "victim") as run:
        after = run.sql("SELECT step, n_tokens FROM steps ORDER BY step").fetchall()
        tokens = run.sql("SELECT step, count(*) FROM tokens GROUP BY step ORDER BY step").fetchall()
    assert after[: len(committed)] == committed, "nothing committed is lost"
    assert [s for s, _ in after] == list(range(len(after)))
    assert tokens == after, "every committed step has all its tokens"


def test_hostile_names_stay_text(
    tmp_path: Path, dashboard: Callable[[Path], str], watch: Callable[..., Watched]
) -> None:
    runs = tmp_path / "runs"
    name = "<img src=x onerror=window.__xss=2> **b** \u202egnp"
    with Recorder(runs / name, objective="mhpo") as recorder:
        record_steps(recorder, range(4), layer=HOSTILE)
        recorder.close("failed", f"<script>window.__xss=3</script> {HOSTILE}")
    manifest = json.loads((runs / name / "run.json").read_text())
    manifest["objective"]["name"] = "<b onmouseover=window.__xss=4>o</b>"
    (runs / name / "run.json").write_text(json.dumps(manifest))
    page = watch(dashboard(runs))
    page.wait_drawn()
    assert "<script>window.__xss=3</script>" in page.page.locator(".mhpo-banner").inner_text()
    assert page.page.locator("[data-tile=objective] .value").inner_text().startswith("<b onmouseover=")
    assert page.page.locator(".mhpo-board img, .mhpo-board script, .mhpo-board b[onmouseover]").count() == 0
    assert "\u202e" not in page.page.locator("body").inner_text()
    page.page.get_by_text("Runs", exact=True).first.click()
    page.page.locator("[data-testid=stDataFrame]").wait_for()
    time.sleep(0.5)
    page.screenshot("runs-hostile")
    assert page.page.evaluate("window.__xss") is None
    assert page.foreign == []
    assert page.problems == []


def test_no_run_then_one_appears(
    tmp_path: Path, dashboard: Callable[[Path], str], watch: Callable[..., Watched]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    page = watch(dashboard(runs))
    page.page.get_by_text("No run yet").wait_for()
    page.screenshot("no-run")
    with Recorder(runs / "first", objective="grpo") as recorder:
        page.page.get_by_text("Running, no step yet").wait_for(timeout=10_000)
        record_steps(recorder, range(3))
        page.wait_drawn()
        assert page.board("state") == "running"
    wait_until(lambda: page.board("state") == "finished", 10, "the page says that the run has finished")
    assert page.problems == []


def test_deep_link_selects_the_run_and_rejects_a_path(
    tmp_path: Path, dashboard: Callable[[Path], str], watch: Callable[..., Watched]
) -> None:
    runs = tmp_path / "runs"
    for name in ("older", "newer"):
        with Recorder(runs / name, objective="mhpo") as recorder:
            record_steps(recorder, range(2))
    url = dashboard(runs)
    page = watch(f"{url}/?run=older")
    page.wait_drawn()
    assert page.board("run") == "older"
    page = watch(f"{url}/?run=..%2F..%2Fetc")
    page.wait_drawn()
    assert page.board("run") == "newer"


def test_training_beside_the_page_prints_nothing_in_a_pipe(tmp_path: Path) -> None:
    command = mhpo(
        "train", "--preset", "healthy", "--out", tmp_path, "--name", "short", "--set", "iterations=2",
        "--set", "warm_start.steps=2",
    )  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1 and "4 steps" in done.stdout


def test_a_zoom_into_a_long_run_is_drawn_in_single_steps(
    tmp_path: Path, dashboard: Callable[[Path], str], watch: Callable[..., Watched]
) -> None:
    make_long_run(tmp_path / "runs" / "long", 6000)
    page = watch(dashboard(tmp_path / "runs"))
    page.wait_drawn()
    plot = "document.querySelector('.mhpo-plot')"
    # what Plotly has decoded
    spacing = f"(() => {{ const x = {plot}._fullData.find((t) => t.type === 'heatmap').x; return x[1] - x[0]; }})()"
    before = page.page.evaluate(spacing)
    assert before >= 4
    zoom = f"globalThis.Plotly.relayout({plot}, {{'xaxis.range[0]': 2000, 'xaxis.range[1]': 2300}})"
    first = int(page.board("renders"))
    page.page.evaluate(zoom)
    wait_until(lambda: int(page.board("renders")) > first, 20, "the answer of the server")
    wait_until(lambda: page.page.evaluate(spacing) == 1, 20, "columns of one step")
    shown = page.page.evaluate(f"{plot}.layout.xaxis.range.map(Math.round)")
    assert shown == [2000, 2300]
    second = int(page.board("renders"))
    page.page.evaluate(f"globalThis.Plotly.relayout({plot}, {{'xaxis.autorange': true}})")
    wait_until(lambda: int(page.board("renders")) > second, 20, "all steps again")
    wait_until(lambda: page.page.evaluate(spacing) == before, 20, "columns as before")
    assert page.problems == []
