"""prime-rl's token export: token_exports/step_N/rank_R.jsonl, one line per sequence.

prime-rl takes its ratio against the engine that sampled: logp_old is the engine's, and there is no other logp_rollout.
Its exporter writes every number that is not finite as null.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from collectors.importers.arrays import INTEGER, NOTHING, NUMBERS, TEXT, TRUTHS, Numbers
from collectors.importers.dumps import (
    batch_of,
    floats,
    has_keys,
    known,
    nulls,
    number_in,
    numbered,
    rows_by_file,
    token_row,
)
from collectors.importers.steps import ImportedStep, Notes, NotYet
from collectors.importers.text import step_number
from mhpo_core.batch import Sequences

_FOLDER = "token_exports"
_STEP = r"step_([0-9]{1,18})"
_RANK = r"rank_([0-9]{1,9})\.jsonl"
_COMPLETE = "STABLE"
_ARRAYS = {
    "mask": "loss_mask", "logp_new": "trainer_logprobs", "logp_old": "inference_logprobs", "advantage": "advantages",
    "entropy": "entropy", "token_id": "token_ids",
}  # fmt: skip
_ALWAYS_WRITTEN = ("logp_new", "logp_old", "entropy", "advantage")
_EXTRA = ("env_name", "run_id", "rank", "micro_step", "micro_sequence_idx", "export_sequence_idx")
_FIELDS = {
    **dict.fromkeys([*_ARRAYS.values(), "rl_weights", "rewards"], NUMBERS), "loss_mask": TRUTHS, "losses": NOTHING,
    **dict.fromkeys(["step", "export_step", *_EXTRA], INTEGER), "env_name": TEXT, "run_id": TEXT,
}  # fmt: skip


class PrimeRl:
    """Steps that prime-rl has marked as complete, or one file."""

    name = "prime-rl"
    title = "prime-rl token export (token_exports/step_N/rank_R.jsonl)"
    framework = "prime-rl"

    def find(self, path: Path) -> list[Path]:
        """A file of it, or the files of all complete steps."""
        if path.is_file():
            return [path] if _is_export(path) else []
        waiting: list[Path] = []
        for folder in (path, path / _FOLDER):
            found = [file for step in numbered(folder, _STEP) for file in _ranks(step)]
            if any(_is_export(file) for file in found):
                return found
            waiting += [step for step in numbered(folder, _STEP) if _is_waiting(step)]
        if number_in(path.name, _STEP) is not None:
            own = _ranks(path)
            if any(_is_export(file) for file in own):
                return own
            waiting += [path] if _is_waiting(path) else []
        if waiting:
            named = ", ".join(step.name for step in waiting[:10])
            raise NotYet(
                f"import: {path} holds token exports of prime-rl of which no step is complete: {_COMPLETE} is missing "
                f"in {named}. Wait until prime-rl has written it, or give one of the files."
            )
        return []

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """The sequences of all ranks of a step as one batch."""
        for folder in dict.fromkeys(file.parent.parent for file in files if (file.parent / _COMPLETE).exists()):
            for step in numbered(folder, _STEP):
                if not (step / _COMPLETE).exists():
                    notes.add("A step without its STABLE marker is not complete and is left out", step.name)
        for step, of_step in groupby(_with_step(files, notes), key=lambda one: one[0]):
            yield _imported(step, [row for _, row in of_step], notes)


def _with_step(files: list[Path], notes: Notes) -> Iterator[tuple[int, dict[str, Any]]]:
    for file, rows in rows_by_file(files, notes, _FIELDS):
        for row in rows:
            step = _step(row, file)
            if step is None:
                notes.add("A line without a step is left out", file.name)
            else:
                yield step, row


def _imported(step: int, rows: list[dict[str, Any]], notes: Notes) -> ImportedStep:
    where = f"step {step}"
    batch = batch_of(
        [token_row(_arrays(row, notes, where), notes, where, _ALWAYS_WRITTEN) for row in rows], notes, where
    )
    sequences = Sequences(
        reward=known([_reward(row, notes, where) for row in rows]),
        extra=[{name: row[name] for name in _EXTRA if row.get(name) is not None} or None for row in rows],
    )
    return ImportedStep(step, batch=batch, sequences=sequences)


def _arrays(row: dict[str, Any], notes: Notes, where: str) -> dict[str, object]:
    given: dict[str, object] = {name: row.get(own) for name, own in _ARRAYS.items()}
    without = nulls(row.get("advantages"))
    if len(without) and without.all():
        given["advantage"] = None  # no loss of this sequence has an advantage
    if not nulls(row.get("rl_weights")).all():
        notes.add("rl_weights are not multiplied into the advantages", where)
    losses, mask = row.get("losses"), floats(row.get("loss_mask"))
    if isinstance(losses, Numbers):
        losses = [None] * len(losses.values)
    if isinstance(losses, list) and mask is not None and len(losses) == len(mask[0]):
        # the mask is that of all losses together; a token that only another loss trains has no advantage
        given["mask"] = mask[0] * np.asarray([_trains(one) for one in losses], dtype=float)
    return given


def _trains(losses: object) -> bool:
    own = losses.get("rl") if isinstance(losses, dict) else None
    return isinstance(own, dict) and bool(own.get("mask"))


def _reward(row: dict[str, Any], notes: Notes, where: str) -> float | None:
    """Newer exports repeat the sequence's reward at each of its tokens."""
    read = floats(row.get("rewards"))
    if read is None or read[1].all():
        return None
    given = np.unique(read[0][~read[1]])
    if len(given) > 1:
        notes.add("A sequence has several rewards, none is taken", where)
        return None
    return float(given[0])


def _step(row: dict[str, Any], file: Path) -> int | None:
    told = number_in(file.parent.name, _STEP)
    own = step_number(row.get("export_step"))
    return told if told is not None else own if own is not None else step_number(row.get("step"))


def _ranks(folder: Path) -> list[Path]:
    if not (folder / _COMPLETE).exists():
        return []
    return [file for file in numbered(folder, _RANK) if file.is_file()]


def _is_waiting(step: Path) -> bool:
    return not (step / _COMPLETE).exists() and any(_is_export(file) for file in numbered(step, _RANK))


def _is_export(path: Path) -> bool:
    return has_keys(path, "schema_version", "micro_sequence_idx", "export_sequence_idx", "token_ids")


FORMAT = PrimeRl()
