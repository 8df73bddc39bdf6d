"""The beginning of a run: its folder, its run.json, its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from collectors import layout
from collectors.encoding import encode
from collectors.schema import VOCABULARY_SCHEMA, utf8
from collectors.storage import TEMPORARY, Storage
from mhpo_core.errors import StoreError

_OWN_NAMES = {
    *layout.STEP_TABLES,
    layout.EVENTS,
    layout.ALARMS,
    layout.ATTEMPTS,
    layout.WRITERS,
    layout.VOCABULARY,
}


def create_run(
    storage: Storage, manifest: Mapping[str, Any], vocabulary: Mapping[int, str] | None, *, fsync: bool
) -> tuple[bool, dict[str, Any]]:
    """Make the run unless it is there; of several ranks at once, one makes it.

    Returns:
        True if the run holds committed steps or events of before, and the run.json that is stored.

    Raises:
        StoreError: the place holds something else, or a run of another objective.
    """
    existed = storage.exists(layout.MANIFEST)
    if not existed:
        _refuse_strangers(storage)
        storage.create(layout.MANIFEST, _as_json({**manifest, "schema_version": layout.SCHEMA_VERSION}))
    stored = layout.read_manifest(storage)
    _require_same_objective(storage, stored, manifest)
    if vocabulary is not None and not storage.exists(layout.VOCABULARY):
        ids = sorted(vocabulary)
        rows = pa.table({"token_id": ids, "token": [utf8(vocabulary[i]) for i in ids]}, schema=VOCABULARY_SCHEMA)
        storage.write(layout.VOCABULARY, encode(rows), fsync=fsync)
    return existed, stored


def adopt_settings(storage: Storage, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """run.json of a resumed run with the token policy and the limit of now; its columns stay as they began."""
    before = stored.get("store") or {}
    now = {**before, **{n: v for n, v in (given.get("store") or {}).items() if n in ("tokens", "disk_limit")}}
    if now == before:
        return dict(stored)
    adopted = {**stored, "store": now}
    storage.write(layout.MANIFEST, _as_json(adopted), fsync=True)
    return adopted


def remove_temporary_files(storage: Storage, rank: int, world_size: int) -> None:
    """Delete what a killed writer of this rank left behind; the rank's lock is held.

    Files of the whole run, such as run.json, may be in the making by another rank of the job.
    """
    if storage.local is None:
        return
    for name, _ in storage.walk():
        ours = f".r{rank:03d}." in name or (world_size == 1 and ".r" not in name)
        if name.endswith(TEMPORARY) and ours and not name.startswith(layout.CHECKPOINT):
            storage.delete(name)


def _refuse_strangers(storage: Storage) -> None:
    if storage.local is None or not storage.local.is_dir():
        return
    # a writer that was killed at once can leave a temporary file and no run.json
    for path in sorted(storage.local.iterdir()):
        if path.name not in _OWN_NAMES and not layout.is_checkpoint(path.name) and path.suffix != TEMPORARY:
            raise StoreError(
                f"Recorder: {storage.url} holds {path.name!r} and is not a run, "
                "allowed is a new, an empty or a run folder. Choose another name."
            )


def _as_json(manifest: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"Recorder: config cannot be stored ({error}), allowed is what JSON can hold. "
            "Give texts, numbers, lists and mappings."
        ) from error
    # a file name or a command line can hold what is not UTF-8; it becomes "?"
    return text.encode("utf-8", "replace")


def _require_same_objective(storage: Storage, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """The stored hyperparameters explain every token of the run, so they cannot change on the way."""
    # JSON makes lists of tuples
    was, now = stored.get("objective") or {}, json.loads(json.dumps(given.get("objective") or {}))
    before, after = was.get("hyperparameters") or {}, now.get("hyperparameters") or {}
    changed = [f"{n} = {after[n]!r} for {before[n]!r}" for n in before.keys() & after.keys() if before[n] != after[n]]
    if was.get("name", now.get("name")) != now.get("name"):
        changed = [f"{now.get('name')} for {was.get('name')}"]
    if changed:
        raise StoreError(
            f"Recorder: {storage.url} was recorded with another objective ({', '.join(sorted(changed))}), "
            "allowed is the same one. Record into another folder."
        )
