"""Rollup of a step of a million tokens: CPU time against histograms and sketches of other tools

All in one process on one thread and in turns, CPU time of the whole process. The others are handed five arrays that are
ready: log-ratio, mismatch, entropy, token gradient norm and multiplier. `measure_binned` starts from the
log-probabilities, and leaves every scalar, and histograms by sign of the advantage with their weights. "The log-ratio
alone" is all that follows from it: histograms, quantiles, KL, effective sample size, hazards, multiplier, clip
fractions. Every position trains; a padded one costs `measure_binned` as much, and masking a tenth on top. An error is
the worst of the quantile levels 1e-4 … 0.9999 of log-ratio and mismatch, relative, with a floor of 1e-3. Peers
(`pip install wandb tensorboard datasketches`) are needed for nothing else.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from mhpo_core import TokenBatch, objectives
from mhpo_core.metrics import QUANTILE_LEVELS
from mhpo_core.telemetry import measure
from mhpo_core.telemetry.binned import measure_binned

SHAPE = (500, 2000)
ROUNDS = 15
LEVELS = list(QUANTILE_LEVELS.values())
OURS, ALONE = "`measure_binned`", "`measure_binned`, the log-ratio alone"

Ready = dict[str, NDArray[np.float32]]


def run() -> Iterator[str]:
    """One table."""
    torch.set_num_threads(1)
    objective = objectives.create("mhpo")
    batch = _batch(*SHAPE)
    alone = TokenBatch(batch.logp_new, batch.logp_old, batch.advantage, batch.mask)
    exact = measure(batch, objective)
    ready = _ready(batch, exact.terms.gradient_multiplier, exact.logit_grad_norm)
    with tempfile.TemporaryDirectory() as folder:
        peers = _peers(ready, folder)
        ways: dict[str, Callable[[], object]] = {
            OURS: lambda: measure_binned(batch, objective),
            ALONE: lambda: measure_binned(alone, objective, ()),
            "`measure`": lambda: measure(batch, objective),
            **{name: way for name, way in peers.items() if way is not None},
            "`np.quantile`, 9 levels of one array": lambda: np.quantile(ready["log_ratio"], LEVELS[1:-1]),
        }
        spent = _spent(ways)
    yield f"MHPO, float32, {SHAPE[0]} sequences of {SHAPE[1]:,} tokens."
    yield ""
    yield f"| | CPU ms, median of {ROUNDS} | all of it ÷ this | log-ratio alone ÷ this | worst quantile error |"
    yield "|---|---|---|---|---|"
    found = {OURS: measure_binned(batch, objective).scalars, ALONE: measure_binned(alone, objective, ()).scalars}
    errors = {name: _worst(scalars, exact.scalars) for name, scalars in found.items()}
    errors |= {"`measure`": 0.0, "`np.quantile`, 9 levels of one array": 0.0}
    if peers["KLL sketch × 5"] is not None:
        errors["KLL sketch × 5"] = _worst(_kll_quantiles(ready), exact.scalars)
    for name in {**ways, **peers}:
        yield _row(name, spent, errors.get(name))


def _row(name: str, spent: Mapping[str, NDArray[np.float64]], error: float | None) -> str:
    if name not in spent:
        return f"| {name} | not installed | | | |"
    ratios = [float(np.median(spent[ours] / spent[name])) for ours in (OURS, ALONE)]
    worst = "" if error is None else f"{error:.2%}"
    return f"| {name} | {np.median(spent[name]):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {worst} |"


def _spent(ways: Mapping[str, Callable[[], object]]) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of CPU time of each way in each turn."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if turn:  # the first one warms up
                spent[name].append((time.process_time() - began) * 1e3)
    return {name: np.array(values) for name, values in spent.items()}


def _peers(ready: Ready, folder: str) -> dict[str, Callable[[], object] | None]:
    return {
        "`wandb.Histogram` × 5": _wandb(ready) if find_spec("wandb") else None,
        "TensorBoard `add_histogram` × 5": _tensorboard(ready, folder) if find_spec("tensorboard") else None,
        "KLL sketch × 5": _kll(ready) if find_spec("datasketches") else None,
    }


def _wandb(ready: Ready) -> Callable[[], object]:
    import wandb

    return lambda: [wandb.Histogram(values) for values in ready.values()]


def _tensorboard(ready: Ready, folder: str) -> Callable[[], object]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)
    return lambda: [writer.add_histogram(name, values, 0) for name, values in ready.items()]


def _sketch(values: NDArray[np.float32]) -> object:
    import datasketches

    sketch = datasketches.kll_floats_sketch(200)
    sketch.update(values)
    return sketch


def _kll(ready: Ready) -> Callable[[], object]:
    return lambda: [_sketch(values) for values in ready.values()]


def _kll_quantiles(ready: Ready) -> dict[str, float]:
    found = {}
    for name in ("log_ratio", "mismatch"):
        values = _sketch(ready[name]).get_quantiles(LEVELS)  # type: ignore[attr-defined]
        found |= {f"{name}_{level}": value for level, value in zip(QUANTILE_LEVELS, values, strict=True)}
    return found


def _worst(found: Mapping[str, float | int | None], exact: Mapping[str, float | int | None]) -> float:
    names = [f"{prefix}_{level}" for prefix in ("log_ratio", "mismatch") for level in QUANTILE_LEVELS]
    pairs = [(found.get(name), exact[name]) for name in names]
    return max(abs(f - e) / max(abs(e), 1e-3) for f, e in pairs if f is not None and e is not None)


def _ready(batch: TokenBatch, multiplier: torch.Tensor, norm: torch.Tensor) -> Ready:
    assert batch.logp_rollout is not None and batch.entropy is not None
    tensors = {
        "log_ratio": batch.logp_new - batch.logp_old, "mismatch": batch.logp_old - batch.logp_rollout,
        "entropy": batch.entropy, "logit_grad_norm": norm, "gradient_multiplier": multiplier,
    }  # fmt: skip
    return {name: values[batch.mask].float().numpy() for name, values in tensors.items()}


def _batch(rows: int, width: int) -> TokenBatch:
    """Synthetic shifts: normal, a tenth Laplace, 0.15 % with a heavy tail; one advantage per sequence."""
    rng = np.random.default_rng(0)
    shape = (rows, width)
    new = -rng.exponential(0.8, shape) - 1e-3
    shift = 0.05 * rng.standard_normal(shape)
    shift = np.where(rng.random(shape) < 0.1, rng.laplace(0, 0.2, shape), shift)
    shift = np.where(rng.random(shape) < 0.0015, 0.5 * rng.standard_t(1.8, shape), shift)
    old = np.minimum(new - shift, 0)
    fields = {
        "logp_new": new, "logp_old": old, "logp_rollout": old - 0.03 * rng.standard_t(3, shape),
        "entropy": rng.exponential(0.7, shape), "sum_p_squared": np.exp(2 * new) + 0.1 * (1 - np.exp(new)) ** 2,
    }  # fmt: skip
    return TokenBatch(
        **{name: torch.as_tensor(values, dtype=torch.float32) for name, values in fields.items()},
        advantage=torch.as_tensor(rng.standard_normal(rows), dtype=torch.float32),
        mask=torch.ones(shape, dtype=torch.bool),
    )
