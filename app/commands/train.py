"""`mhpo train [CONFIG.toml] [--preset P] [--set key=value]… [--out RUNS] [--name N] [--device D] [--resume] …`"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from app.text import human_duration
from collectors import Recorder
from collectors.layout import is_run
from collectors.recorder import DISK_LIMIT
from collectors.store import FSYNC
from collectors.token_rows import COMPACT, EXACT, FULL, MINIMAL
from mhpo_core.errors import ConfigError, StoreError
from mhpo_core.training import Config, Intervention, load_config, open_task, to_toml, train
from mhpo_core.training.intervention import ACTIONS

DEFAULT_RUNS = Path("runs")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", nargs="?", type=Path, help="training configuration")
    parser.add_argument("--preset", help="configuration that comes with the package; CONFIG.toml overlays it")
    parser.add_argument(
        "--set", metavar="key=value", dest="overrides", action="append", default=[], help="change one setting"
    )
    parser.add_argument("--out", metavar="RUNS", type=Path, default=DEFAULT_RUNS, help="folder of runs (default: runs)")
    parser.add_argument("--name", help="name of the run folder (default: the configuration's name and the time)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--resume", action="store_true", help="continue the run --name from its checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    store = parser.add_argument_group("what is stored, see `collectors.Recorder`")
    store.add_argument(
        "--tokens", default="flight", metavar="all|sample:N|flight:K", help="tokens kept (default: flight)"
    )
    store.add_argument(
        "--disk-limit", default=DISK_LIMIT, metavar="SIZE", help=f"default: {DISK_LIMIT}; none = no limit"
    )
    store.add_argument("--precision", choices=[EXACT, COMPACT], default=EXACT)
    store.add_argument("--columns", choices=[FULL, MINIMAL], default=FULL)
    store.add_argument(
        "--fsync", choices=list(FSYNC), default=FSYNC[0], help="what survives a power cut (default: step)"
    )
    parser.add_argument(
        "--on-critical",
        choices=ACTIONS,
        help="what to do at a critical alarm, once per incident: end the run, save a checkpoint aside, or halve the "
        "learning rate (default: nothing but tell)",
    )
    parser.add_argument("--with-parent", action="store_true", help="stop when the process that started this one ends")


def run(options: argparse.Namespace) -> int:
    # an objective of one's own may lie in the folder one is in; last, so that no file there hides a package
    sys.path.append(os.getcwd())
    config = load_config(options.config, preset=options.preset, overrides=options.overrides)
    if options.dry_run:
        print(to_toml(config), end="")
        return 0
    if not sys.stderr.isatty():
        _silence_transformers()
    folder = _run_folder(options, config)
    stop = _stop_requested(os.getppid() if options.with_parent else None)
    task = open_task(config)
    recorder = Recorder(
        folder,
        objective=config.objective.create(),
        config=config.to_dict(),
        updates_per_iteration=config.updates_per_iteration,
        vocabulary={i: task.decode_token(i) for i in range(task.vocab_size)},
        tokens=options.tokens,
        columns=options.columns,
        precision=options.precision,
        disk_limit=options.disk_limit,
        fsync=options.fsync,
    )
    if sys.stderr.isatty():
        print(f"Recording {recorder.describe()}", file=sys.stderr)
    checkpoint = folder / "checkpoint"
    progress = _TerminalProgress(folder)

    def intervene() -> Intervention | None:
        alarm = recorder.take_critical() if options.on_critical else None
        return alarm and Intervention(options.on_critical, f"critical alarm {alarm.id}")

    with recorder:
        summary = train(
            config, recorder, options.device, progress=progress, stop=stop, intervene=intervene,
            checkpoint=checkpoint, resume=checkpoint if options.resume else None,
        )  # fmt: skip
        if summary.stopped:
            why = f", because of the {summary.reason}" if summary.reason else ""
            recorder.close("stopped", f"asked to stop after {summary.steps} steps{why}")
    progress.end()
    if summary.reason:
        print(f"Stopped because of the {summary.reason}; `mhpo check {folder}` says more.", file=sys.stderr)
    print(f"{folder}: {summary.steps} steps in {human_duration(summary.seconds)}, reward {summary.final_reward:.3f}")
    return 0


def _silence_transformers() -> None:
    # half a second to import, which the other commands need not wait for
    from transformers.utils import logging

    logging.disable_progress_bar()


def _run_folder(options: argparse.Namespace, config: Config) -> Path:
    name = options.name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not _SAFE_NAME.fullmatch(name):
        raise ConfigError(
            f"--name: got {name!r}, allowed are up to 100 letters, digits, '.', '_' and '-', beginning with a letter "
            "or digit. Choose another name."
        )
    folder = Path(options.out) / name
    if options.resume and (not options.name or not is_run(folder)):
        raise StoreError(
            f"--resume: {folder} is not a run, allowed is the --name of a run in --out. `mhpo runs` lists them."
        )
    if not options.resume and is_run(folder):
        raise StoreError(f"{folder} holds a run already. Give another --name, or --resume to continue it.")
    return folder


def _stop_requested(parent: int | None) -> Callable[[], bool]:
    """True after SIGINT or SIGTERM, or once the parent is gone."""
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        # a second signal ends the process at once
        signal.signal(number, lambda n, _: (asked.append(n), signal.signal(n, signal.SIG_DFL)))
    return lambda: bool(asked) or (parent is not None and os.getppid() != parent)


class _TerminalProgress:
    """One line that is written over on a terminal, nothing in a pipe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._terminal = sys.stderr.isatty()
        self._last = 0.0

    def __call__(self, phase: str, done: int, total: int, info: dict[str, float]) -> None:
        now = time.monotonic()
        if not self._terminal or (now - self._last < 0.1 and done < total):
            return
        self._last = now
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in info.items())
        sys.stderr.write(f"\r\x1b[K{self._folder}  {phase.replace('_', ' ')} {done}/{total}  {numbers}")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._terminal:
            sys.stderr.write("\n")
