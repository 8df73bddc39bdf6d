"""Gradient and weight norms per parameter group and global, from the one pass that clipping makes anyway."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.(?P<module>[^.]+)\.")


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms before clipping.

    Args:
        total: norm over all parameters.
        by_group: group → norm of its gradient.
        weight_by_group: group → norm of its weights.
        nonfinite_by_group: group → parameters whose gradient norm is NaN or ±Inf.
    """

    total: float
    by_group: dict[str, float]
    weight_by_group: dict[str, float]
    nonfinite_by_group: dict[str, int]


def parameter_group(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `model.layers.3.mlp`; outside a layer, the parameter's module."""
    layer = _LAYER.match(name)
    if layer:
        return f"{layer['layer']}.{layer['module']}"
    return name.rsplit(".", 1)[0]


@torch.no_grad()
def gradient_norms(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> GradientNorms:
    """Norms of the gradients that are there now, after accumulation and before clipping.

    Parameters without a gradient are left out. A NaN or ±Inf gradient gives a NaN or ±Inf norm and is counted.
    """
    present = [(n, p, p.grad) for n, p in named_parameters if p.grad is not None]
    if not present:
        return GradientNorms(0.0, {}, {}, {})
    gradients = torch.stack(_norms([g for _, _, g in present])).tolist()
    weights = torch.stack(_norms([p for _, p, _ in present])).tolist()
    gradient_squares: dict[str, float] = defaultdict(float)
    weight_squares: dict[str, float] = defaultdict(float)
    nonfinite: dict[str, int] = defaultdict(int)
    for (name, _, _), gradient, weight in zip(present, gradients, weights, strict=True):
        group = parameter_group(name)
        gradient_squares[group] += gradient**2
        weight_squares[group] += weight**2
        nonfinite[group] += not _is_finite(gradient)
    return GradientNorms(
        total=sum(gradient_squares.values()) ** 0.5,
        by_group={g: s**0.5 for g, s in gradient_squares.items()},
        weight_by_group={g: s**0.5 for g, s in weight_squares.items()},
        nonfinite_by_group=dict(nonfinite),
    )


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    # at least float32, whatever the tensors are; a norm cannot be narrowed
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [n.double() for n in torch._foreach_norm(tensors, 2, dtype=dtype)]


def _is_finite(value: float) -> bool:
    return value - value == 0
