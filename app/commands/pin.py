"""`mhpo pin RUN`"""

from __future__ import annotations

import argparse

from collectors.layout import read_manifest
from collectors.retention import pin_ring
from collectors.storage import open_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of one run, or s3://bucket/folder")


def run(options: argparse.Namespace) -> int:
    storage = open_storage(options.run_folder)
    read_manifest(storage)
    pinned = pin_ring(storage)
    if not pinned:
        print("The ring is empty: there is nothing to keep. `mhpo sql RUN 'FROM events'` shows what was kept before.")
        return 0
    first, last = min(f.first for f in pinned), max(f.last for f in pinned)
    print(f"All tokens of steps {first:,} to {last:,} are kept for good.")
    return 0
