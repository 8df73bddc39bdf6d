"""`mhpo compact RUN`"""

from __future__ import annotations

import argparse
import sys

import pyarrow as pa

from app.text import human_bytes, visible
from collectors.compaction import compact
from collectors.storage import open_storage
from mhpo_core.errors import StoreError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of one run, or s3://bucket/folder")


def run(options: argparse.Namespace) -> int:
    storage = open_storage(options.run_folder)
    quiet = not sys.stderr.isatty()
    try:
        done = compact(storage, progress=(lambda what, number, total: None) if quiet else _progress)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"{storage.url} could not be compacted ({str(error).splitlines()[0]}), nothing of it is lost. "
            "Free space or fix its rights, and run it again."
        ) from error
    finally:
        if not quiet:
            sys.stderr.write("\r\x1b[K")
    live = ", without what a living writer has not sealed yet" if done.live else ""
    print(
        f"{done.files_before:,} files of {human_bytes(done.bytes_before)} became {done.files_after:,} of "
        f"{human_bytes(done.bytes_after)}{live}."
    )
    for name in done.skipped:
        print(f"Left as it is, damaged: {visible(name, 200)}. `mhpo verify` says what it held.")
    return 0


def _progress(what: str, number: int, total: int) -> None:
    sys.stderr.write(f"\r\x1b[Kcompact {what} {number:,}/{total:,}")
    sys.stderr.flush()
