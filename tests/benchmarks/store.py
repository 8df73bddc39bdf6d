"""Store: bytes, encoding, hand-off, reads and compaction against what people write today

The same tokens everywhere, all ways in turns in one process, CPU time unless it says wall, medians. "Plain Parquet" is
`pyarrow.parquet.write_table` with its defaults over all columns that the view `tokens` has; "the stored columns" are
those of them that this store has in its files. JSONL is one line per sequence, as verl and RLLoggingBoard write it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from collectors import Recorder, layout, open_run
from collectors.compaction import compact
from collectors.encoding import encode
from collectors.formulas import derivation
from collectors.packing import Packed, measure_packed, pack
from collectors.policy import ALL, TokenPolicy
from collectors.schema import StepKey, StepScalars, rollup_table
from collectors.storage import LocalStorage
from collectors.token_rows import COMPACT, EXACT, FULL, TokenColumns, step_rows
from mhpo_core import Sequences, objectives
from mhpo_core.telemetry import StepTelemetry
from tests.benchmarks.synthetic import step_batch

TOKENS, ROUNDS = 1_000_000, 5
STEPS_OF_A_LONG_RUN = int(os.environ.get("BENCH_STEPS", "100"))
SMALL_FILES, TOKENS_OF_A_SMALL_FILE = 10_000, 400
_OBJECTIVE = objectives.create("mhpo")
_DERIVED = frozenset(derivation({"name": "mhpo", "hyperparameters": _OBJECTIVE.hyperparameters()}).columns)
_EVERYTHING = TokenPolicy(ALL, 0, 0)
Ways = dict[str, Callable[..., Any]]


def run() -> Iterator[str]:
    """Tables of writing, of hand-off and of reading."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    batch = step_batch(TOKENS)
    packed = pack(batch)
    measured = measure_packed(batch, packed, _OBJECTIVE)
    with tempfile.TemporaryDirectory() as folder:
        yield from _writing(packed, measured, Path(folder))
        yield from _hand_off(step_batch(TOKENS, mean_length=1600, longest=801), Path(folder) / "dense")
        yield from _hand_off(batch, Path(folder) / "padded")
        yield from _reading(packed, measured, Path(folder))
        yield from _compacting(Path(folder))


def _rows(packed: Packed, measured: StepTelemetry, precision: str, step: int = 0) -> pa.Table:
    key = StepKey(step, 0)
    ids = np.arange(len(packed.length)) + key.step * len(packed.length)
    how = TokenColumns(FULL, precision, _DERIVED)
    rows = step_rows(key, packed, measured, Sequences(), ids, _EVERYTHING, how).kept
    assert rows is not None
    return rows


def _writing(packed: Packed, measured: StepTelemetry, folder: Path) -> Iterator[str]:
    columns = _as_columns(packed, measured)
    everything = pa.table(columns)
    stored = everything.select([n for n in columns if n not in _NOT_STORED])
    lines = _as_lines(packed, columns)
    raw = b"".join(np.ascontiguousarray(v).tobytes() for n, v in columns.items() if n in stored.column_names[1:])
    path = folder / "file"
    ways: Ways = {
        "ours, exact": lambda: path.write_bytes(encode(_rows(packed, measured, EXACT), layout.TOKENS)),
        "ours, compact": lambda: path.write_bytes(encode(_rows(packed, measured, COMPACT), layout.TOKENS)),
        "plain Parquet": lambda: pq.write_table(everything, path),
        "plain Parquet, the stored columns": lambda: pq.write_table(stored, path),
        "zstd-1 of the stored arrays": lambda: path.write_bytes(pa.Codec("zstd", 1).compress(raw)),
        "json.dumps JSONL": lambda: path.write_text("\n".join(json.dumps(line()) for line in lines)),
        "orjson JSONL": _orjson(path, lines),
    }
    spent, sizes = _in_turns({n: w for n, w in ways.items() if w is not None}, path)
    yield f"{TOKENS:,} tokens of one step:"
    yield ""
    yield "| way | bytes per token | encode and write, ms CPU | bytes: ours ÷ theirs | speed: ours ÷ theirs |"
    yield "|---|---|---|---|---|"
    for name in ways:
        if name not in spent:
            yield f"| {name} | not installed | | | |"
            continue
        ratio = np.median(np.array(spent[name]) / np.array(spent["ours, exact"]))
        ours = "|  |" if name == "ours, exact" else f"{sizes['ours, exact'] / sizes[name]:.2f} | {ratio:.1f} × |"
        yield f"| {name} | {sizes[name] / TOKENS:.1f} | {np.median(spent[name]) * 1e3:.0f} | {ours}"
    yield ""


_NOT_STORED = ("hazard_positive", "hazard_negative", "modulated_log_ratio", "survival_weight", "gradient_multiplier")


