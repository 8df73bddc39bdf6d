"""Batches, recorded runs and plain SQL rows for the tests of the store."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collectors import Recorder, Run, open_run
from mhpo_core import TokenBatch

B, T = 4, 6


def token_batch(seed: int, n_sequences: int = B, **changes: Any) -> TokenBatch:
    """A batch with every field, a mask with holes, all decided by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(n_sequences, T, generator=generator)

    old = -torch.rand(n_sequences, T, generator=generator) - 0.1
    new = (old + 0.3 * normal()).clamp(max=-1e-3)
    p = new.exp()
    mask = torch.rand(n_sequences, T, generator=generator) > 0.25
    mask[0, 0] = True
    fields: dict[str, Any] = {
        "logp_new": new, "logp_old": old, "advantage": normal()[:, 0], "mask": mask,
        "logp_rollout": old + 0.01 * normal(), "logp_ref": old + 0.1 * normal(), "entropy": normal().abs(),
        "sum_p_squared": p**2 + torch.rand(n_sequences, T, generator=generator) * (1 - p) ** 2,
        "token_id": torch.randint(0, 50, (n_sequences, T), generator=generator),
    }  # fmt: skip
    return TokenBatch(**fields | changes)


def new_recorder(path: Path, **options: Any) -> Recorder:
    """A recorder that keeps every token unless told otherwise."""
    return Recorder(path, **{"objective": "mhpo", "fsync": False, "tokens": "all"} | options)


def record_steps(path: Path, steps: Iterable[int], **options: Any) -> None:
    """Record a batch per step whose seed is the step, in the order given; every token is kept unless told otherwise."""
    with new_recorder(path, **options) as recorder:
        for step in steps:
            recorder.record(step, token_batch(step), loss=step / 8, gradient_norms={"layer": step + 0.5})


def rows(run: Run | Path, query: str) -> list[tuple[Any, ...]]:
    if isinstance(run, Path):
        with open_run(run) as opened:
            return opened.sql(query).fetchall()
    return run.sql(query).fetchall()


def column(run: Run | Path, query: str) -> list[Any]:
    return [row[0] for row in rows(run, query)]


def same(a: Any, b: Any) -> bool:
    """Equality to the last bit, NaN equal to NaN, None equal to nothing else."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def wait_for(writer: Recorder) -> None:
    """Until everything that was handed over is written, given up, or refused by the disk once."""
    assert writer._pipeline.call(lambda: None).wait(30)


def step_files(run: Path, table: str, level: str, step: int) -> list[Path]:
    """Files of one step alone."""
    return sorted((run / table / level).glob(f"s{step:09d}.*.parquet"))


TABLES = ("steps", "steps_all", "tokens", "sequences", "gradients", "metrics", "histograms", "events")


def everything(run: Path, tables: Iterable[str] = TABLES) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of the tables, in an order of their own; floats as text, so that NaN equals NaN."""
    with open_run(run) as opened:
        return {t: sorted(map(repr, opened.sql(f"FROM {t}").fetchall())) for t in tables}
