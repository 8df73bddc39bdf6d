"""Is every file of a run what its writer wrote? Truncated, emptied, flipped, foreign, doubled and missing files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collectors import layout
from collectors.encoding import read_rows
from collectors.layout import EventFile, StepFile
from collectors.storage import TEMPORARY, Storage

_OTHER_FOLDERS = (layout.ATTEMPTS, layout.WRITERS, *(f"{t}/{layout.LEFT}" for t in layout.STEP_TABLES))
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Args:
        kind: "truncated", "empty", "damaged" (other bytes than were written), "foreign" (no file of a run), "renamed"
            (rows of other steps than its name tells), "doubled" (two files for one step of one rank: two writers),
            "missing" (a committed step without its rows).
        name: the file, relative to the run, untrusted.
        steps: first and last step it held, None where it is no file of steps.
        detail: one sentence.
    """

    kind: str
    name: str
    steps: tuple[int, int] | None
    detail: str


@dataclass
class Verification:
    """What `verify` found.

    Args:
        findings: empty if everything is as it was written.
        files, size: files checked and their bytes.
        steps, tokens: rows that can be read.
        leftovers: temporary files of writers that were killed; harmless, and removed by the next writer.
        rows: file of steps → its rows.
    """

    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    size: int = 0
    steps: int = 0
    tokens: int = 0
    leftovers: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)


def verify(storage: Storage, progress: Progress = lambda done, total: None) -> Verification:
    """Read every file of a run once and compare it with its name.

    Raises:
        StoreError: there is no run, or its run.json cannot be read.
    """
    layout.read_manifest(storage)
    found = Verification()
    names = sorted(storage.walk())
    for index, (name, size) in enumerate(names):
        progress(index, len(names))
        _check(storage, name, size, found)
    progress(len(names), len(names))
    _check_whole(storage, found)
    return found


def is_intact(storage: Storage, file: StepFile) -> bool:
    """True if the file has the bytes that its name tells."""
    try:
        data = storage.read(file.name)
    except OSError:
        return False
    return layout.holds_its_bytes(file, data)


def _check(storage: Storage, name: str, size: int, found: Verification) -> None:
    folder, _, base = name.rpartition("/")
    if layout.is_checkpoint(folder) or folder in _OTHER_FOLDERS:
        return
    if name.endswith(TEMPORARY):
        found.leftovers.append(name)
        return
    table, _, level = folder.partition("/")
    file: StepFile | EventFile | None = None
    if level in layout.LEVELS.get(table, ()):
        file = layout.parse_name(folder, base)
    elif folder in (layout.EVENTS, layout.ALARMS):
        file = layout.parse_event(base, folder)
    found.files += 1
    found.size += size
    if file is not None:
        _check_bytes(storage, file, size, found)
    elif name == layout.MANIFEST:
        json.loads(storage.read(name))
    elif name == layout.VOCABULARY:
        _check_vocabulary(storage, found)
    else:
        found.findings.append(Finding("foreign", name, None, "no file of a run has this name; nothing reads it"))


def _check_bytes(storage: Storage, file: StepFile | EventFile, size: int, found: Verification) -> None:
    steps = (file.first, file.last) if isinstance(file, StepFile) else None
    if size != file.size:
        kind = "truncated" if 0 < size < file.size else "damaged" if size else "empty"
        found.findings.append(Finding(kind, file.name, steps, f"{size:,} of {file.size:,} bytes are there"))
        return
    try:
        data = storage.read(file.name)
    except FileNotFoundError:  # the writer has sealed or removed it in the meantime
        return
    if not layout.holds_its_bytes(file, data):
        detail = "its bytes are not those that were written"
        found.findings.append(Finding("damaged", file.name, steps, detail))
    elif isinstance(file, StepFile) and file.name.split("/")[1] not in layout.ZOOM.values():
        _check_rows(file, data, found)