def _as_columns(packed: Packed, measured: StepTelemetry) -> dict[str, Any]:
    """What a reader of `tokens` sees, as arrays."""
    batch, terms, n = packed.batch, measured.terms, len(packed.row)
    named = {
        "logp_new": batch.logp_new, "logp_old": batch.logp_old, "logp_rollout": batch.logp_rollout,
        "advantage": batch.advantage, "entropy": batch.entropy, "log_ratio": terms.log_ratio, "hazard": terms.hazard,
        "hazard_positive": terms.hazard_positive, "hazard_negative": terms.hazard_negative,
        "modulated_log_ratio": terms.modulated_log_ratio, "survival_weight": terms.survival_weight,
        "gradient_multiplier": terms.gradient_multiplier, "logit_grad_norm": measured.logit_grad_norm,
    }  # fmt: skip
    return {
        "step": np.zeros(n, np.int64), "sequence_id": packed.row, "position": packed.position.astype(np.int32),
        "token_id": batch.token_id.numpy().reshape(-1).astype(np.int32),
        **{name: values.float().numpy().reshape(-1) for name, values in named.items()},
        "kept_because": pa.array(["all"]).take(pa.array(np.zeros(n, np.int8))),
    }  # fmt: skip


def _as_lines(packed: Packed, columns: dict[str, Any]) -> list[Callable[[], dict[str, Any]]]:
    ends = np.cumsum(packed.length)
    names = ("token_id", "logp_new", "logp_old", "logp_rollout", "entropy", "log_ratio", "hazard", "logit_grad_norm")

    def line(first: int, last: int, row: int) -> dict[str, Any]:
        arrays = {name: columns[name][first:last].tolist() for name in names}
        return {"step": 0, "sequence_id": row, "advantage": float(columns["advantage"][first]), **arrays}

    return [
        lambda first=int(end - n), last=int(end), row=row: line(first, last, row)
        for row, (end, n) in enumerate(zip(ends, packed.length, strict=True))
    ]


def _orjson(path: Path, lines: list[Callable[[], dict[str, Any]]]) -> Callable[[], Any] | None:
    try:
        import orjson
    except ImportError:
        return None
    return lambda: path.write_bytes(b"\n".join(orjson.dumps(line()) for line in lines))


def _in_turns(ways: Ways, path: Path) -> tuple[dict[str, list[float]], dict[str, int]]:
    spent: dict[str, list[float]] = {name: [] for name in ways}
    sizes = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            path.unlink(missing_ok=True)  # giving back the pages of a large file takes 10 ms
            started = time.process_time()
            way()
            spent[name].append(time.process_time() - started)
            sizes[name] = path.stat().st_size
    return spent, sizes


