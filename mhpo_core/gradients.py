"""Gradient and weight norms per parameter group and global, from the one pass that clipping makes anyway.

A DTensor (FSDP2, tensor parallel) is measured where it lies: every rank squares the norm of its own elements, and one
sum over the mesh adds up the squares of all gradients and weights together. Left out on purpose: pipeline parallelism,
where a rank knows the parameters of its own stage only and so measures and clips those alone.

Shape letters: P parameters.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mhpo_core.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.(?P<module>[^.]+)\.")
# torch.nn.utils.clip_grad_norm_ adds it to the norm; another value would scale differently
_EPSILON = 1e-6


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms before clipping.

    Args:
        total: norm over all parameters.
        by_group: group → norm of its gradient.
        weight_by_group: group → norm of its weights.
        nonfinite_by_group: group → parameters whose gradient norm is NaN or ±Inf.
        by_parameter: parameter → norm of its gradient.
    """

    total: float
    by_group: dict[str, float]
    weight_by_group: dict[str, float]
    nonfinite_by_group: dict[str, int]
    by_parameter: dict[str, float] = field(default_factory=dict)


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

    Args:
        named_parameters: every rank of a mesh gives the same names in the same order; a parameter that is no DTensor
            counts as equal on every rank.
    """
    trained = _trained(named_parameters)
    return _grouped(trained, _norms(trained))


@torch.no_grad()
def clip_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]], max_norm: float) -> GradientNorms:
    """Measure like `gradient_norms`, then multiply every gradient in place by min(1, max_norm / (‖g‖ + 1e-6)).

    Plain float32 and float64 gradients become, bit for bit, what `torch.nn.utils.clip_grad_norm_` makes of them; the
    norm of half-precision gradients is taken in float32, which is more exact. ‖g‖ = NaN makes every gradient NaN;
    ‖g‖ = Inf makes the finite ones 0 and the infinite ones NaN, and with max_norm = Inf all of them NaN: look at
    `total` before stepping.

    Args:
        named_parameters: see `gradient_norms`.
        max_norm: > 0; Inf leaves finite gradients as they are.

    Returns:
        the norms before clipping.

    Raises:
        ConfigError: max_norm is NaN or not above 0.

    Source: torch.nn.utils.clip_grad_norm_ with error_if_nonfinite=False.
    """
    if not max_norm > 0:
        raise ConfigError(
            f"clip_gradients: got max_norm {max_norm}, allowed is a number above 0 or infinity. "
            "Give infinity to measure without clipping."
        )
    trained = _trained(named_parameters)
    norms = _norms(trained)
    # the local elements of the gradients themselves: scaling commutes with every placement, Partial too
    gradients = [_local(p.grad) for _, p in trained if p.grad is not None]
    # the roundings of clip_grad_norm_
    total = torch.linalg.vector_norm(norms[0].to(_accumulator(gradients)))
    factor = torch.clamp(max_norm / (total + _EPSILON), max=1.0)
    for rows in _alike(gradients):
        torch._foreach_mul_([gradients[i] for i in rows], factor.to(gradients[rows[0]].device))
    return _grouped(trained, norms)


class _Part(NamedTuple):
    """What this rank holds of a tensor.

    Args:
        elements: those that lie here.
        mesh: the ranks that hold the tensor; None = it is a plain one.
        split: per dimension of the mesh, whether the ranks hold different elements; else they hold copies.
    """

    elements: Tensor
    mesh: DeviceMesh | None
    split: tuple[bool, ...]


def _trained(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    # a DTensor may lack its gradient on this rank alone; leaving it out here would break the sum over the mesh
    return [
        (n, p) for n, p in named_parameters if p.grad is not None or (p.requires_grad and _as_dtensor(p) is not None)
    ]


def _norms(trained: Sequence[tuple[str, nn.Parameter]]) -> Tensor:
    """(2, P) float64: the norm of every gradient, of every weight; 0 for a gradient that no rank has."""
    if not trained:
        return torch.zeros(2, 0, dtype=torch.float64)
    weights = [_part(p) for _, p in trained]
    gradients = [
        w._replace(elements=w.elements.new_zeros(())) if p.grad is None else _part(p.grad)
        for (_, p), w in zip(trained, weights, strict=True)
    ]
    parts = gradients + weights
    norms = _norms_here([part.elements for part in parts])
    for mesh in dict.fromkeys(part.mesh for part in parts if part.mesh is not None):
        rows = [i for i, part in enumerate(parts) if part.mesh == mesh]
        summed = _norms_over(mesh, [norms[i] for i in rows], [parts[i].split for i in rows])
        for i, norm in zip(rows, summed.unbind(), strict=True):
            norms[i] = norm
    device = norms[0].device
    return torch.stack([norm.to(device) for norm in norms]).double().view(2, -1)


def _norms_here(tensors: Sequence[Tensor]) -> list[Tensor]:
    norms = [tensors[0]] * len(tensors)
    for rows in _alike(tensors):
        alike = [tensors[i] for i in rows]
        # at least float32, whatever the tensors are
        for i, norm in zip(rows, torch._foreach_norm(alike, 2, dtype=_accumulator(alike)), strict=True):
            norms[i] = norm
    return norms


def _norms_over(mesh: DeviceMesh, norms: Sequence[Tensor], splits: Sequence[tuple[bool, ...]]) -> Tensor:
    """Norms over all ranks of the mesh, float64: √Σ n², with one sum per mesh dimension that splits any tensor."""
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

    coordinate = mesh.get_coordinate()
    summed = [any(along) for along in zip(*splits, strict=True)]
    if coordinate is None or not any(summed):
        return torch.stack(list(norms)).double()
    zero = torch.zeros_like(norms[0])
    # of equal copies along a dimension that is summed, the first counts
    counted = [
        norm if all(s or not along or at == 0 for s, along, at in zip(split, summed, coordinate, strict=True)) else zero
        for norm, split in zip(norms, splits, strict=True)
    ]
    squares = torch.stack(counted).double().square()
    placements: list[Placement] = [Partial() if along else Replicate() for along in summed]
    return DTensor.from_local(squares, mesh, placements, run_check=False).full_tensor().sqrt()


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    # torch._foreach_ is one fast kernel only for tensors of one device and dtype
    rows: dict[object, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        rows[tensor.device, tensor.dtype].append(i)
    return list(rows.values())


def _accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _part(tensor: Tensor) -> _Part:
    spread = _as_dtensor(tensor)
    if spread is None:
        return _Part(tensor, None, ())
    if any(p.is_partial() for p in spread.placements):
        from torch.distributed.tensor import Replicate

        # the norm of a sum is not known from its terms
        spread = spread.redistribute(placements=[Replicate() if p.is_partial() else p for p in spread.placements])
    return _Part(spread.to_local(), spread.device_mesh, tuple(not p.is_replicate() for p in spread.placements))


def _local(tensor: Tensor) -> Tensor:
    spread = _as_dtensor(tensor)
    return tensor if spread is None else spread.to_local()


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    # importing it takes almost a second, and while nobody has, there is none
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def _grouped(trained: Sequence[tuple[str, nn.Parameter]], norms: Tensor) -> GradientNorms:
    gradients, weights = norms.tolist()
    gradient_squares: dict[str, float] = defaultdict(float)
    weight_squares: dict[str, float] = defaultdict(float)
    nonfinite: dict[str, int] = defaultdict(int)
    by_parameter: dict[str, float] = {}
    for (name, parameter), gradient, weight in zip(trained, gradients, weights, strict=True):
        if parameter.grad is None and gradient == 0:
            continue
        group = parameter_group(name)
        by_parameter[name] = gradient
        gradient_squares[group] += gradient * gradient
        weight_squares[group] += weight * weight
        nonfinite[group] += not _is_finite(gradient)
    return GradientNorms(
        total=sum(gradient_squares.values()) ** 0.5,
        by_group={g: s**0.5 for g, s in gradient_squares.items()},
        weight_by_group={g: s**0.5 for g, s in weight_squares.items()},
        nonfinite_by_group=dict(nonfinite),
        by_parameter=by_parameter,
    )


def _is_finite(value: float) -> bool:
    return value - value == 0
