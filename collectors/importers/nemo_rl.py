"""NeMo-RL's dumps of training data: train_data_step{N}.jsonl, one line per sequence.

Every value is the one entry of a list. The log-probabilities are those of the policy before the update, and of the
engine; those of the policy being trained are not dumped. A group is not told: sequences with the same tokens before
the first trained one are one group, so a prompt that a step holds twice becomes one group.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from collectors.importers.dumps import (
    TokenRow,
    batch_of,
    floats,
    groups,
    known,
    number_in,
    numbered,
    rows_by_file,
    token_row,
)
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import head, number
from mhpo_core.batch import Sequences

_NAME = r"train_data_step([0-9]{1,18})\.jsonl"
_LAUNCH = r"exp_([0-9]{1,9})"
_ARRAYS = {
    "mask": "token_loss_mask", "logp_new": "prev_logprobs", "logp_old": "prev_logprobs", "advantage": "advantages",
    "logp_rollout": "generation_logprobs", "token_id": "token_ids",
}  # fmt: skip
_EXTRA = ("idx", "input_lengths", "filtered_rewards", "sample_loss_mask")


class NemoRl:
    """One file per step; each launch has a folder of its own."""

    name = "nemo-rl"
    title = "NeMo-RL training data (train_data_step{N}.jsonl)"
    framework = "nemo-rl"

    def find(self, path: Path) -> list[Path]:
        """The files by step; of a folder of launches, by launch and step."""
        if path.is_file():
            return [path] if _is_dump(path) else []
        folders = [path, *numbered(path, _LAUNCH)]
        found = [file for folder in folders for file in numbered(folder, _NAME) if file.is_file()]
        return found if any(_is_dump(file) for file in found) else []

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """One step per file, its number from the name."""
        for file, rows in rows_by_file(files, notes):
            step = number_in(file.name, _NAME)
            if step is not None and rows:
                yield _imported(step, [{n: _inner(v) for n, v in row.items()} for row in rows], notes)


def _imported(step: int, rows: list[dict[str, Any]], notes: Notes) -> ImportedStep:
    where = f"step {step}"
    batch = batch_of([_tokens(row, notes, where) for row in rows], notes, where)
    sequences = Sequences(
        reward=known([number(row.get("rewards")) for row in rows]),
        group_id=groups([_prompt(row, index) for index, row in enumerate(rows)]),
        completion=known([_text(row.get("content")) for row in rows]),
        extra=[{name: row[name] for name in _EXTRA if row.get(name) is not None} or None for row in rows],
    )
    if sequences.completion is not None:
        notes.add("NeMo-RL writes prompt and response as one text, it is shown as the completion")
    return ImportedStep(step, batch=batch, ratio_known=False, sequences=sequences)


def _tokens(row: dict[str, Any], notes: Notes, where: str) -> TokenRow | None:
    found = token_row({name: row.get(own) for name, own in _ARRAYS.items()}, notes, where)
    if found is None:
        return None
    if number(row.get("sample_loss_mask")) == 0.0:
        found["mask"] = np.zeros_like(found["mask"])
    found["mask"][:1] = False  # nothing predicts the first token
    return found


def _prompt(row: dict[str, Any], index: int) -> Hashable:
    ids, mask = floats(row.get("token_ids")), floats(row.get("token_loss_mask"))
    if ids is None or mask is None or not mask[0].any():
        return index
    return ids[0][: int(np.flatnonzero(mask[0])[0])].tobytes()


def _text(content: object) -> str | None:
    if isinstance(content, list):  # one text per message
        return "".join(str(part) for part in content)
    return None if content is None else str(content)


def _inner(value: object) -> object:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_dump(path: Path) -> bool:
    # a line can be longer than what is read to recognise it
    return number_in(path.name, _NAME) is not None and path.is_file() and head(path).lstrip().startswith("{")


FORMAT = NemoRl()
