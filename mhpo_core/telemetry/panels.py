"""The tokens of a batch cut into rectangles with one sign of advantage per row, and those into blocks for the cache.

Shape letters: B sequences, T response tokens, R rows and C tokens of a row of a rectangle or a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mhpo_core.batch import TokenBatch

BLOCK = 1 << 17
"""Tokens of a block: enough that calling numpy costs little, few enough for the caches of a core."""
CHUNK = 1 << 21
"""Tokens of a chunk. Memory and rounding errors grow with it; what a chunk costs at least is spread over its tokens."""
SHORT_ROW = 32
"""Shorter rows are laid end to end by sign: a loop over many short rows costs more than moving their tokens."""
SIDES = 4
"""Signs of the advantage: 0 A > 0, 1 A < 0, 2 A = 0, 3 A is NaN."""
CODES = 1 << 16
"""Numbers a bin of one side can have."""
_FIELDS = ("logp_new", "logp_old", "logp_rollout", "logp_ref", "entropy", "sum_p_squared")

Values = NDArray[Any]  # float32 or float64


class Buffers:
    """Memory that is used again, for every block and every step: a page of new memory costs microseconds."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, type], NDArray[Any]] = {}

    def get(self, name: str, size: int, dtype: type) -> NDArray[Any]:
        """(size,); the same memory whenever name and dtype are the same. Zero at first, then what was left in it."""
        kept = self._kept.get((name, dtype))
        if kept is None or kept.size < size:
            kept = self._kept[name, dtype] = np.zeros(size, dtype)
        return kept[:size]


