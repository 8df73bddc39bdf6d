"""The view `tokens`: as SQL over the files of a run, and computed for rows that were read from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collectors.formulas import DERIVED, Stage, token_stages
from collectors.schema import TOKEN_SCHEMA

COLUMNS = (
    "step", "sequence_id", "position", "token_id", "token", "logp_new", "logp_old", "logp_rollout", "logp_ref",
    "advantage", "entropy", "log_ratio", "hazard", *DERIVED[:4], "gradient_multiplier", "logit_grad_norm",
    "kept_because",
)  # fmt: skip
"""Of the view, in its order."""

PINNED = "pinned"


def tokens_sql(manifest: Mapping[str, Any], latest: str) -> str:
    """The query of the view, over raw_tokens, ring_tokens, pinned_tokens and vocabulary.

    Args:
        latest: join that leaves the newest attempt at each step; empty if there was one only.
    """
    *stages, last = token_stages(manifest)
    source = (
        "SELECT * FROM raw_tokens UNION ALL SELECT * FROM ring_tokens "
        f"UNION ALL SELECT * REPLACE ('{PINNED}' AS kept_because) FROM pinned_tokens"
    )
    source = f"SELECT * FROM ({source}) {latest}"
    known = set(TOKEN_SCHEMA.names)
    for stage in stages:
        source = f"SELECT {_star(stage, known)} FROM ({source})"
        known |= stage.keys()
    columns = {name: f"{last[name].sql()} AS {name}" for name in last}
    absent = {name: f"NULL::FLOAT AS {name}" for name in DERIVED[:4]}
    selected = ", ".join((absent | columns).get(name, name) for name in COLUMNS)
    return f"SELECT {selected} FROM ({source}) LEFT JOIN vocabulary USING (token_id)"


def _star(stage: Stage, known: set[str]) -> str:
    """All columns so far, and those of the stage."""
    replaced = ", ".join(f"{value.sql()} AS {name}" for name, value in stage.items() if name in known)
    added = "".join(f", {value.sql()} AS {name}" for name, value in stage.items() if name not in known)
    return f"*{f' REPLACE ({replaced})' if replaced else ''}{added}"


def pinned(rows: pa.Table) -> pa.Table:
    """Rows of pinned_tokens as the view has them."""
    place = rows.schema.get_field_index("kept_because")
    return rows.set_column(place, rows.schema.field(place), pa.repeat(PINNED, len(rows)))


class TokenView:
    """The same for some rows of TOKEN_SCHEMA, without planning a query.

    Args:
        manifest: contents of run.json.
        vocabulary: rows of VOCABULARY_SCHEMA; None where the run has none.
    """

    def __init__(self, manifest: Mapping[str, Any], vocabulary: pa.Table | None) -> None:
        self._stages = token_stages(manifest)
        self._ids: pa.Array | None = None
        if vocabulary is not None and len(vocabulary):
            vocabulary = vocabulary.sort_by("token_id").combine_chunks()
            self._ids = vocabulary["token_id"].chunk(0).to_numpy()
            self._tokens = vocabulary["token"].chunk(0)

    def of(self, rows: pa.Table) -> pa.Table:
        """The rows of the view, ordered by sequence and position."""
        rows = _ordered(rows.combine_chunks())
        columns: dict[str, Any] = {name: _array(rows[name]) for name in rows.column_names}
        for stage in self._stages:
            columns |= {name: value.of(columns) for name, value in stage.items()}
        columns["token"] = self._texts(columns["token_id"])
        for name in DERIVED[:4]:
            columns.setdefault(name, pa.nulls(len(rows), pa.float32()))
        return pa.table([columns[name] for name in COLUMNS], names=COLUMNS)

    def _texts(self, token_id: pa.Array) -> pa.Array:
        if self._ids is None:
            return pa.nulls(len(token_id), pa.string())
        wanted = pc.fill_null(token_id, 0).to_numpy()
        place = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        missing = (self._ids[place] != wanted) | token_id.is_null().to_numpy(zero_copy_only=False)
        return self._tokens.take(pa.array(place, mask=missing))


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _ordered(rows: pa.Table) -> pa.Table:
    sequence, position = (rows[name].to_numpy() for name in ("sequence_id", "position"))
    rises = sequence[1:] > sequence[:-1]
    rises |= (sequence[1:] == sequence[:-1]) & (position[1:] >= position[:-1])
    if rises.all():
        return rows
    return rows.take(pa.array(np.lexsort((position, sequence))))
