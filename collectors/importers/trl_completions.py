"""TRL's completions: completions/completions_{step}.parquet, written at each log.

Until the next generation TRL writes the same one again; it is taken once, at its first step. The columns of the reward
functions come first, and after them those that `log_extra` added; nothing tells them apart, nor the weights that TRL
adds the rewards with (by default 1). The advantages do: a sum of the first columns is taken for the reward if it gives
the advantages that the file has. All columns are kept in `extra`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from collectors.importers.dumps import each, known, number_in, numbered
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import number, step_number
from mhpo_core.batch import Sequences
from mhpo_core.errors import StoreError

_NAME = r"completions_([0-9]{1,18})\.parquet"
_FOLDER = "completions"
_OWN = ("step", "prompt", "completion", "advantage")
_TINY = 1e-4
"""What TRL adds to a standard deviation, from trl/trainer/grpo_trainer.py."""

Floats = NDArray[np.float64]


class TrlCompletions:
    """One file per log."""

    name = "trl-completions"
    title = "TRL completions (completions/completions_{step}.parquet)"
    framework = "trl"

    def find(self, path: Path) -> list[Path]:
        """The files by step, in the folder or in its `completions`."""
        if path.is_file():
            return [path] if _is_completions(path) else []
        folders = [[file for file in numbered(one, _NAME) if file.is_file()] for one in (path, path / _FOLDER)]
        return next((files for files in folders if any(_is_completions(file) for file in files)), [])

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """One step per generation."""
        before: list[dict[str, Any]] = []
        reward: list[str] = []
        for file, (rows, columns) in each(files, _read, notes):
            for step, generation in _by_step(rows, number_in(file.name, _NAME)):
                if step is None:
                    notes.add("A file without a step is left out", file.name)
                elif _same(generation, before):
                    notes.add("A generation that is written again is left out", file.name)
                else:
                    before = generation
                    reward = _reward_columns(generation, columns, reward)
                    if not reward:
                        notes.add("No sum of the first columns gives the advantages, no reward is taken", file.name)
                    yield ImportedStep(step, sequences=_sequences(generation, reward))


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and the columns of floats that follow the completion without a gap.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        table = pq.read_table(path)
        names = table.schema.names
        after = names.index("completion") + 1
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"import: {path} is no table of completions that can be read ({type(error).__name__}). Is it whole?"
        ) from None
    first: list[str] = []
    for name in names[after:]:
        kind = table.schema.field(name).type
        if name in _OWN or not (pa.types.is_floating(kind) or pa.types.is_null(kind)):
            break
        first.append(name)
    return table.to_pylist(), first


def _by_step(rows: list[dict[str, Any]], of_file: int | None) -> Iterator[tuple[int | None, list[dict[str, Any]]]]:
    for told, of_step in groupby(rows, key=lambda row: step_number(row.get("step"))):
        yield of_file if told is None else told, [{n: v for n, v in row.items() if n != "step"} for row in of_step]


def _sequences(rows: list[dict[str, Any]], reward: list[str]) -> Sequences:
    total = _total(rows, reward).tolist() if reward else []
    return Sequences(
        reward=known([None if math.isnan(one) else one for one in total]),
        group_id=_runs([row.get("prompt") for row in rows]),
        prompt=[_text(row.get("prompt")) for row in rows],
        completion=[_text(row.get("completion")) for row in rows],
        advantage=known([number(row.get("advantage")) for row in rows]),
        extra=[{name: value for name, value in row.items() if name not in _OWN} or None for row in rows],
    )


def _reward_columns(rows: list[dict[str, Any]], columns: list[str], before: list[str]) -> list[str]:
    """The first columns whose sum is the reward; those of the generation before where this one cannot tell.

    One column alone is that of a reward function: TRL needs one.
    """
    if len(columns) <= 1:
        return columns
    fit = [columns[:n] for n in range(1, len(columns) + 1) if _gives_advantages(rows, columns[:n])]
    sums = [_total(rows, names) for names in fit]
    if fit and all(np.array_equal(one, sums[0], equal_nan=True) for one in sums):
        return before if before in fit else fit[0]
    return before if before and (before in fit or not fit and _flat(rows)) else []


def _gives_advantages(rows: list[dict[str, Any]], columns: list[str]) -> bool:
    """True if TRL makes the advantages of this reward, in any of its ways to scale them; groups are of one size."""
    advantage = _column(rows, "advantage")
    size = math.gcd(*(len(list(run)) for _, run in groupby(rows, key=lambda row: row.get("prompt"))))
    if size < 2 or np.isnan(advantage).any() or _flat(rows):
        return False
    reward = _total(rows, columns)
    if not np.isfinite(reward).all():
        return False
    of_group = reward.reshape(-1, size)
    centred = of_group - of_group.mean(1, keepdims=True)
    scales = (of_group.std(1, ddof=1, keepdims=True) + _TINY, reward.std(ddof=1) + _TINY, 1.0)
    return any(np.allclose((centred / scale).ravel(), advantage, rtol=1e-3, atol=1e-3) for scale in scales)


def _flat(rows: list[dict[str, Any]]) -> bool:
    """True if no advantage tells anything."""
    return not (np.abs(_column(rows, "advantage")) > 0).any()


def _total(rows: list[dict[str, Any]], columns: list[str]) -> Floats:
    """TRL's sum: null and NaN count as 0, unless a completion has nothing else."""
    values = np.stack([_column(rows, name) for name in columns])
    return np.where(np.isnan(values).all(0), np.nan, np.nansum(values, axis=0))


def _column(rows: list[dict[str, Any]], name: str) -> Floats:
    read = [number(row.get(name)) for row in rows]
    return np.asarray([math.nan if one is None else one for one in read], dtype=np.float64)


def _runs(prompts: list[Any]) -> list[int] | None:
    """Equal prompts that follow each other are a group; None if there is no group of several."""
    found = [index for index, (_, run) in enumerate(groupby(prompts)) for _ in run]
    return found if found and found[-1] + 1 < len(found) else None


def _same(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> bool:
    return repr(rows) == repr(before)  # NaN is equal to NaN here


def _text(value: object) -> str:
    """Text as it is, a chat of one message as its content, another one as JSON."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content", value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_completions(path: Path) -> bool:
    try:
        names = pq.read_schema(path).names
    except (OSError, ValueError, pa.ArrowException):
        return False
    return {"step", "prompt", "completion"} <= set(names) and "sequence_id" not in names


FORMAT = TrlCompletions()
