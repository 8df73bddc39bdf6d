"""Faults that a run can be given on purpose, so that alarms and objectives can be tried on a known cause.

One class per fault and one entry in FAULTS. Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhpo_core.training.validation import Variant, setting


@dataclass(frozen=True)
class NoFault(Variant):
    """[fault] name = "none": nothing is disturbed; also the base of the faults."""

    section: ClassVar[str] = "[fault]"
    name: ClassVar[str] = "none"

    def report(self, logp: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        """The log-probabilities that the sampler reports, given the true ones, (B, T), nats."""
        return logp

    def lr_factor(self, iteration: int) -> float:
        """What the learning rate is multiplied by in this iteration."""
        return 1.0


@dataclass(frozen=True)
class Mismatch(NoFault):
    """[fault] name = "mismatch": the sampler misreports a share of its log-probabilities by N(0, sigma²).

    It stands for an inference engine whose numbers differ from the trainer's in a heavy tail. A reported value may
    exceed 0, as it did in verl issue 2656.

    Args:
        at: first iteration that is disturbed.
        share: probability that a token is.
        sigma: standard deviation of the error, nats.
    """

    name: ClassVar[str] = "mismatch"
    at: int = setting(120, low=0)
    share: float = setting(0.02, low=0, high=1)
    sigma: float = setting(5.0, low=0)

    def report(self, logp: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        if iteration < self.at:
            return logp
        hit = torch.rand(logp.shape, generator=generator) < self.share
        error = torch.where(hit, self.sigma * torch.randn(logp.shape, generator=generator), 0.0)
        return logp + error.to(logp.device)


@dataclass(frozen=True)
class LrSpike(NoFault):
    """[fault] name = "lr-spike": the learning rate is multiplied by `factor` from iteration `at` on."""

    name: ClassVar[str] = "lr-spike"
    at: int = setting(100, low=0)
    factor: float = setting(5.0, above=0)

    def lr_factor(self, iteration: int) -> float:
        return self.factor if iteration >= self.at else 1.0


FAULTS: dict[str, type[NoFault]] = {cls.name: cls for cls in (NoFault, Mismatch, LrSpike)}
