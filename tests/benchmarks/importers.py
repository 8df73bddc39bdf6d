"""Importers: throughput against pandas on the same file, and memory on a large one

A metrics log of JSON lines and a prime-rl token export, written as those tools write them. "Read" is the importer
alone, "import" is everything until the run is there: recognised, read, measured, encoded, committed. CPU seconds, one
thread. The memory is the highest resident set of a process of its own that imports a log of BENCH_IMPORT_GB gigabytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from collectors.importers import import_run
from collectors.importers.formats import recognise
from collectors.importers.steps import Notes

LARGE = float(os.environ.get("BENCH_IMPORT_GB", "2"))
_ROWS, _STEPS, _SEQUENCES, _LENGTH = 5_000, 4, 64, 1000
_METRICS = [f"actor/metric_{i}" for i in range(28)] + ["actor/loss", "actor/grad_norm"]

_PEAK = """
import resource, sys
from collectors.importers.formats import recognise
from collectors.importers.steps import Notes
from pathlib import Path
(form, files), = recognise(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in form.steps(files, Notes()))
print(count, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def run() -> Iterator[str]:
    """One row per way, then memory."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics, tokens = _metrics_log(folder / "exp.jsonl", _ROWS), _token_export(folder / "token_exports")
        yield "| file | way | MB/s | steps/s | tokens/s |"
        yield "|---|---|---|---|---|"
        yield from _rows("verl file log", metrics, folder, _ROWS, 0)
        yield from _rows("prime-rl token export", tokens, folder, _STEPS, _STEPS * _SEQUENCES * _LENGTH)
        yield ""
        large = _metrics_log(folder / "large.jsonl", int(LARGE * 1e9 / metrics.stat().st_size * _ROWS))
        size = large.stat().st_size
        done = subprocess.run([sys.executable, "-c", _PEAK, str(large)], capture_output=True, text=True, check=True)
        count, before, after = (int(v) for v in done.stdout.split())
        yield (
            f"Reading {size / 1e9:.1f} GB, {count:,} steps: {before / 1024:,.0f} MB resident before, "
            f"{after / 1024:,.0f} MB at most."
        )


def _rows(title: str, path: Path, folder: Path, steps: int, tokens: int) -> Iterator[str]:
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    size = sum(file.stat().st_size for file in files)

    def read() -> None:
        ((form, found),) = recognise(path)
        assert sum(1 for _ in form.steps(found, Notes())) == steps

    ways: dict[str, Callable[[], object]] = {
        "read": read,
        "import": lambda: import_run([path], folder / "runs", name=f"{path.stem}-{time.monotonic_ns()}"),
        "pandas.read_json(lines=True)": lambda: [pd.read_json(file, lines=True) for file in files],
    }
    for way, action in ways.items():
        spent = []
        for _ in range(3):
            began = time.process_time()
            action()
            spent.append(time.process_time() - began)
        seconds = float(np.median(spent))
        per_token = f"{tokens / seconds:,.0f}" if tokens else ""
        yield f"| {title} | {way} | {size / seconds / 1e6:.0f} | {steps / seconds:,.0f} | {per_token} |"


def _metrics_log(path: Path, rows: int) -> Path:
    random = np.random.default_rng(0)
    values = random.standard_normal((1000, len(_METRICS))).tolist()
    with path.open("w") as file:
        for step in range(rows):
            data = dict(zip(_METRICS, values[step % 1000], strict=True))
            file.write(json.dumps({"step": step, "data": data}, separators=(",", ":")) + "\n")
    return path


def _token_export(folder: Path) -> Path:
    random = np.random.default_rng(1)
    for step in range(_STEPS):
        (folder / f"step_{step}").mkdir(parents=True)
        with (folder / f"step_{step}" / "rank_0.jsonl").open("w") as file:
            for index in range(_SEQUENCES):
                file.write(json.dumps(_sequence(random, step, index)) + "\n")
        (folder / f"step_{step}" / "STABLE").touch()
    return folder


def _sequence(random: np.random.Generator, step: int, index: int) -> dict[str, object]:
    inference = -random.exponential(1.0, _LENGTH)
    trainer = inference + 0.02 * random.standard_normal(_LENGTH)
    ratio = trainer - inference
    return {
        "schema_version": 1, "step": step, "rank": 0, "micro_step": 0, "micro_sequence_idx": index,
        "export_sequence_idx": index, "env_name": "math", "token_ids": random.integers(0, 32_000, _LENGTH).tolist(),
        "position_ids": list(range(_LENGTH)), "loss_mask": [True] * _LENGTH, "advantages": [0.5] * _LENGTH,
        "inference_logprobs": inference.tolist(), "trainer_logprobs": trainer.tolist(),
        "entropy": random.exponential(1.0, _LENGTH).tolist(), "mismatch_kl": (np.expm1(ratio) - ratio).tolist(),
        "log_importance_ratio": ratio.tolist(), "importance_ratio": np.exp(ratio).tolist(),
        "prob_delta": (np.exp(trainer) - np.exp(inference)).tolist(), "is_masked": [False] * _LENGTH,
        "is_masked_high": [False] * _LENGTH, "is_masked_low": [False] * _LENGTH, "rl_weights": None,
        "ce_weights": None, "ref_kl_weights": None,
    }  # fmt: skip
