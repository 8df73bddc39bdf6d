"""Picking the trained tokens out of tensors that are mostly padding.

Shape letters: B sequences, T response tokens, N trained tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A slice takes a third of a microsecond, looking at a place of the mask a third of a nanosecond.
_PLACES_PER_RUN = 1000


class Trained:
    """Where the trained tokens of a mask lie; nothing of the mask is kept.

    A response is one run of trained places between paddings, or a few of them, so that copying slices is enough; with a
    mask of many short runs, or on a device, tokens are gathered one by one.

    Args:
        mask: (B, T) bool.

    Attributes:
        length: (B,), trained tokens of each sequence.
    """

    def __init__(self, mask: Tensor) -> None:
        n_rows, self._width = mask.shape
        on_cpu = mask.device.type == "cpu"
        self._runs = _runs(mask.numpy()) if on_cpu else None
        self._place: Tensor | None = None
        self.length: NDArray[np.intp]
        if self._runs is None:
            self._place = mask.reshape(-1).nonzero().squeeze(1)
            self.length = np.count_nonzero(mask.cpu().numpy(), axis=1)
        else:
            first, last = self._runs
            self.length = np.bincount(first // self._width, last - first, n_rows).astype(np.intp)
        self.n_tokens = int(self.length.sum())

    def of(self, values: Tensor) -> Tensor:
        """(B, T) → (N,) on the CPU. Shares memory with values there of which all train."""
        if self.n_tokens == values.numel():
            return values.reshape(-1).cpu()
        if self._runs is None:
            return self._gathered(values).cpu()
        # numpy has no bfloat16, but the bits can be copied as any number
        kind = torch.int16 if values.dtype == torch.bfloat16 else values.dtype
        return torch.from_numpy(self._copied(values.view(kind).numpy(), *self._runs)).view(values.dtype)

    def _gathered(self, values: Tensor) -> Tensor:
        assert self._place is not None
        if values.stride(1) == 0:  # one value per sequence, which need not be spread out first
            return values[:, 0][self._place // self._width]
        return values.reshape(-1)[self._place]

    def _copied(self, values: NDArray[Any], first: NDArray[np.intp], last: NDArray[np.intp]) -> NDArray[Any]:
        if values.strides[1] == 0:  # one value per sequence
            return np.repeat(values[:, 0], self.length)
        flat = values.reshape(-1)
        return np.concatenate([flat[begin:end] for begin, end in zip(first.tolist(), last.tolist(), strict=True)])

    def row(self) -> NDArray[np.intp]:
        """(N,), the sequence of each token, in [0, B)."""
        return np.repeat(np.arange(len(self.length)), self.length)

    def position(self) -> NDArray[np.intp]:
        """(N,), the place of each token among those of its sequence, masked ones too."""
        if self._place is not None:
            return self._place.cpu().numpy() - self.row() * self._width
        assert self._runs is not None
        first, last = self._runs
        size = last - first
        # the places count up by one along a run
        found = np.repeat(first % self._width - (np.cumsum(size) - size), size)
        found += np.arange(len(found))
        return found

    @property
    def nbytes(self) -> int:
        """Memory of what is kept of the mask."""
        kept = self._runs if self._place is None else (self._place.cpu().numpy(),)
        return sum(int(values.nbytes) for values in (*(kept or ()), self.length))


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """First places of the runs of trained places of each row, and those after their last; None if there are many."""
    width, flat = mask.shape[1], mask.reshape(-1)
    changes = flat[1:] != flat[:-1]
    if np.count_nonzero(changes) * _PLACES_PER_RUN > 2 * flat.size + 2 * _PLACES_PER_RUN:
        return None
    # a run that goes on in the next row is two
    joined = (np.flatnonzero(mask[:-1, -1] & mask[1:, 0]) + 1) * width
    ends = np.flatnonzero([flat[0], flat[-1]]) * flat.size
    edges = np.concatenate([np.flatnonzero(changes) + 1, joined, joined, ends])
    edges.sort()
    return edges[::2], edges[1::2]
