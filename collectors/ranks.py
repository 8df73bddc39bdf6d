"""The ranks of a step as one row: every metric by the rule that METRICS declares for it.

Shape letters: R rows (one per rank of a step), S steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pyarrow as pa
import torch

from collectors.schema import ROLLUP_SCHEMA
from mhpo_core.histograms import N_BINS
from mhpo_core.metrics import LAST, MAXIMUM, METRICS, MINIMUM, RANK_MEAN, SEQUENCE_MEAN, SUM
from mhpo_core.telemetry.accumulators import OUTLIER_FIELDS, OUTLIERS, AccumulatorNames, Accumulators
from mhpo_core.telemetry.one_pass import SIDES
from mhpo_core.telemetry.summary import scalars_of

KINDS = ("counts", "sums", "log_sums", "minima", "maxima")
_ALL_SIDES = (*SIDES, "undefined")


def parts_of(accumulated: Accumulators, sequences: dict[str, float]) -> dict[str, dict[str, float]]:
    """What a rank stores beside its row so that the ranks of a step can be merged.

    Args:
        sequences: counts and sums over the sequences of the rank.
    """
    names = accumulated.names
    found = {
        kind: dict(zip(getattr(names, _names_of(kind)), getattr(accumulated, kind).tolist(), strict=True))
        for kind in KINDS
    }
    return found | {"sequences": sequences, "quantities": dict.fromkeys(names.quantities, 1.0)}


def merge_ranks(table: pa.Table) -> pa.Table:
    """One row per step and attempt, of raw rollup rows of any ranks, ordered by step and attempt.

    A step of one rank stays as it is. Counts and extremes of several are exact, means are those of all tokens
    together; quantiles come from the merged histograms, at most one bin (1/8 of the value) off.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, key in enumerate(zip(table["step"].to_pylist(), table["attempt"].to_pylist(), strict=True)):
        groups[key].append(index)
    order = sorted(groups)
    if all(len(groups[key]) == 1 for key in order):
        return table.take(pa.array([groups[key][0] for key in order], pa.int64()))
    rows = [_merged(table.take(pa.array(groups[key])).to_pylist()) for key in order]
    return pa.Table.from_pylist(rows, schema=ROLLUP_SCHEMA)


def _merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: row["rank"])
    if len(rows) == 1:
        return rows[0]
    result = dict(rows[0])
    for name, metric in METRICS.items():
        result[name] = _reduced(metric.reduction, [row[name] for row in rows], rows[0][name])
    for name in ("kept_tokens", "ring_tokens"):
        result[name] = _reduced(SUM, [row[name] for row in rows], None)
    result["wall_time"] = max(row["wall_time"] for row in rows)
    result["histograms"] = _merged_histograms(rows)
    parts = [_parts(row) for row in rows]
    # a rank that only wrote a summary has nothing to merge its tokens from
    measured = [(row, part) for row, part in zip(rows, parts, strict=True) if part["counts"]]
    if measured:
        found = {n: v for n, v in _token_scalars(measured).items() if n in METRICS}
        # counts are those of all ranks, as above
        result |= {n: v for n, v in found.items() if METRICS[n].reduction != SUM}
    result |= _sequence_scalars([part["sequences"] for part in parts])
    result["gradients"] = [gradient for row in rows for gradient in row["gradients"] or []]
    return result


def _reduced(rule: str, values: list[Any], first: Any) -> Any:
    known = [v for v in values if v is not None]
    if not known:
        return None
    if rule == SUM:
        return sum(known)
    if rule == RANK_MEAN:
        return sum(known) / len(known)
    if rule in (MINIMUM, MAXIMUM):
        return (min if rule == MINIMUM else max)(known)
    return next(iter(known)) if rule in (LAST, SEQUENCE_MEAN) else first


def _parts(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {kind: {} for kind in (*KINDS, "sequences", "quantities")}
    for part in row["parts"] or []:
        found.setdefault(part["kind"], {})[part["name"]] = part["value"]
    return found


def _token_scalars(measured: list[tuple[dict[str, Any], dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Every metric that follows from tokens, of the merged sums and histograms."""
    parts = [part for _, part in measured]

    def stacked(kind: str, missing: float) -> tuple[tuple[str, ...], torch.Tensor]:
        names = tuple(dict.fromkeys(name for part in parts for name in part[kind]))
        rows = [[part[kind].get(name, missing) for name in names] for part in parts]
        return names, torch.tensor(rows, dtype=torch.float64)

    counts, count_rows = stacked("counts", 0)
    sums, sum_rows = stacked("sums", 0)
    log_sums, log_rows = stacked("log_sums", -math.inf)
    extremes, low_rows = stacked("minima", math.inf)
    _, high_rows = stacked("maxima", -math.inf)
    quantities = tuple(dict.fromkeys(name for part in parts for name in part["quantities"]))
    bins = torch.zeros(len(quantities), len(_ALL_SIDES), N_BINS, dtype=torch.int64)
    for row, _ in measured:
        for h in row["histograms"] or []:
            bins[quantities.index(h["quantity"]), _ALL_SIDES.index(h["side"]), h["bin"]] += h["count"]
    merged = Accumulators(
        names=AccumulatorNames(counts, sums, log_sums, extremes, quantities),
        counts=count_rows.sum(0).long(),
        sums=sum_rows.sum(0),
        log_sums=log_rows.logsumexp(0),
        minima=low_rows.amin(0),
        maxima=high_rows.amax(0),
        bin_count=bins,
        bin_weight=torch.zeros(bins.shape, dtype=torch.float64),
        bin_advantage=torch.zeros(bins.shape[1:], dtype=torch.int64),
        outliers=torch.full((2, OUTLIERS, len(OUTLIER_FIELDS)), math.nan, dtype=torch.float64),
        outlier_place=torch.full((2, OUTLIERS, 2), -1),
        n_rows=0,
    )
    return scalars_of(merged)


def _sequence_scalars(parts: list[dict[str, float]]) -> dict[str, Any]:
    total: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    found: dict[str, Any] = {}
    if n := total["rewards"]:
        mean = total["reward"] / n
        found["reward_mean"] = mean
        found["reward_std"] = math.sqrt(max(0.0, total["reward_squared"] / n - mean**2)) if mean == mean else math.nan
    if n := total["sequences"]:
        found["truncated_fraction"] = total["truncated"] / n
    return found


def _merged_histograms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        for h in row["histograms"] or []:
            key = (h["quantity"], h["side"], h["bin"])
            if key not in merged:
                merged[key] = dict(h)
                continue
            for name in ("count", "weight", "advantage_weight"):
                if h[name] is not None:
                    merged[key][name] = (merged[key][name] or 0) + h[name]
    return list(merged.values())


def _names_of(kind: str) -> str:
    return "extremes" if kind in ("minima", "maxima") else kind
