"""RLLoggingBoard's records: JSON lines with prompt, response, reward, step, and often arrays of tokens.

Its log-probabilities are those of the policy before the update. A TokenBatch needs an advantage, which the format does
not ask for: NaN would count each token as not finite, and 0 would say that none was to be made likelier. The tokens of
a record without `advantages` are therefore kept in `extra`, as they are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from collectors.importers.dumps import TokenRow, batch_of, groups, has_keys, known, numbered, token_row
from collectors.importers.names import UNKNOWN
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import number, objects, step_number
from mhpo_core.batch import Sequences

_RANK = r"rollout_data_rank([0-9]{1,9})\.jsonl"
_ARRAYS = {
    "mask": "logprobs", "logp_new": "logprobs", "logp_old": "logprobs", "advantage": "advantages",
    "logp_ref": "ref_logprobs",
}  # fmt: skip
_OWN = ("prompt", "response", "reward", "step")
Group = tuple[int, list[dict[str, Any]]]


class RlLoggingBoard:
    """One file, or one per rank."""

    name = "rlloggingboard"
    title = "RLLoggingBoard records (JSON lines with prompt, response, reward, step)"
    framework = UNKNOWN

    def find(self, path: Path) -> list[Path]:
        """The files of all ranks, else the only file of records in a folder."""
        if path.is_file():
            return [path] if _is_record(path) else []
        if ranks := [file for file in numbered(path, _RANK) if _is_record(file)]:
            return ranks
        found = [file for file in sorted(path.glob("*.jsonl")) if file.is_file() and _is_record(file)]
        return found if len(found) == 1 else []

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """Lines of one step after the other, those of all ranks together."""
        streams = [_of_file(file, notes) for file in files]
        heads = [(stream, first) for stream in streams if (first := next(stream, None)) is not None]
        while heads:
            step = min(found[0] for _, found in heads)
            rows: list[dict[str, Any]] = []
            left: list[tuple[Iterator[Group], Group]] = []
            for stream, found in heads:
                following: Group | None = found
                if found[0] == step:
                    rows += found[1]
                    following = next(stream, None)
                if following is not None:
                    left.append((stream, following))
            heads = left
            yield _imported(step, rows, notes)


def _of_file(file: Path, notes: Notes) -> Iterator[Group]:
    for step, of_step in groupby(_with_step(file, notes), key=lambda one: one[0]):
        yield step, [row for _, row in of_step]


def _with_step(file: Path, notes: Notes) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in objects(file, notes):
        step = step_number(row.get("step"))
        if step is None:
            notes.add("A line without a step is left out", f"line {line} of {file.name}")
        else:
            yield step, row


def _imported(step: int, rows: list[dict[str, Any]], notes: Notes) -> ImportedStep:
    tokens = [_tokens(row, notes, f"step {step}") for row in rows]
    batch = batch_of(tokens, notes, f"step {step}")
    lengths = [len(row["logprobs"]) if isinstance(row.get("logprobs"), list) else None for row in rows]
    sequences = Sequences(
        reward=known([number(row.get("reward")) for row in rows]),
        group_id=groups([str(row.get("prompt")) for row in rows]),
        prompt=known([_text(row.get("prompt")) for row in rows]),
        completion=known([_text(row.get("response")) for row in rows]),
        length=known(lengths) if batch is None else None,
        extra=[{name: value for name, value in row.items() if name not in _OWN} or None for row in rows],
    )
    return ImportedStep(step, batch=batch, ratio_known=False, sequences=sequences)


def _tokens(row: dict[str, Any], notes: Notes, where: str) -> TokenRow | None:
    if not isinstance(row.get("logprobs"), list):
        return None
    if row.get("advantages") is None:
        notes.add("Tokens without advantages are kept as they are written, beside the text", where)
        return None
    given: dict[str, object] = {name: row.get(own) for name, own in _ARRAYS.items()}
    return token_row(given | {"mask": [1] * len(row["logprobs"])}, notes, where)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _is_record(path: Path) -> bool:
    return has_keys(path, *_OWN)


FORMAT = RlLoggingBoard()
