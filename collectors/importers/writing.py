"""From recognised files to a run folder: steps of several sources merged, written aside, then shown at once.

A run that was imported before takes only what is new. How many records each source gave is noted in an event, so that
a log that has grown goes on where it ended.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from collectors import layout
from collectors.importers.diagnostics import Possible, diagnose, present
from collectors.importers.formats import AUTO, MHPO, recognise
from collectors.importers.merging import merged
from collectors.importers.mhpo_run import copy_run
from collectors.importers.names import UNKNOWN, columns_of, framework_of
from collectors.importers.progress import EVENT, count_sequences, fingerprint, recorded, state_of
from collectors.importers.steps import Format, ImportedStep, Notes, SeveralRuns
from collectors.reader import open_run
from collectors.recorder import Recorder
from mhpo_core.errors import BatchError, StoreError

_OBJECTIVE = "ppo_clip"
_TELLING = 8
"""Records whose names tell the framework: the first of a log may have an evaluation alone."""

Progress = Callable[[int], None]


@dataclass
class Imported:
    """What an import did.

    Args:
        path: the run folder.
        formats: what each source was taken for.
        framework: whose names its metrics have.
        steps, tokens, sequences: that were added.
        unmapped: metrics that are kept under their own names alone.
        notes: what could not be taken as it is.
        diagnostics: what can be told about the run.
    """

    path: Path
    formats: list[str] = field(default_factory=list)
    framework: str = UNKNOWN
    steps: int = 0
    tokens: int = 0
    sequences: int = 0
    unmapped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    diagnostics: list[Possible] = field(default_factory=list)


def import_run(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    format: str = AUTO,
    name: str | None = None,
    objective: str = _OBJECTIVE,
    progress: Progress = lambda steps: None,
) -> Imported:
    """Make one run of some files and folders of another tool; a run of that name takes what is new in them.

    Args:
        sources: all of one training; their steps are merged.
        out: folder of runs.
        format: "auto", or one of FORMATS.
        name: of the run; default: that of the first source.
        objective: that trained, as far as known; the terms of the tokens are computed with it.

    Raises:
        StoreError: a source cannot be read or is in no known format, it has no step, or the run was not imported.
        OSError: the run cannot be written. A new run is then not there at all.
    """
    paths = [Path(source) for source in sources]
    if format in (AUTO, MHPO) and layout.is_run(paths[0]) and len(paths) == 1:
        return _copied(paths[0], Path(out) / _checked(_default_name(paths[0]) if name is None else name))
    found = [one for path in paths for one in recognise(path, format)]
    target = Path(out) / _checked(_default_name(paths[0]) if name is None else name)
    work = _Import(found, target, objective, progress)
    return work.append() if layout.is_run(target) else work.create()


def _copied(source: Path, target: Path) -> Imported:
    before = recorded(target)[0] if layout.is_run(target) else 0
    copied = copy_run(source, target)
    with open_run(target) as opened:
        tokens, sequences = opened.sql(
            "SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM sequences)"
        ).fetchall()[0]
    done = Imported(target, [MHPO], MHPO, recorded(target)[0] - before)
    return replace(done, tokens=tokens, sequences=sequences) if copied else done


class _Import:
    """One import on its way."""

    def __init__(
        self, found: list[tuple[Format, list[Path]]], target: Path, objective: str, progress: Progress
    ) -> None:
        self._found, self._target, self._objective, self._progress = found, target, objective, progress
        self._notes, self._has = Notes(), set[str]()
        self._unmapped: dict[str, None] = {}
        own = dict.fromkeys(one.framework for one, _ in found if one.framework != UNKNOWN)
        self._framework = next(iter(own), UNKNOWN)
        self._done = Imported(target, [one.name for one, _ in found])

    def create(self) -> Imported:
        """Write aside, then rename: nobody sees half of it."""
        if self._target.exists():
            raise StoreError(f"import: {self._target} exists and is no run. Give another --name or --out.")
        folder = self._target.with_name(f".{self._target.name}.{os.getpid()}.importing")
        aside = folder / self._target.name  # a run is called like its folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write(aside, self._records(), 0)
            if not self._done.steps:
                raise StoreError(f"import: {self._sources()} holds no step. Was it the right file?")
            os.rename(aside, self._target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self._finished()

    def append(self) -> Imported:
        """Record what is new."""
        state = state_of(self._target)
        self._has |= set(state["has"])
        records, before = self._records(), 0
        for last in records:
            before += 1
            if before == state["records"]:
                if state["last"] not in (None, fingerprint(last)):
                    # the newest step has got more since; it is recorded again, as another attempt
                    records, before = chain([last], records), before - 1
                break
        if before or state["records"] == 0:
            self._write(self._target, records, before)
        return self._finished()

    def _records(self) -> Iterator[ImportedStep]:
        return merged([self._steps(one, files) for one, files in self._found])

    def _steps(self, one: Format, files: list[Path]) -> Iterator[ImportedStep]:
        try:
            yield from one.steps(files, self._notes)
        except SeveralRuns as error:
            if len(self._found) == 1:
                raise
            self._done.formats.remove(one.name)
            told = str(error).removeprefix("import: ").partition(". ")[0]
            self._notes.add(f"Left out are {told}; give the folder of one of them as a further source")

    def _write(self, path: Path, records: Iterator[ImportedStep], before: int) -> None:
        first = list(islice(records, _TELLING))
        if not first:
            return
        if self._framework == UNKNOWN:
            self._framework = framework_of(name for record in first for name in record.metrics)
        last = first[0]
        rows = recorded(path)[0] if before else 0
        with Recorder(
            path, objective=self._objective, tokens="all", disk_limit=None, fsync="seal", when_full="wait",
            config={"import": self._description()}, rank=0, world_size=1, by_segment=True,
        ) as recorder:  # fmt: skip
            for record in chain(first, records):
                self._record(recorder, record)
                last = record
            rows += self._done.steps
            state = {"records": before + self._done.steps, "rows": rows, "last": fingerprint(last), **self._told()}
            recorder.event(EVENT, json.dumps(state))
        if recorded(path) != (rows, 0):
            raise StoreError(
                f"import: not all of it could be written to {path.parent}. Free disk space, then import again."
            )

    def _record(self, recorder: Recorder, found: ImportedStep) -> None:
        columns, used = columns_of(found.metrics, self._framework)
        if columns.get("loss") == 0.0 and math.isnan(columns.get("grad_norm", 0.0)):
            # transformers logs a NaN or infinite loss as 0.0
            columns["loss"] = math.nan
            kind = "A loss of 0.0 beside a gradient norm of NaN is taken for NaN, which transformers logs as 0.0"
            self._notes.add(kind, f"step {found.step}")
        loss, grad_norm = columns.pop("loss", None), columns.pop("grad_norm", None)
        try:
            recorder.record(
                found.step, found.batch, sequences=found.sequences, metrics=found.metrics, columns=columns,
                gradient_norms=found.gradient_norms or None, ratio_known=found.ratio_known, wall_time=found.wall_time,
                loss=loss, grad_norm=grad_norm,
            )  # fmt: skip
        except BatchError as error:
            raise StoreError(f"import: step {found.step} of {self._sources()}: {error}") from None
        self._unmapped |= dict.fromkeys(n for n in found.metrics if n not in used)
        given = {"loss": loss, "grad_norm": grad_norm}
        self._has |= present(found, {*columns, *(n for n, v in given.items() if v is not None)})
        self._done.steps += 1
        self._done.tokens += int(found.batch.mask.sum()) if found.batch is not None else 0
        self._done.sequences += found.batch.n_sequences if found.batch is not None else count_sequences(found.sequences)
        self._progress(self._done.steps)

    def _description(self) -> dict[str, Any]:
        return {
            "formats": self._done.formats, "framework": self._framework, "objective_assumed": True,
            "sources": [str(file) for _, files in self._found for file in files[:100]],
        }  # fmt: skip

    def _told(self) -> dict[str, Any]:
        possible = [asdict(one) for one in diagnose(self._has, self._framework)]
        return {
            "has": sorted(self._has), "unmapped": list(self._unmapped), "notes": list(self._notes),
            "framework": self._framework, "formats": self._done.formats, "diagnostics": possible,
        }  # fmt: skip

    def _sources(self) -> str:
        return str(self._found[0][1][0])

    def _finished(self) -> Imported:
        self._done.framework = self._framework
        self._done.unmapped, self._done.notes = list(self._unmapped), list(self._notes)
        self._done.diagnostics = diagnose(self._has, self._framework)
        return self._done


def _default_name(path: Path) -> str:
    resolved = path.resolve()
    return resolved.name if resolved.is_dir() else resolved.stem


def _checked(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\x00" in name or name.startswith("."):
        raise StoreError(
            f"import: name is {name!r}, allowed is the name of one folder that begins with no dot. Give it with --name."
        )
    return name
