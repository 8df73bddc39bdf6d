"""Repetition of completions, against counting by hand."""

from __future__ import annotations

import pytest
import torch

from collectors.packing import pack
from collectors.repetition import repetition
from mhpo_core import TokenBatch


def batch(ids: list[list[int]], mask: list[list[int]] | None = None) -> TokenBatch:
    token_id = torch.tensor(ids)
    logp = torch.full(token_id.shape, -1.0)
    trained = torch.ones_like(token_id) if mask is None else torch.tensor(mask)
    return TokenBatch(
        logp_new=logp, logp_old=logp, advantage=torch.ones(len(ids)), mask=trained.bool(), token_id=token_id
    )


def test_a_loop_repeats_and_a_text_does_not() -> None:
    assert repetition(pack(batch([list(range(10))]))) == 0
    # 1 2 1 2 1 2 1 2: five runs of four, of which 1212 and 2121 are new
    assert repetition(pack(batch([[1, 2] * 4]))) == pytest.approx(3 / 5)
    assert repetition(pack(batch([[7] * 10, list(range(10))]))) == pytest.approx(6 / 14)


def test_what_another_completion_has_said_is_no_repetition() -> None:
    assert repetition(pack(batch([list(range(10))] * 3))) == 0


def test_tokens_that_are_not_beside_each_other_make_no_run() -> None:
    assert repetition(pack(batch([[5] * 10], [[1, 1, 1, 0, 1, 1, 1, 0, 1, 1]]))) is None


def test_nothing_is_known_without_token_ids() -> None:
    known = batch([[1, 2, 3, 4]])
    assert repetition(pack(TokenBatch(known.logp_new, known.logp_old, known.advantage, known.mask))) is None
    assert repetition(pack(batch([[1, 2, 3]]))) is None
