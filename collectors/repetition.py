"""How much completions repeat themselves: loops grow just before lengths do."""

from __future__ import annotations

import numpy as np

from collectors.packing import Packed

REPETITION = "mhpo/repetition_fraction"
"""Name among the metrics of a step."""

_GRAM = 4
_AT_MOST = 65_536  # tokens looked at; a sort of all of a large step would cost more than its rollup
_FACTOR = np.int64(6364136223846793005)


def repetition(packed: Packed) -> float | None:
    """Share of the runs of four trained tokens that their completion has had before.

    Of the first 65,536 tokens of the step. None where token ids are not known, or no completion has four tokens.
    """
    given = packed.batch.token_id
    if given is None:
        return None
    ids = given[0, :_AT_MOST].numpy().astype(np.int64)
    row, position = packed.row[:_AT_MOST], packed.position[:_AT_MOST]
    if len(ids) < _GRAM:
        return None
    last = len(ids) - _GRAM + 1
    whole = (row[:last] == row[_GRAM - 1 :]) & (position[_GRAM - 1 :] - position[:last] == _GRAM - 1)
    with np.errstate(over="ignore"):
        key = row[:last].astype(np.int64)
        for place in range(_GRAM):
            key = key * _FACTOR + ids[place : place + last]
    grams = key[whole]
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else None
