"""Telemetry pass: nanoseconds per token against plain torch and against a copy of its inputs

All in one run and in turns, so that a noisy machine is noisy for all of them. "Plain torch" is what one writes without
this package: pick the trained tokens, then the same ratios, penalties, sums, histograms and outliers with torch's own
functions. On a CUDA device the whole table is repeated there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mhpo_core import TokenBatch, objectives
from mhpo_core.telemetry import accumulate, measure

SHAPES = ((256, 5), (128, 64), (500, 2000))
CUDA_SHAPE = (5000, 2000)
ROUNDS = 7


def run() -> Iterator[str]:
    """One table per device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        torch.set_num_threads(1)
        yield f"Device {device}, one torch thread, MHPO, float32, ns per token (median of {ROUNDS} turns):"
        yield ""
        yield "| tokens | copy of inputs | plain torch | eager | compiled | with exact quantiles | compiled ÷ plain |"
        yield "|---|---|---|---|---|---|---|"
        for shape in (*SHAPES, *([CUDA_SHAPE] if device == "cuda" else [])):
            yield _row(_batch(*shape, device))
        yield ""


def _row(batch: TokenBatch) -> str:
    objective = objectives.create("mhpo")
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: [t.clone() for t in _inputs(batch)],
        "plain": lambda: _plain(batch),
        "eager": lambda: accumulate(batch, objective),
        "compiled": lambda: accumulate(batch, objective, compiled=True),
        "measure": lambda: measure(batch, objective),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        _seconds(way, batch)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            spent[name].append(_seconds(way, batch))
    n = batch.mask.numel()
    each = {name: float(np.median(values)) / n * 1e9 for name, values in spent.items()}
    ratio = float(np.median(np.array(spent["compiled"]) / np.array(spent["plain"])))
    return f"| {n:,} | " + " | ".join(f"{v:.1f}" for v in each.values()) + f" | {ratio:.2f} |"


def _seconds(way: Callable[[], object], batch: TokenBatch) -> float:
    cuda = batch.mask.is_cuda
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    way()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _inputs(batch: TokenBatch) -> list[Tensor]:
    tensors = (batch.logp_new, batch.logp_old, batch.logp_rollout, batch.advantage, batch.mask, batch.entropy)
    return [t for t in (*tensors, batch.sum_p_squared) if t is not None]


def _batch(rows: int, width: int, device: str) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> Tensor:
        return (scale * torch.randn(rows, width, generator=generator)).to(device)

    logp = -torch.rand(rows, width, generator=generator).to(device) * 3 - 0.01
    return TokenBatch(
        logp_new=logp,
        logp_old=logp + normal(0.2),
        advantage=normal(1.0)[:, 0],
        mask=(torch.rand(rows, width, generator=generator) < 0.9).to(device),
        logp_rollout=logp + normal(0.1),
        entropy=normal(1.0).abs(),
        sum_p_squared=(2 * logp).exp() + 0.01,
    )


@torch.no_grad()
def _plain(batch: TokenBatch) -> list[object]:
    """The same quantities, written straight away."""
    m = batch.mask
    new, old, rollout = batch.logp_new[m], batch.logp_old[m], batch.logp_rollout[m]
    advantage, entropy, collision = batch.advantage[m], batch.entropy[m], batch.sum_p_squared[m]
    x = new - old
    psi = 1.5 * torch.tanh(x / 1.5)
    positive = torch.nn.functional.softplus(psi) ** 1.5
    negative = (torch.nn.functional.softplus(-psi) / 0.8) ** 2.0
    survival = torch.exp(-positive - negative)
    multiplier = torch.exp(psi) * survival * (1 - torch.tanh(x / 1.5) ** 2)
    weight = (advantage * multiplier).abs()
    norm = weight * (1 - 2 * new.exp() + collision).clamp(min=0).sqrt()
    ratio, mismatch = x.exp(), old - rollout
    found: list[object] = [v.mean().item() for v in (psi, positive, negative, survival, multiplier, norm, entropy)]
    found += [(ratio - 1 - x).mean().item(), (mismatch.exp() - 1 - mismatch).mean().item(), -x.mean().item()]
    found += [(ratio.sum() ** 2 / (ratio**2).sum()).item(), norm.max().item()]
    found += [(~torch.stack([x, advantage, new]).isfinite()).any(0).sum().item(), (x > 88).sum().item()]
    found += [((multiplier < 0.0265) & (advantage * x < 0)).sum().item(), mismatch.min().item(), mismatch.max().item()]
    for side in (advantage > 0, advantage < 0, advantage == 0):
        here = x[side]
        if here.numel():
            found += [here.min().item(), here.max().item(), *((here**k).sum().item() for k in (1, 2, 3, 4))]
            found.append(here.abs().topk(min(32, here.numel())).indices)
        for values in (x, mismatch, entropy, norm):
            found.append(torch.histc(values[side], bins=291, min=-16, max=16))
            if values is x:
                edges = torch.linspace(-16, 16, 292, device=x.device)
                slot = torch.bucketize(here, edges)
                found += [torch.bincount(slot, w[side], minlength=293) for w in (weight, advantage.abs())]
    return found
