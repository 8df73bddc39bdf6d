"""The main job: one command, a real run, moving in a browser; then Ctrl-C, and nothing is left."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from collectors import open_run
from tests.e2e.conftest import Watched, free_port, interrupt, mhpo, running, wait_until

PANELS = 8

# What Plotly has really painted in a subplot: an image of a heat map, or the path of a line with more than a start.
PAINTED = """() => {
  const plot = document.querySelector('.mhpo-plot');
  return [...plot.querySelectorAll('.cartesianlayer > .subplot')].map(s => {
    const lines = [...s.querySelectorAll('.scatterlayer path.js-line')]
      .filter(p => (p.getAttribute('d') || '').length > 8);
    return lines.length + s.querySelectorAll('.heatmaplayer image').length;
  });
}"""


def processes_about(text: str) -> list[str]:
    listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if text in line and "ps -ewwo" not in line]


def check_page(page: Watched, name: str) -> None:
    page.wait_drawn()
    page.page.wait_for_function(f"document.querySelectorAll('.mhpo-plot .subplot').length >= {PANELS}")
    page.screenshot(name)
    painted = page.page.evaluate(PAINTED)
    assert len(painted) == PANELS and all(painted), f"drawn elements per panel: {painted}"
    assert page.problems == []
    assert page.foreign == []


def test_demo_from_start_to_ctrl_c(tmp_path: Path, watch: Callable[..., Watched]) -> None:
    runs, port = tmp_path / "demo runs", free_port()
    command = ["make", "demo", "HEADLESS=1", f"PORT={port}", f"RUNS={runs}"]
    log = tmp_path / "demo.log"
    with running(command, log) as demo:
        wait_until(lambda: b"Dashboard:" in log.read_bytes(), 60, "the dashboard answers")
        dark = watch(f"http://127.0.0.1:{port}", scheme="dark")
        dark.wait_drawn(90)
        seen = {dark.board("drawn-step")}
        wait_until(lambda: len(seen.add(dark.board("drawn-step")) or seen) > 3, 60, "the step moves three times")
        assert dark.board("state") == "running"
        check_page(dark, "demo-dark")
        check_page(watch(f"http://127.0.0.1:{port}", scheme="light"), "demo-light")
        check_page(watch(f"http://127.0.0.1:{port}", scheme="dark", width=1024, height=768), "demo-dark-1024")
        assert len(processes_about(str(runs))) >= 2, "a trainer and a server"
        interrupt(demo)
    wait_until(lambda: not processes_about(str(runs)), 15, "no process is left")
    output = log.read_text()
    assert "Traceback" not in output and "leaked" not in output, output
    (run,) = runs.iterdir()
    with open_run(run) as stored:
        steps = stored.sql("SELECT count(*), max(step) FROM steps").fetchall()[0]
        assert steps[0] == steps[1] + 1 >= 3
        assert stored.sql("SELECT kind FROM events ORDER BY time").fetchall()[-1] == ("stopped",)


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["make", "demo", "HEADLESS=1", f"PORT={port}", f"RUNS={tmp_path / 'runs'}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    told = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(told) == 1 and f"port {port} on 127.0.0.1 is not free" in told[0] and "PORT=" in told[0]
    assert not (tmp_path / "runs").exists(), "nothing was started"


def test_a_folder_that_cannot_be_written_ends_the_demo(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    command = ["make", "demo", "HEADLESS=1", f"PORT={free_port()}", f"RUNS={tmp_path / 'file' / 'runs'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    told = [line for line in done.stderr.splitlines() if not line.startswith(("make", "Dashboard"))]
    assert done.returncode != 0
    assert len(told) == 1 and "cannot be written" in told[0], done.stderr


def test_an_early_ctrl_c_ends_the_demo_cleanly(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    log = tmp_path / "demo.log"
    with running(mhpo("demo", "--headless", "--port", str(free_port()), "--out", runs), log) as demo:
        # the trainer still imports torch then and has no run yet
        wait_until(lambda: len(processes_about(str(runs))) >= 2, 30, "the trainer is started")
        wait_until(lambda: b"Dashboard:" in log.read_bytes(), 60, "the dashboard answers")
        interrupt(demo)
        assert demo.returncode == 0, log.read_text()
    wait_until(lambda: not processes_about(str(runs)), 15, "no process is left")
    assert "Traceback" not in log.read_text()
