"""Our own runs: every committed file is copied as it is, so that nothing is lost and nothing is computed again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from collectors import layout
from collectors.integrity import verify
from collectors.storage import LocalStorage, Storage, open_storage
from mhpo_core.errors import StoreError


def copy_run(source: Path, target: Path) -> int:
    """Copy a run, or bring a copy up to date; returns how many files were copied.

    Files have their checksum in their name: one that is there is the same one. A damaged file is not copied.

    Raises:
        StoreError: the source is no run, or the target is another run.
    """
    manifest = layout.read_manifest(open_storage(source))
    if layout.is_run(target):
        there = layout.read_manifest(open_storage(target))
        if (there.get("run_id"), there.get("created")) != (manifest.get("run_id"), manifest.get("created")):
            raise StoreError(f"import: {target} is another run. Give another --name.")
        return _copy(LocalStorage(source), LocalStorage(target))
    if target.exists():
        raise StoreError(f"import: {target} exists and is no run. Give another --name or --out.")
    aside = target.with_name(f".{target.name}.{os.getpid()}.importing")
    try:
        aside.mkdir(parents=True)
        copied = _copy(LocalStorage(source), LocalStorage(aside))
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return copied


def _copy(source: Storage, target: Storage) -> int:
    damaged = {finding.name for finding in verify(source).findings}
    # a step is committed by its file of rollup, so that of a live run comes last; run.json makes it a run
    folders = [f"{table}/{level}" for table in layout.STEP_TABLES for level in layout.LEVELS[table]]
    copied = 0
    for folder in (*folders, layout.EVENTS, layout.ALARMS, layout.ATTEMPTS):
        for base in source.list(folder):
            name = f"{folder}/{base}"
            if name not in damaged and not target.exists(name):
                target.write(name, source.read(name), fsync=False)
                copied += 1
    for name in (layout.VOCABULARY, layout.MANIFEST):
        if source.exists(name) and not target.exists(name):
            target.write(name, source.read(name), fsync=True)
            copied += 1
    return copied