def _check_rows(file: StepFile, data: bytes, found: Verification) -> None:
    """Whether the name tells the steps of the rows; a file of the right bytes can still have got another one's name."""
    steps = (file.first, file.last)
    told = {"step": steps, "attempt": (file.attempt, file.attempt), "rank": (file.rank, file.rank)}
    if file.name.startswith(layout.TOKENS):
        del told["rank"]
    try:
        rows = read_rows(data, list(told))
        held = {name: pc.min_max(rows[name]).as_py() for name in told}
    except (pa.ArrowException, KeyError) as error:
        detail = f"it is no file of this table ({str(error).splitlines()[0]})"
        found.findings.append(Finding("foreign", file.name, steps, detail))
        return
    found.rows[file.name] = len(rows)
    wrong = [
        name
        for name, (low, high) in told.items()
        if len(rows) and not low <= held[name]["min"] <= held[name]["max"] <= high
    ]
    if wrong:
        detail = ", ".join(f"{name} {held[name]['min']} to {held[name]['max']}" for name in wrong)
        found.findings.append(Finding("renamed", file.name, steps, f"its rows are of {detail}"))


def _check_vocabulary(storage: Storage, found: Verification) -> None:
    try:
        # nothing in its name tells its checksum; its pages do
        pq.read_table(pa.BufferReader(storage.read(layout.VOCABULARY)), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        detail = f"cannot be read ({str(error).splitlines()[0]})"
        found.findings.append(Finding("damaged", layout.VOCABULARY, None, detail))


def _check_whole(storage: Storage, found: Verification) -> None:
    """What no single file tells: steps that two files hold, and committed steps whose rows are gone."""
    wrong = {f.name for f in found.findings}
    sealed = {t: layout.list_level(storage, t, layout.SEALED) for t in (layout.TOKENS, layout.SEQUENCES)}
    # after the tables whose rows are written before
    rollup = [f for f in layout.list_table(storage, layout.ROLLUP) if f.name not in wrong]
    found.findings += _without_summary(storage, sealed, rollup, found.findings)
    for table in layout.STEP_TABLES:
        found.findings += _doubled(layout.list_level(storage, table, layout.HOT), wrong)
    tokens = [f for f in layout.list_table(storage, layout.TOKENS) if f.name not in wrong]
    found.tokens = sum(found.rows.get(f.name, 0) for f in tokens)
    kept = layout.Coverage(tokens)
    reported = [f.steps for f in found.findings if f.steps and f.name.startswith(layout.TOKENS)]
    columns = ["step", "attempt", "rank", "kept_tokens", "ring_tokens"]
    for file in rollup:
        try:
            rows = read_rows(storage.read(file.name), columns).to_pylist()
        except (pa.ArrowException, OSError):
            continue
        found.steps += len(rows)
        for row in rows:
            step = StepFile(row["step"], row["step"], row["attempt"], row["rank"], "", "", 0)
            lost = row["kept_tokens"] and not kept.holds(step)
            if lost and not any(first <= row["step"] <= last for first, last in reported):
                detail = f"{row['kept_tokens']:,} tokens of a committed step are not there"
                found.findings.append(Finding("missing", layout.TOKENS, (row["step"], row["step"]), detail))


def _without_summary(
    storage: Storage, sealed: dict[str, list[StepFile]], rollup: list[StepFile], known: list[Finding]
) -> list[Finding]:
    """Steps that were sealed, so they had been committed, and whose summaries are gone."""
    committed = layout.Coverage(rollup)
    reported = [f.steps for f in known if f.steps and f.name.startswith(layout.ROLLUP)]
    gone = {
        (file.first, file.last)
        for files in sealed.values()
        for file in files
        if not committed.holds(replace(file, first=file.last)) and storage.exists(file.name)
    }
    return [
        Finding("missing", layout.ROLLUP, steps, "the summaries of steps with tokens or sequences are not there")
        for steps in sorted(gone)
        if not any(first <= steps[1] <= last for first, last in reported)
    ]


def _doubled(files: Iterable[StepFile], wrong: set[str]) -> list[Finding]:
    seen: dict[tuple[int, int, int], StepFile] = {}
    findings = []
    for file in sorted(files):
        key = (file.first, file.attempt, file.rank)
        if key in seen and file.name not in wrong and seen[key].name not in wrong:
            detail = f"{seen[key].base} holds the same step of the same rank: two processes wrote it"
            findings.append(Finding("doubled", file.name, (file.first, file.last), detail))
        seen.setdefault(key, file)
    return findings
