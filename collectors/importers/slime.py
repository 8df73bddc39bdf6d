"""slime's dumps of training data: train_data/{rollout_id}.pt, one file per rollout.

The files are archives of pickles. They are read by torch's reader of tensors, numbers and text; one that names
anything else is refused before it does anything. Sizes are checked before and after: a small file can claim much.

The step is the rollout. log_probs and entropy are those of the policy before the update.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collectors.importers.dumps import (
    Refused,
    TokenRow,
    batch_of,
    each,
    groups,
    known,
    number_in,
    numbered,
    token_row,
)
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import number, step_number
from mhpo_core.batch import Sequences
from mhpo_core.errors import StoreError

LARGEST = 16 << 30
"""Bytes that an archive may say it holds; a training's rollout of 2,048 × 32,768 tokens takes 5 GB."""

_NAME = r"([0-9]{1,18})(?:_[0-9]{1,9})?\.pt"
_FOLDER = "train_data"
_TELLING = (b"format_version", b"rollout_id", b"samples", b"data_parallel_rank")
_SHARED = 16
"""So often may slime put one tensor into a file: fields that are equal are one tensor there."""
_ARRAYS = {
    "mask": "loss_masks", "logp_new": "log_probs", "logp_old": "log_probs", "advantage": "advantages",
    "logp_rollout": "rollout_log_probs", "logp_ref": "ref_log_probs", "entropy": "entropy",
}  # fmt: skip
_OWN = ("truncated", "response_lengths", "total_lengths")
_NO_DUMP = "Give the .pt files that slime's --dump-details wrote into train_data."


class Slime:
    """One file per rollout."""

    name = "slime"
    title = "slime training data (train_data/{rollout_id}.pt)"
    framework = "slime"

    def find(self, path: Path) -> list[Path]:
        """The files by rollout."""
        if path.is_file():
            return [path] if _is_dump(path) else []
        folders = [[file for file in numbered(one, _NAME) if file.is_file()] for one in (path / _FOLDER, path)]
        return next((files for files in folders if any(_is_dump(file) for file in files)), [])

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """One step per file; its number is the rollout's."""
        for file, payload in each(files, _load, notes):
            own, told = step_number(payload.get("rollout_id")), number_in(file.name, _NAME)
            step = own if own is not None else told
            if step is None:
                raise StoreError(f"import: {file} tells no rollout_id. {_NO_DUMP}")
            samples = [one for one in payload["samples"] if isinstance(one, dict)]
            if len(samples) < len(payload["samples"]):
                notes.add("A sample is no dictionary and is left out", file.name)
            yield _imported(step, samples, payload.get("raw_reward"), notes)


def _load(path: Path) -> dict[str, Any]:
    """The payload of a file.

    Raises:
        Refused: the file holds more than it may, or names code.
        StoreError: it cannot be read, or is no dump.
    """
    size = _checked_size(path)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Refused(
            f"import: {path} holds something other than tensors, numbers and text, or is damaged; it is refused and "
            f"nothing in it was run. {_NO_DUMP}"
        ) from None
    except Exception as error:  # whatever damaged bytes make of the reader
        raise StoreError(f"import: {path} cannot be read ({type(error).__name__}). {_NO_DUMP}") from None
    if not isinstance(payload, dict) or not isinstance(payload.get("samples"), list):
        raise StoreError(f"import: {path} holds no samples. {_NO_DUMP}")
    claimed = sum(
        value.numel() * value.element_size()
        for sample in payload["samples"] if isinstance(sample, dict)
        for value in sample.values() if isinstance(value, torch.Tensor)
    )  # fmt: skip
    if claimed > _SHARED * size:
        raise Refused(f"import: {path} has {size:,} bytes and tensors that claim {claimed:,}. {_NO_DUMP}")
    return payload


def _checked_size(path: Path) -> int:
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise StoreError(f"import: {path} is no archive of torch ({type(error).__name__}). {_NO_DUMP}") from None
    held = sum(entry.file_size for entry in entries)
    if held > LARGEST or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or held > size:
        raise Refused(
            f"import: {path} has {size:,} bytes and says that it holds {held:,}, allowed are files that are not "
            f"compressed, to {LARGEST:,} bytes. {_NO_DUMP}"
        )
    return size


def _imported(step: int, samples: list[dict[str, Any]], raw_reward: object, notes: Notes) -> ImportedStep:
    where = f"step {step}"
    rows = [{name: _array(value) for name, value in sample.items() if isinstance(name, str)} for sample in samples]
    truncated = [None if (one := number(row.get("truncated"))) is None else bool(one) for row in rows]
    if None in truncated and known(truncated) is not None:
        notes.add("Only some samples tell whether they were truncated, none is said to be", where)
    sequences = Sequences(
        reward=known([_reward(row, raw_reward) for row in rows]),
        group_id=groups([_prompt(row, index) for index, row in enumerate(rows)]),
        truncated=None if None in truncated else known(truncated),
        extra=[_extra(row) for row in rows],
    )
    batch = batch_of([_tokens(row, notes, where) for row in rows], notes, where)
    return ImportedStep(step, batch=batch, ratio_known=False, sequences=sequences)


def _tokens(row: dict[str, Any], notes: Notes, where: str) -> TokenRow | None:
    ids, mask = row.get("tokens"), row.get("loss_masks")
    given: dict[str, object] = {name: row.get(own) for name, own in _ARRAYS.items()}
    if isinstance(ids, np.ndarray | list) and isinstance(mask, np.ndarray | list) and 0 < len(mask) <= len(ids):
        given["token_id"] = ids[-len(mask) :]
    return token_row(given, notes, where)


def _prompt(row: dict[str, Any], index: int) -> Hashable:
    ids, length = row.get("tokens"), step_number(row.get("response_lengths"))
    if not isinstance(ids, np.ndarray) or not length or length > len(ids):
        return index
    return ids[:-length].tobytes()


def _reward(row: dict[str, Any], raw_reward: object) -> float | None:
    """What the verifier gave; `rewards` of a sample is what slime made of it for the advantage."""
    position = step_number(row.get("rollout_position"))
    given = raw_reward.tolist() if isinstance(raw_reward, torch.Tensor) else raw_reward
    if isinstance(given, list) and position is not None and position < len(given):
        return number(given[position])
    return None


def _extra(row: dict[str, Any]) -> dict[str, Any] | None:
    found = {n: v for n, v in row.items() if isinstance(v, bool | int | float | str) and n not in _OWN}
    return found or None


def _array(value: object) -> object:
    """A tensor as what numpy and JSON know; bfloat16 as float32."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0:
        return value.item()
    dense = value.detach()
    if dense.layout != torch.strided or dense.is_complex() or dense.is_quantized or dense.device.type != "cpu":
        return None
    array: NDArray[Any] = (dense.float() if dense.dtype == torch.bfloat16 else dense).resolve_neg().numpy()
    return array


def _is_dump(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            if name is None:
                return False
            with archive.open(name) as file:
                beginning = file.read(1 << 16)
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, NotImplementedError, EOFError):
        return False
    return all(word in beginning for word in _TELLING)


FORMAT = Slime()
