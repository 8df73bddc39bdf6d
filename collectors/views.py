"""SQL of the DuckDB views over a run's files: the tables of the public contract."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa

from collectors.schema import (
    ALARM_SCHEMA,
    EVENT_SCHEMA,
    ROLLUP_SCHEMA,
    SEQUENCE_SCHEMA,
    TEXT_SCHEMA,
    TOKEN_SCHEMA,
    VOCABULARY_SCHEMA,
)
from collectors.token_view import tokens_sql

SCHEMAS = {
    "raw_rollup": ROLLUP_SCHEMA,
    "raw_tokens": TOKEN_SCHEMA,
    "ring_tokens": TOKEN_SCHEMA,
    "pinned_tokens": TOKEN_SCHEMA,
    "raw_sequences": SEQUENCE_SCHEMA,
    "raw_texts": TEXT_SCHEMA,
    "raw_events": EVENT_SCHEMA,
    "raw_alarms": ALARM_SCHEMA,
    "vocabulary": VOCABULARY_SCHEMA,
}
"""Relation over files → its columns."""

PUBLIC = (
    "steps",
    "steps_all",
    "histograms",
    "tokens",
    "sequences",
    "gradients",
    "metrics",
    "events",
    "alarms",
    "evaluations",
)

_WILDCARD = re.compile(r"[*?\[]")

# Arrow → DuckDB, for tables that have no file yet.
_TYPES = {
    pa.int64(): "BIGINT", pa.int32(): "INTEGER", pa.float64(): "DOUBLE", pa.float32(): "FLOAT",
    pa.string(): "VARCHAR", pa.bool_(): "BOOLEAN",
}  # fmt: skip
_NOT_SHOWN = "EXCLUDE (rank, histograms, gradients, metrics, parts)"


def read_parquet(paths: list[str]) -> str:
    """Table function over exactly these files, whatever characters their folder has."""
    # DuckDB expands wildcards in paths, and makes columns of folders called like lr=3
    escaped = (_WILDCARD.sub(r"[\g<0>]", p).replace("'", "''") for p in paths)
    return "read_parquet([" + ", ".join(f"'{p}'" for p in escaped) + "], hive_partitioning = false)"


def base_view(name: str, source: str | None) -> str:
    """A view over a source, typed and empty where there is none."""
    if source:
        return f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT * FROM {source}"
    columns = ", ".join(f"NULL::{_sql_type(f.type)} AS {f.name}" for f in SCHEMAS[name])
    return f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT {columns} WHERE false"


def public_views(manifest: dict[str, Any], *, attempts: bool, ranks: bool) -> list[str]:
    """The views a user queries, over the relations of SCHEMAS.

    Args:
        attempts: the run was rewound, so that only the latest attempt at a step counts.
        ranks: rows of several ranks lie merged in the relation merged_rollup.
    """
    rollup = "merged_rollup" if ranks else "raw_rollup"
    chosen = f"(SELECT step, max(attempt) AS attempt FROM {rollup} GROUP BY step)"
    latest = f"SEMI JOIN {chosen} USING (step, attempt)" if attempts else ""
    made = "CREATE OR REPLACE TEMP VIEW"
    return [
        f"{made} steps_all AS SELECT * {_NOT_SHOWN} FROM {rollup} ORDER BY step, attempt",
        f"{made} latest_rollup AS SELECT * FROM {rollup} {latest}",
        f"{made} steps AS SELECT * {_NOT_SHOWN} FROM latest_rollup ORDER BY step",
        f"{made} histograms AS SELECT step, h.quantity, h.side, h.bin_low, h.bin_high, h.count, "
        "h.weight, h.advantage_weight FROM (SELECT step, unnest(histograms) AS h FROM latest_rollup)",
        f"{made} gradients AS SELECT step, rank, g.parameter, g.grad_norm, g.weight_norm, "
        f"g.nonfinite FROM (SELECT step, rank, unnest(gradients) AS g FROM raw_rollup {latest})",
        f"{made} metrics AS SELECT step, m.name, m.value FROM (SELECT step, unnest(metrics) AS m FROM latest_rollup) "
        "WHERE m.name NOT LIKE 'alarm/%' AND m.name NOT LIKE 'mhpo/%'",
        f"{made} tokens AS {tokens_sql(manifest, latest)}",
        f"{made} sequences AS {_sequences(latest)}",
        f"{made} evaluations AS SELECT step, substr(m.name, 7) AS signal, m.value AS score FROM "
        "(SELECT step, unnest(metrics) AS m FROM latest_rollup) WHERE m.name LIKE 'alarm/%'",
        f"{made} alarms AS SELECT * EXCLUDE (number, attempt) FROM raw_alarms {latest} ORDER BY step, number",
        f"{made} events AS SELECT time, kind, detail FROM raw_events ORDER BY number, time",
    ]


def _sequences(latest: str) -> str:
    """Every sequence with its text, which lies apart while its step is in the ring."""
    both = ", ".join(f"coalesce(s.{n}, t.{n}) AS {n}" for n in ("prompt", "completion"))
    key = "step, attempt, rank, sequence_id"
    return (
        f"SELECT * EXCLUDE (attempt) FROM (SELECT s.* REPLACE ({both}) FROM raw_sequences AS s "
        f"LEFT JOIN raw_texts AS t USING ({key})) {latest}"
    )


def _sql_type(arrow: pa.DataType) -> str:
    if pa.types.is_list(arrow):
        return _sql_type(arrow.value_type) + "[]"
    if pa.types.is_struct(arrow):
        return "STRUCT(" + ", ".join(f"{f.name} {_sql_type(f.type)}" for f in arrow) + ")"
    return _TYPES[arrow]
