"""`mhpo demo`: a training run in a child process and the dashboard on it in this one."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from app.commands.train import DEFAULT_RUNS
from app.guard import LOOPBACK
from app.server import DEFAULT_PORT, require_free_port, serve
from collectors.layout import is_run
from mhpo_core.training import load_preset

_GIVE_UP_AFTER = 20.0  # seconds; a trainer asked to stop finishes its step and writes what waits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="demo", help="training preset (default: demo)")
    parser.add_argument("--out", metavar="RUNS", type=Path, default=DEFAULT_RUNS, help="folder of runs (default: runs)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--headless", action="store_true", help="do not open a browser")


def run(options: argparse.Namespace) -> int:
    load_preset(options.preset)
    require_free_port(LOOPBACK[0], options.port)
    name = f"{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    trainer = _start_trainer(options, name)
    leaving = threading.Event()
    watch = threading.Thread(target=_leave_if_never_begun, args=(trainer, options.out / name, leaving), daemon=True)
    watch.start()
    try:
        serve(options.out, port=options.port, run=name, open_browser=not options.headless)
    finally:
        leaving.set()
        ended_by_itself = trainer.poll()
        _end(trainer)
    return 2 if ended_by_itself and not is_run(options.out / name) else 0


def _leave_if_never_begun(trainer: subprocess.Popen[bytes], run: Path, leaving: threading.Event) -> None:
    """End the demo when the trainer ended without a run; it has said why. A run that broke stays on the page."""
    if trainer.wait() != 0 and not leaving.is_set() and not is_run(run):
        os.kill(os.getpid(), signal.SIGTERM)


def _start_trainer(options: argparse.Namespace, name: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "app.cli", "train", "--preset", options.preset, "--out", str(options.out), "--name", name,
        "--device", options.device, "--with-parent",
    ]  # fmt: skip
    # one thread: at these sizes a second one gains little, and the dashboard and the browser need a core
    threads = {"OMP_NUM_THREADS": "1"} if options.device != "cuda" else {}
    # a session of its own, so that Ctrl-C reaches this process only and the two end in order
    return subprocess.Popen(command, start_new_session=True, env={**threads, **os.environ}, stdin=subprocess.DEVNULL)


def _end(trainer: subprocess.Popen[bytes]) -> None:
    if trainer.poll() is None:
        trainer.terminate()
        try:
            trainer.wait(_GIVE_UP_AFTER)
        except subprocess.TimeoutExpired:
            trainer.kill()
            trainer.wait()