def _hand_off(batch: Any, folder: Path) -> Iterator[str]:
    """What the training thread spends, against writing in line and against a copy of the same bytes."""
    inputs = [t for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    copies, handed, inline = [], [], []
    folder.mkdir()
    with Recorder(folder / "hand-off", objective=_OBJECTIVE, tokens="all", fsync="never", disk_limit=None) as recorder:
        for step in range(12):
            started = time.thread_time()
            copied = [t.clone(memory_format=torch.contiguous_format) for t in inputs]
            copies.append(time.thread_time() - started)
            del copied
            started = time.thread_time()
            recorder.record(step, batch)
            handed.append(time.thread_time() - started)
            recorder.flush()
    for _ in range(3):
        started = time.thread_time()
        packed = pack(batch)
        rows = _rows(packed, measure_packed(batch, packed, _OBJECTIVE), EXACT)
        (folder / "inline").write_bytes(encode(rows, layout.TOKENS))
        inline.append(time.thread_time() - started)
    own, copy, line = (np.median(values) * 1e3 for values in (handed, copies, inline))
    yield f"Training thread, {TOKENS:,} trained tokens in {batch.mask.numel():,} places, ms of its own time:"
    yield ""
    yield "| `Recorder.record` | copy of the batch | all of it in line | record ÷ copy | record ÷ in line |"
    yield "|---|---|---|---|---|"
    yield f"| {own:.1f} | {copy:.1f} | {line:.0f} | {own / copy:.2f} | 1/{line / own:.0f} |"
    yield ""


def _reading(packed: Packed, measured: StepTelemetry, folder: Path) -> Iterator[str]:
    """One completion, and quantiles of every step, in a run of many tokens."""
    total = STEPS_OF_A_LONG_RUN * TOKENS
    ours, plain = folder / "ours", folder / "plain"
    _write_long_run(packed, measured, ours, plain)
    with duckdb.connect() as plainly, open_run(ours) as opened:
        plainly.execute("SET threads = 2")
        opened.connection.execute("SET threads = 2")
        files = f"read_parquet('{plain}/*.parquet')"
        one: Ways = {
            "ours": lambda step, row: opened.tokens_of(step, step * len(packed.length) + row),
            "plain": lambda step, row: plainly.execute(
                f"FROM {files} WHERE step = {step} AND sequence_id = {row}"
            ).fetchnumpy(),
        }
        drawn = np.random.default_rng(0).integers(0, (STEPS_OF_A_LONG_RUN, len(packed.length)), (26, 2)).tolist()
        yield from _timed(f"one completion of {total:,} tokens, another one each time", one, drawn)
        exact = "SELECT step, quantile_cont(log_ratio, [0.0001, 0.01, 0.5, 0.99, 0.9999]) FROM tokens GROUP BY step"
        stored = "SELECT step, log_ratio_p0001, log_ratio_p01, log_ratio_p50, log_ratio_p99, log_ratio_p9999 FROM steps"
        quantiles: Ways = {
            "ours": lambda: opened.sql(stored).fetchall(),
            "plain": lambda: opened.sql(exact).fetchall(),
        }
        yield from _timed(
            f"quantiles of every step, {total:,} tokens: rollup against exact sort in DuckDB", quantiles, [()] * 3
        )
    shutil.rmtree(plain)


def _write_long_run(packed: Packed, measured: StepTelemetry, ours: Path, plain: Path) -> None:
    """Sealed files of four steps each, as the recorder leaves them, and one plain file per step."""
    Recorder(ours, objective=_OBJECTIVE, tokens="all", disk_limit=None, fsync="never").close()
    storage = LocalStorage(ours)
    plain.mkdir()
    columns = _as_columns(packed, measured)
    everything = pa.table(columns)
    for first in range(0, STEPS_OF_A_LONG_RUN, 4):
        steps = range(first, min(first + 4, STEPS_OF_A_LONG_RUN))
        tables: dict[str, list[pa.Table]] = {layout.TOKENS: [], layout.ROLLUP: []}
        for step in steps:
            key = StepKey(step, 0)
            tables[layout.TOKENS].append(_rows(packed, measured, EXACT, step))
            given = {"world_size": 1, "wall_time": float(step), "kept_tokens": TOKENS, "ring_tokens": 0}
            rollup = rollup_table(key, given, measured.scalars, measured.histograms, StepScalars())
            tables[layout.ROLLUP].append(rollup)
            pq.write_table(everything.set_column(0, "step", [np.full(TOKENS, step)]), plain / f"{step:06d}.parquet")
        for table, parts in tables.items():
            data = encode(pa.concat_tables(parts).unify_dictionaries(), table)
            name = layout.file_name(steps[0], steps[-1], 0, 0, data)
            storage.write(f"{table}/{layout.SEALED}/{name}", data, fsync=False)


def _timed(title: str, ways: Ways, rounds: list[Any]) -> Iterator[str]:
    """Medians of the rounds, each with the arguments given for it."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for arguments in rounds:
        for name, way in ways.items():
            started = time.perf_counter()
            way(*arguments)
            wall[name].append(time.perf_counter() - started)
    ours, plain = (float(np.median(wall[name])) * 1e3 for name in ("ours", "plain"))
    yield f"- {title}: {ours:,.1f} ms against {plain:,.0f} ms wall, 1/{plain / ours:.1f}"


def _compacting(folder: Path) -> Iterator[str]:
    """A run of many small files, before and after `mhpo compact`."""
    run = folder / "small"
    Recorder(run, objective=_OBJECTIVE, tokens="all", disk_limit=None, fsync="never").close()
    storage = LocalStorage(run)
    packed = pack(step_batch(TOKENS_OF_A_SMALL_FILE, mean_length=100))
    measured = measure_packed(packed.batch, packed, _OBJECTIVE)
    given = {"world_size": 1, "wall_time": 0.0, "kept_tokens": TOKENS_OF_A_SMALL_FILE, "ring_tokens": 0}
    for step in range(SMALL_FILES):
        key = StepKey(step, 0)
        rollup = rollup_table(key, given, measured.scalars, measured.histograms, StepScalars())
        rows = _rows(packed, measured, EXACT, step)
        for table, part in ((layout.TOKENS, rows), (layout.ROLLUP, rollup)):
            data = encode(part, table, fast=True)
            storage.write(f"{table}/{layout.HOT}/{layout.file_name(step, step, 0, 0, data)}", data, fsync=False)
    query = "SELECT avg(log_ratio) FROM tokens"
    before = _query(run, query)
    started = time.perf_counter()
    done = compact(storage, wait=0.0)
    seconds = time.perf_counter() - started
    after = _query(run, query)
    yield (
        f"- {query.lower()} over {SMALL_FILES:,} files of {TOKENS_OF_A_SMALL_FILE} tokens: {before * 1e3:,.0f} ms CPU, "
        f"compacted {after * 1e3:,.1f} ms, 1/{before / after:.0f}; {done.bytes_before / 1e6:,.0f} MB became "
        f"{done.bytes_after / 1e6:,.0f} MB in {seconds:.0f} s"
    )


def _query(run: Path, query: str) -> float:
    """CPU seconds of a query whose files have been listed."""
    with open_run(run) as opened:
        opened.connection.execute("SET threads = 2")
        spent = []
        for _ in range(3):
            started = time.process_time()
            opened.connection.sql(query).fetchall()
            spent.append(time.process_time() - started)
    return float(np.median(spent))
