"""What follows from MHPO's hyperparameters: found numerically on the multiplier itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MhpoFacts:
    """Numbers of one MHPO objective; log-ratios in nats.

    Args:
        multiplier_on_policy: M at ratio 1.
        hazard_on_policy: ζ at ratio 1; None without a hazard.
        largest_multiplier: sup M over all ratios; +Inf if M does not come down again, or exceeds float64.
        largest_at: log-ratio where M is largest; +Inf with it.
        half_width: log-ratios between which M ≥ sup M / 2 around the largest; ±Inf where it never falls below.
        paper_bound: e^c, the bound of the paper's Theorem 1.
        sign_flip: smallest log-ratio > 0 from which M would be negative without the stop-gradient, None if nowhere.
        learning_rate_factor: M at ratio 1 against GRPO's 1, the factor on the gradient of on-policy tokens. Adam
            divides a constant factor out, plain SGD does not.
    """

    multiplier_on_policy: float
    hazard_on_policy: float | None
    largest_multiplier: float
    largest_at: float
    half_width: tuple[float, float]
    paper_bound: float
    sign_flip: float | None
    learning_rate_factor: float


def facts(multiplier: Curve, hazard_slope: Curve, c: float, hazard_on_policy: float | None) -> MhpoFacts:
    """Searches |log r| ≤ max(50·c, 10⁴), refined to float64 accuracy.

    Args:
        multiplier: M of a vector of log-ratios, A > 0.
        hazard_slope: ∂ζ/∂ψ of a vector of log-ratios; above 1 the gradient through ζ outweighs that through ψ.
        c: half-width of the modulator, nats.
        hazard_on_policy: ζ at ratio 1.
    """
    end = max(50 * c, 1e4)
    # dense around ratio 1, where a narrow modulator has all its structure
    grid = min(c, 1.0) * torch.sinh(torch.linspace(-1, 1, 20_001, dtype=torch.float64) * math.asinh(end / min(c, 1.0)))
    values = multiplier(grid)
    top = int(values.argmax())
    unbounded = top == len(grid) - 1 or float(values[top]) > 1e307
    largest_at = math.inf if unbounded else _zoom_to_top(multiplier, float(grid[top - 1]), float(grid[top + 1]))
    largest = math.inf if unbounded else float(multiplier(torch.tensor([largest_at], dtype=torch.float64)))

    def is_low(x: Tensor) -> Tensor:
        return multiplier(x) < largest / 2

    on_policy = float(multiplier(torch.zeros(1, dtype=torch.float64)))
    return MhpoFacts(
        multiplier_on_policy=on_policy,
        hazard_on_policy=hazard_on_policy,
        largest_multiplier=largest,
        largest_at=largest_at,
        half_width=(
            -_first(lambda x: is_low(-x), -grid.flip(0), -largest_at, math.inf),
            _first(is_low, grid, largest_at, math.inf),
        ),
        paper_bound=math.exp(c) if c < 709 else math.inf,
        sign_flip=_first(lambda x: hazard_slope(x) > 1, grid, 0.0, None),
        learning_rate_factor=on_policy,
    )


def _zoom_to_top(curve: Curve, low: float, high: float) -> float:
    """Place of the only maximum between low and high: where the slope, a difference, changes sign."""
    # a maximum is flat: comparing values finds its place only to the root of the rounding error
    offsets = (high - low) / 2 * torch.tensor([-2, -1, 1, 2], dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        values = curve(middle + offsets).tolist()
        rises = 8 * (values[2] - values[1]) > values[3] - values[0]  # slope to fourth order
        low, high = (middle, high) if rises else (low, middle)
    return (low + high) / 2


def _first(condition: Curve, grid: Tensor, start: float, otherwise: Any) -> Any:
    """Smallest x > start where the condition begins to hold."""
    beyond = grid[grid > start]
    holds = condition(beyond).nonzero().ravel() if len(beyond) else beyond
    if not len(holds):
        return otherwise
    index = int(holds[0])
    low, high = (float(beyond[index - 1]) if index else start), float(beyond[index])
    for _ in range(60):
        middle = (low + high) / 2
        if bool(condition(torch.tensor([middle], dtype=torch.float64))):
            high = middle
        else:
            low = middle
    return high
