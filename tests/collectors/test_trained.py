"""Trained tokens are those of the mask in their order, whichever way they are picked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collectors import trained
from collectors.packing import pack
from collectors.trained import Trained
from mhpo_core import TokenBatch

ONE_BY_ONE, BY_RUNS = 1 << 40, 0
"""For _PLACES_PER_RUN."""


def _mask(kind, rng):
    n_rows, width = rng.integers(1, 9), rng.integers(1, 40)
    first, last = np.sort(rng.integers(0, width + 1, (2, n_rows, 1)), axis=0)
    place = np.arange(width)
    mask = {
        "right padding": place < last, "left padding": place >= first, "one run": (place >= first) & (place < last),
        "holes": rng.random((n_rows, width)) < 0.6, "all": np.ones((n_rows, width), bool),
        "turns": (place // 5 % 2 == 0) & (place < last),
        "whole rows": np.repeat(rng.random((n_rows, 1)) < 0.5, width, 1),
    }[kind]  # fmt: skip
    mask[rng.integers(n_rows), rng.integers(width)] = True
    return torch.from_numpy(mask)


def _tensors(mask, rng):
    n_rows, width = mask.shape
    drawn = torch.from_numpy(rng.normal(size=(n_rows, width)))
    yield from (drawn, drawn.float(), drawn.bfloat16(), drawn.half(), (drawn * 100).long(), (drawn * 100).int())
    yield drawn[:, :1].expand(n_rows, width)
    yield drawn.bfloat16()[:, :1].expand(n_rows, width)
    yield torch.from_numpy(rng.normal(size=(width, n_rows))).T
    yield torch.from_numpy(rng.normal(size=(n_rows, 2 * width)))[:, ::2]
    yield torch.full((n_rows, width), float("nan"))


@pytest.mark.parametrize("way", [ONE_BY_ONE, BY_RUNS], ids=["one by one", "by runs"])
@pytest.mark.parametrize(
    "kind", ["right padding", "left padding", "one run", "holes", "all", "turns", "whole rows"]
)  # fmt: skip
def test_every_way_picks_what_the_mask_says(kind, way, monkeypatch):
    monkeypatch.setattr(trained, "_PLACES_PER_RUN", way)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask = _mask(kind, rng)
        row, position = mask.numpy().nonzero()
        given, found = mask.clone(), Trained(mask)
        mask.logical_not_()  # the trainer may do so
        assert found.n_tokens == len(row) and found.nbytes > 0
        assert found.length.tolist() == given.sum(1).tolist()
        assert found.row().tolist() == row.tolist() and found.position().tolist() == position.tolist()
        for values in _tensors(given, rng):
            picked, expected = found.of(values), values[given]
            assert picked.dtype == expected.dtype and torch.equal(picked.nan_to_num(7), expected.nan_to_num(7))


def test_long_runs_are_copied_and_short_ones_gathered():
    run = torch.zeros(3, 5000, dtype=torch.bool)
    run[:, 1000:3000] = True
    assert Trained(run)._place is None
    run[1, 1000:3000:2] = False
    assert Trained(run)._place is not None


def test_a_packed_batch_shares_nothing_but_what_has_no_padding():
    mask = torch.zeros(4, 3000, dtype=torch.bool)
    mask[:, 10:2000] = True
    for every in (mask, torch.ones_like(mask)):
        values = torch.full((4, 3000), -1.0)
        packed = pack(TokenBatch(values, values, torch.ones(4), every))
        values.zero_()
        kept = packed.batch.logp_new
        assert kept.shape == (1, int(every.sum())) and packed.batch.mask.all()
        assert (kept == (0 if every.all() else -1)).all()