@dataclass(frozen=True)
class Panel:
    """Tokens whose advantage has one sign along each row.

    Args:
        fields: fields of the batch that are there, by name, (R, C) float32 or float64.
        mask: (R, C) bool.
        side: (R,) 0 … SIDES − 1.
        size: |A|, float64, (R, 1) or (R, C).
    """

    fields: dict[str, Values]
    mask: NDArray[np.bool_]
    side: NDArray[np.int64]
    size: NDArray[np.float64]

    def total(self, values: NDArray[Any]) -> float:
        """Σ over all places, masked ones too, of something that is (R, 1) or (R, C)."""
        return float(values.sum()) * float(self.mask.shape[1] // values.shape[1])

    def blocks(self, buffers: Buffers) -> Iterator[Block]:
        """The panel's tokens, at most BLOCK at a time. A block is spent when the next one is asked for."""
        rows, width = self.mask.shape
        step, height = min(width, BLOCK), max(1, BLOCK // width)
        for row in range(0, rows, height):
            for column in range(0, width, step):
                yield Block(self, slice(row, row + height), slice(column, column + step), buffers)


class Block:
    """Some rows and columns of a panel.

    Attributes:
        mask: (R, C) bool.
        side: (R,).
        side_code: (R, 1) int32, side · CODES.
    """

    def __init__(self, panel: Panel, rows: slice, columns: slice, buffers: Buffers) -> None:
        self._panel, self._place, self._buffers = panel, (rows, columns), buffers
        self.mask, self.side = panel.mask[rows, columns], panel.side[rows]
        self.side_code = (self.side * CODES).astype(np.int32)[:, None]
        self._all_train = bool(self.mask.all())
        # all bits set where a token does not train
        self._drop = self.buffer("drop", np.int32)
        if not self._all_train:
            masked = self.buffer("masked", np.int8)
            np.subtract(self.mask.view(np.int8), np.int8(1), out=masked)
            np.copyto(self._drop, masked)

    def buffer(self, name: str, dtype: type) -> NDArray[Any]:
        """Memory of this name, (R, C)."""
        return self._buffers.get(name, self.mask.size, dtype).reshape(self.mask.shape)

    def zeros(self) -> Values:
        """(R, C) float32, not to be written to. A comparison with it is four times faster than with the number 0."""
        return self.buffer("zeros", np.float32)

    def part(self, values: NDArray[Any]) -> NDArray[Any]:
        """The block's part of something that is (R, 1) or (R, C) over the panel."""
        return values[self._place[0]] if values.shape[1] == 1 else values[self._place]

    def has(self, name: str) -> bool:
        """Whether the batch has a field."""
        return name in self._panel.fields

    def get(self, name: str) -> Values:
        """Values of a field, (R, C), not to be written to."""
        return self._panel.fields[name][self._place]

    def difference(self, left: str, right: str) -> Values:
        """left − right, (R, C), float64 where one of them is."""
        first, second = self.get(left), self.get(right)
        dtype = np.float32 if first.dtype == second.dtype == np.float32 else np.float64
        found: Values = np.subtract(first, second, out=self.buffer("values", dtype))
        return found

    def hide(self, values: Values) -> None:
        """Write NaN where a token does not train."""
        if self._all_train:
            return
        bits = values.view(np.int32 if values.dtype == np.float32 else np.int64)
        np.bitwise_or(bits, self._drop, out=bits)

    def trained(self, values: Values) -> Values:
        """The values with 0 where a token does not train; not to be written to."""
        if self._all_train:
            return values
        bits: type = np.int32 if values.dtype == np.float32 else np.int64
        keep, found = self.buffer("keep", np.int32), self.buffer("trained", bits)
        np.invert(self._drop, out=keep)
        np.bitwise_and(values.view(bits), keep, out=found)
        return found.view(values.dtype)


def chunks(batch: TokenBatch) -> Iterator[tuple[int, list[Panel]]]:
    """The batch by whole sequences, in equal parts of up to about CHUNK tokens; those without a token are left out.

    Yields:
        number of sequences with a token, and panels.
    """
    n_chunks = math.ceil(batch.mask.numel() / CHUNK)
    height = math.ceil(batch.n_sequences / n_chunks)
    present = {f.name: value.detach() for f in fields(batch) if (value := getattr(batch, f.name)) is not None}
    for row in range(0, batch.n_sequences, height):
        part = {name: value[row : row + height] for name, value in present.items()}
        trains = part["mask"].numpy().any(axis=1)
        if trains.any():
            yield int(np.count_nonzero(trains)), panels(part, trains)


def panels(part: dict[str, Tensor], trains: NDArray[np.bool_]) -> list[Panel]:
    """The trained tokens of some sequences, once each.

    Args:
        part: fields of a TokenBatch, by name.
        trains: (B,) whether a sequence has a token.
    """
    present = {name: _numpy(part[name]) for name in _FIELDS if name in part}
    advantage, mask = part["advantage"], part["mask"].numpy()
    rows = _row_advantage(advantage, part["mask"])
    if rows is None:
        return _by_side(present, advantage.double().numpy(), mask)
    # the advantage of a sequence without a token is garbage
    exact = np.where(trains, rows.double().numpy(), 0.0)
    return [Panel(present, mask, _side(exact), np.abs(exact)[:, None])]


def _by_side(present: dict[str, Values], advantage: NDArray[np.float64], mask: NDArray[np.bool_]) -> list[Panel]:
    """One row per sign, for advantages that differ along a sequence."""
    side, found = _side(advantage), []
    for number in range(SIDES):
        place = np.flatnonzero(mask & (side == number))
        if len(place):
            moved = {name: values.take(place)[None] for name, values in present.items()}
            size = np.abs(advantage.take(place))[None]
            found.append(Panel(moved, np.ones((1, len(place)), dtype=bool), np.array([number]), size))
    return found


def _row_advantage(advantage: Tensor, mask: Tensor) -> Tensor | None:
    """(B,) the advantage of each row, None where it is not the same all along or the rows are short."""
    if advantage.shape[1] < SHORT_ROW:
        return None
    if advantage.stride(1) == 0:
        return advantage[:, 0]
    first = advantage.gather(1, mask.byte().argmax(dim=1, keepdim=True))
    return first[:, 0] if bool(((advantage == first) | ~mask).all()) else None


def _side(advantage: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.select([advantage > 0, advantage < 0, advantage == 0], [0, 1, 2], 3).astype(np.int64)


def _numpy(tensor: Tensor) -> Values:
    values: Values = (tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()).numpy()
    return values
