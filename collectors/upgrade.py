"""A store of an older schema becomes one of this schema, in place; interrupted, it is as old as before."""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from collectors import layout
from collectors.encoding import encode, read_rows
from collectors.layout import StepFile
from collectors.schema import EVENT_SCHEMA, ROLLUP_SCHEMA, SEQUENCE_SCHEMA, TOKEN_SCHEMA
from collectors.storage import Storage
from collectors.writers import is_held
from mhpo_core.errors import StoreError

OLDER = (1, 2)
_OLD_NAME = re.compile(r"s(\d{9,18})(?:-(\d{9,18}))?\.a(\d{3,9})\.r(\d{3,9})\.parquet")
_OLD_LOCK = "writer.lock"
_OLD_EVENT = re.compile(r"e\d+-\d+\.parquet")
_SCHEMAS = {layout.ROLLUP: ROLLUP_SCHEMA, layout.TOKENS: TOKEN_SCHEMA, layout.SEQUENCES: SEQUENCE_SCHEMA}
_SETTINGS = {"tokens": "all", "columns": "full", "precision": "exact", "disk_limit": None}


def upgrade(storage: Storage) -> bool:
    """Bring a run to the schema of this program; False if it has it already.

    Schemas 1 and 2 had no checksum in their names and two columns for the hazard.

    Raises:
        StoreError: there is no run, its run.json cannot be read, a newer version wrote it, or an older one writes it.
        OSError, pyarrow.ArrowException: a file cannot be read or written; the run is as it was.
    """
    manifest = layout.read_manifest(storage, versions=(*OLDER, layout.SCHEMA_VERSION))
    if manifest["schema_version"] == layout.SCHEMA_VERSION:
        _remove_old(storage)
        return False
    if is_held(storage, _OLD_LOCK):
        raise StoreError(
            f"compact: {storage.url} is being written by an older version of mhpo. Stop that training first, or wait."
        )
    for table in layout.STEP_TABLES:
        for file, level in _old_files(storage, table):
            data = encode(_conform(read_rows(storage.read(file.name)), table), table)
            name = layout.file_name(file.first, file.last, file.attempt, file.rank, data)
            storage.write(f"{table}/{level}/{name}", data, fsync=True)
    for number, row in enumerate(_old_events(storage)):
        data = encode(pa.Table.from_pylist([row | {"number": number, "rank": 0}], schema=EVENT_SCHEMA))
        storage.write(f"{layout.EVENTS}/{layout.event_name(number, 0, data)}", data, fsync=True)
    now = manifest | {"schema_version": layout.SCHEMA_VERSION, "store": _SETTINGS}
    # from here on the run is of the new schema, and the old files are passed over
    storage.write(layout.MANIFEST, (json.dumps(now, indent=2, ensure_ascii=False) + "\n").encode(), fsync=True)
    _remove_old(storage)
    return True


def _old_files(storage: Storage, table: str) -> list[tuple[StepFile, str]]:
    files: list[StepFile] = []
    for level in (layout.HOT, layout.SEALED):
        for name, size in storage.list(f"{table}/{level}").items():
            if found := _OLD_NAME.fullmatch(name):
                first, last, attempt, rank = (int(part) if part else None for part in found.groups())
                assert first is not None and attempt is not None and rank is not None
                path = f"{table}/{level}/{name}"
                files.append(StepFile(first, first if last is None else last, attempt, rank, "", path, size))
    return [(f, f.name.split("/")[1]) for f in layout.without_covered(files)]


def _old_events(storage: Storage) -> list[dict[str, Any]]:
    names = [n for n in storage.list(layout.EVENTS) if _OLD_EVENT.fullmatch(n)]
    rows = [row for n in names for row in read_rows(storage.read(f"{layout.EVENTS}/{n}")).to_pylist()]
    return sorted(rows, key=lambda row: float(row["time"]))


def _conform(rows: pa.Table, table: str) -> pa.Table:
    """The rows with the columns of today: what is new is NULL, what followed from others is left out."""
    schema = _SCHEMAS[table]
    given = {name: rows[name] for name in rows.schema.names}
    if table == layout.TOKENS:
        given["hazard"] = pc.add(rows["hazard_positive"], rows["hazard_negative"])
    if table == layout.ROLLUP:
        # nested columns may lack a field; going through Python objects fills it with NULL
        return pa.Table.from_pylist(
            [{k: v for k, v in r.items() if k in schema.names} for r in rows.to_pylist()], schema
        )
    columns = {f.name: given[f.name].cast(f.type) if f.name in given else pa.nulls(len(rows), f.type) for f in schema}
    return pa.table(columns, schema=schema)


def _remove_old(storage: Storage) -> None:
    for table in layout.STEP_TABLES:
        for level in (layout.HOT, layout.SEALED):
            for name in storage.list(f"{table}/{level}"):
                if _OLD_NAME.fullmatch(name):
                    storage.delete(f"{table}/{level}/{name}")
    for name in storage.list(layout.EVENTS):
        if _OLD_EVENT.fullmatch(name):
            storage.delete(f"{layout.EVENTS}/{name}")
    storage.delete(_OLD_LOCK)
