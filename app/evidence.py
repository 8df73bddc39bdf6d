"""What of a run's tokens, sequences and layers stands behind an alarm."""

from __future__ import annotations

from typing import Any

from collectors.reader import Run
from mhpo_core.alarms import Alarm

_TOKENS = 8
_SEQUENCES = 4
_SHIFT = "greatest(coalesce(abs(log_ratio), 0), coalesce(abs(logp_old - logp_rollout), 0))"
# a NaN is above every number for DuckDB, so that non-finite tokens come first
_WORST_TOKENS = f"""
    SELECT sequence_id, position, token_id, token, log_ratio, logp_old - logp_rollout AS mismatch, advantage,
        gradient_multiplier, logit_grad_norm
    FROM tokens WHERE step = {{step}} ORDER BY {_SHIFT} DESC, sequence_id, position LIMIT {_TOKENS}"""
_WORST_SEQUENCES = f"""
    SELECT t.sequence_id, any_value(s.group_id) AS group_id, any_value(s.reward) AS reward,
        max({_SHIFT}) AS largest_shift, count(*) AS kept_tokens
    FROM tokens AS t LEFT JOIN sequences AS s USING (step, sequence_id)
    WHERE t.step = {{step}} GROUP BY t.sequence_id ORDER BY largest_shift DESC, t.sequence_id LIMIT {_SEQUENCES}"""


def with_evidence(run: Run, alarm: Alarm) -> dict[str, Any]:
    """The alarm as a dictionary, its evidence with the tokens and sequences of its step whose ratios are largest.

    Both lists are empty where the run keeps no tokens of that step.
    """
    row = alarm.to_dict()
    row["evidence"] = alarm.evidence | {
        "tokens": _rows(run, _WORST_TOKENS, alarm.step), "sequences": _rows(run, _WORST_SEQUENCES, alarm.step),
    }  # fmt: skip
    return row


def _rows(run: Run, query: str, step: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.sql(query.format(step=int(step))).to_arrow_table().to_pylist()
    return found
