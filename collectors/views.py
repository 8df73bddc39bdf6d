"""SQL of the DuckDB views over a run's files: the tables of the public contract."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa

from collectors import layout
from collectors.layout import StepFile
from collectors.schema import EVENT_SCHEMA, ROLLUP_SCHEMA, SEQUENCE_SCHEMA, TOKEN_SCHEMA, VOCABULARY_SCHEMA

SCHEMAS = {
    layout.ROLLUP: ROLLUP_SCHEMA,
    layout.TOKENS: TOKEN_SCHEMA,
    layout.SEQUENCES: SEQUENCE_SCHEMA,
    layout.EVENTS: EVENT_SCHEMA,
    layout.VOCABULARY: VOCABULARY_SCHEMA,
}

_WILDCARD = re.compile(r"[*?\[]")

# Arrow → DuckDB, for tables that have no file yet.
_TYPES = {
    pa.int64(): "BIGINT", pa.int32(): "INTEGER", pa.float64(): "DOUBLE", pa.float32(): "FLOAT",
    pa.string(): "VARCHAR", pa.bool_(): "BOOLEAN",
}  # fmt: skip

# ψ as SQL, for the objectives that have one; every {name} is a hyperparameter.
_LFM = "{c} * tanh(log_ratio::DOUBLE / {c})"
MODULATED_LOG_RATIO = {
    "mhpo": _LFM, "mhpo_lfm_only": _LFM, "mhpo_no_stopgrad": _LFM, "mhpo_sa": _LFM, "mhpo_dhp_only": "log_ratio",
}  # fmt: skip


def read_parquet(paths: list[str]) -> str:
    """Table function over exactly these files, whatever characters their folder has."""
    # DuckDB expands wildcards in paths, and makes columns of folders called like lr=3
    escaped = (_WILDCARD.sub(r"[\g<0>]", p).replace("'", "''") for p in paths)
    return "read_parquet([" + ", ".join(f"'{p}'" for p in escaped) + "], hive_partitioning = false)"


def base_view(name: str, table: str, paths: list[str]) -> str:
    """A view over exactly these files, typed and empty when there are none."""
    if paths:
        return f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT * FROM {read_parquet(paths)}"
    columns = ", ".join(f"NULL::{_sql_type(f.type)} AS {f.name}" for f in SCHEMAS[table])
    return f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT {columns} WHERE false"


def public_views(manifest: dict[str, Any], rollup: list[StepFile]) -> list[str]:
    """The views a user queries, over raw_rollup, raw_tokens, raw_sequences, events and vocabulary."""
    latest = _latest(rollup)
    return [
        "CREATE OR REPLACE TEMP VIEW steps_all AS "
        "SELECT * EXCLUDE (rank, histograms, gradients, metrics) FROM raw_rollup ORDER BY step, attempt",
        f"CREATE OR REPLACE TEMP VIEW latest_rollup AS SELECT * FROM raw_rollup {latest}",
        "CREATE OR REPLACE TEMP VIEW steps AS "
        "SELECT * EXCLUDE (rank, histograms, gradients, metrics) FROM latest_rollup ORDER BY step",
        "CREATE OR REPLACE TEMP VIEW histograms AS SELECT step, h.quantity, h.side, h.bin_low, h.bin_high, h.count, "
        "h.weight, h.advantage_weight FROM (SELECT step, unnest(histograms) AS h FROM latest_rollup)",
        "CREATE OR REPLACE TEMP VIEW gradients AS SELECT step, rank, g.parameter, g.grad_norm, g.weight_norm, "
        "g.nonfinite FROM (SELECT step, rank, unnest(gradients) AS g FROM latest_rollup)",
        "CREATE OR REPLACE TEMP VIEW metrics AS SELECT step, m.name, m.value "
        "FROM (SELECT step, unnest(metrics) AS m FROM latest_rollup)",
        _tokens_view(manifest, latest),
        f"CREATE OR REPLACE TEMP VIEW sequences AS SELECT * EXCLUDE (attempt) FROM raw_sequences {latest}",
    ]


def _tokens_view(manifest: dict[str, Any], latest: str) -> str:
    modulated = _modulated_log_ratio(manifest.get("objective") or {})
    return f"""CREATE OR REPLACE TEMP VIEW tokens AS
        SELECT step, sequence_id, position, token_id, token, logp_new, logp_old, logp_rollout, logp_ref, advantage,
            entropy, log_ratio, (hazard_positive + hazard_negative)::FLOAT AS hazard, hazard_positive, hazard_negative,
            ({modulated})::FLOAT AS modulated_log_ratio,
            exp(-(hazard_positive::DOUBLE + hazard_negative::DOUBLE))::FLOAT AS survival_weight,
            gradient_multiplier, logit_grad_norm, kept_because
        FROM (SELECT * FROM raw_tokens {latest}) LEFT JOIN vocabulary USING (token_id)"""


def _modulated_log_ratio(objective: dict[str, Any]) -> str:
    given = objective.get("hyperparameters") or {}
    if isinstance(given.get("base"), dict):  # an objective around another one
        return _modulated_log_ratio({"name": given["base"].get("name"), "hyperparameters": given["base"]})
    template = MODULATED_LOG_RATIO.get(str(objective.get("name")), "NULL")
    try:
        return template.format(**{k: f"{float(v)!r}::DOUBLE" for k, v in given.items() if _is_number(v)})
    except KeyError:  # an imported run may not say with which hyperparameters it was made
        return "NULL"


def _latest(rollup: list[StepFile]) -> str:
    """Filter to the latest attempt at each step; nothing to filter when there was only one."""
    if len({f.attempt for f in rollup}) < 2:
        return ""
    return "SEMI JOIN (SELECT step, max(attempt) AS attempt FROM raw_rollup GROUP BY step) USING (step, attempt)"


def _sql_type(arrow: pa.DataType) -> str:
    if pa.types.is_list(arrow):
        return _sql_type(arrow.value_type) + "[]"
    if pa.types.is_struct(arrow):
        return "STRUCT(" + ", ".join(f"{f.name} {_sql_type(f.type)}" for f in arrow) + ")"
    return _TYPES[arrow]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
