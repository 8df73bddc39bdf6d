"""`mhpo dash RUNS [--host] [--port] [--metrics]`"""

from __future__ import annotations

import argparse
from pathlib import Path

from app.guard import LOOPBACK
from app.server import DEFAULT_PORT, serve
from collectors.layout import is_run
from mhpo_core.errors import StoreError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUNS", type=Path, help="folder of runs, or one run")
    parser.add_argument("--host", default=LOOPBACK[0], help="loopback address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument(
        "--metrics", action="store_true", help="serve the newest numbers of every run at /metrics, for Prometheus"
    )


def run(options: argparse.Namespace) -> int:
    folder: Path = options.runs
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder. Give the folder that holds the run folders.")
    one = folder.absolute().name if is_run(folder) else ""
    serve(
        folder.absolute().parent if one else folder,
        host=options.host,
        port=options.port,
        run=one,
        metrics=options.metrics,
    )
    return 0
