"""Faults that a run can be given on purpose, so that alarms and objectives can be tried on a known cause.

One class per fault and one entry in FAULTS. Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    # True: the trainer sees another reward than the task's, and records the task's as the metric true_reward_mean
    has_proxy: ClassVar[bool] = False

    def report(self, logp: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        """The log-probabilities that the sampler reports, given the true ones, (B, T), nats."""
        return logp

    def reward(self, reward: Tensor, completions: Sequence[Sequence[int]], iteration: int) -> Tensor:
        """The reward that the trainer sees, given the task's own, (B,), and the B completions with their end token."""
        return reward

    def advantage(self, advantage: Tensor, completions: Sequence[Sequence[int]], iteration: int) -> Tensor:
        """The advantages that train, given the right ones, (B,)."""
        return advantage

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
        return _misreported(logp, self.share, self.sigma, generator)


@dataclass(frozen=True)
class MismatchGrowth(NoFault):
    """[fault] name = "mismatch-growth": the reported log-probabilities drift away from the true ones exponentially.

    In iteration i ≥ at a share of the tokens gets an error N(0, s²), s = min(cap, sigma·exp(rate·(i − at))): an engine
    whose difference to the trainer feeds on itself.

    Args:
        at: first iteration that is disturbed.
        share: probability that a token is.
        sigma: standard deviation of the error in that iteration, nats.
        rate: of its growth, per iteration.
        cap: largest standard deviation, nats.
    """

    name: ClassVar[str] = "mismatch-growth"
    at: int = setting(60, low=0)
    share: float = setting(1.0, low=0, high=1)
    sigma: float = setting(0.01, above=0)
    rate: float = setting(0.05, low=0)
    cap: float = setting(5.0, above=0)

    def report(self, logp: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        if iteration < self.at:
            return logp
        sigma = _grown(self.sigma, self.rate, iteration - self.at, self.cap)
        return _misreported(logp, self.share, sigma, generator)


@dataclass(frozen=True)
class NonFinite(NoFault):
    """[fault] name = "nan": the sampler reports NaN for a share of the tokens, as an engine whose float16 overflows.

    In iteration i ≥ at that share is min(1, share·exp(rate·(i − at))), so that single steps are hit before all are.

    Args:
        at: first iteration that is disturbed.
        share: probability that a token is in that iteration.
        rate: of its growth, per iteration.
    """

    name: ClassVar[str] = "nan"
    at: int = setting(120, low=0)
    share: float = setting(1e-4, above=0, high=1)
    rate: float = setting(0.1, low=0)

    def report(self, logp: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        if iteration < self.at:
            return logp
        share = _grown(self.share, self.rate, iteration - self.at, 1.0)
        hit = torch.rand(logp.shape, generator=generator) < share
        return torch.where(hit.to(logp.device), math.nan, logp)


@dataclass(frozen=True)
class RewardHack(NoFault):
    """[fault] name = "reward-hack": a token earns a bonus wherever it stands, and more than a right answer does.

    The trainer sees reward + bonus·(share of the completion's tokens that are this token).

    Args:
        at: first iteration with the bonus.
        token: id of the token.
        bonus: of a completion that is nothing but the token, reward units.
    """

    name: ClassVar[str] = "reward-hack"
    has_proxy: ClassVar[bool] = True
    at: int = setting(100, low=0)
    token: int = setting(9, low=0)
    bonus: float = setting(3.0)

    def reward(self, reward: Tensor, completions: Sequence[Sequence[int]], iteration: int) -> Tensor:
        if iteration < self.at:
            return reward
        share = [list(c).count(self.token) / len(c) for c in completions]
        return reward + self.bonus * torch.tensor(share, dtype=reward.dtype, device=reward.device)


@dataclass(frozen=True)
class LengthBias(NoFault):
    """[fault] name = "length-bias": long completions are preferred, whatever their reward.

    A + bias·z, z = (length − mean) / max(std, 1 token) over the iteration, held to ±3: a shaping term or a wrong
    normalizer that the reported reward does not show.

    Args:
        at: first iteration with the bias.
        bias: in units of the advantage.
    """

    name: ClassVar[str] = "length-bias"
    at: int = setting(60, low=0)
    bias: float = setting(1.0)

    def advantage(self, advantage: Tensor, completions: Sequence[Sequence[int]], iteration: int) -> Tensor:
        if iteration < self.at:
            return advantage
        length = torch.tensor([len(c) for c in completions], dtype=advantage.dtype, device=advantage.device)
        z = (length - length.mean()) / length.std(correction=0).clamp(min=1.0)
        return advantage + self.bias * z.clamp(-3.0, 3.0)


@dataclass(frozen=True)
class LrSpike(NoFault):
    """[fault] name = "lr-spike": the learning rate is multiplied by `factor` from iteration `at` on."""

    name: ClassVar[str] = "lr-spike"
    at: int = setting(100, low=0)
    factor: float = setting(5.0, above=0)

    def lr_factor(self, iteration: int) -> float:
        return self.factor if iteration >= self.at else 1.0


FAULTS: dict[str, type[NoFault]] = {
    cls.name: cls for cls in (NoFault, Mismatch, MismatchGrowth, NonFinite, RewardHack, LengthBias, LrSpike)
}


def _misreported(logp: Tensor, share: float, sigma: float, generator: torch.Generator) -> Tensor:
    hit = torch.rand(logp.shape, generator=generator) < share
    error = torch.where(hit, sigma * torch.randn(logp.shape, generator=generator), 0.0)
    return logp + error.to(logp.device)


def _grown(start: float, rate: float, iterations: int, cap: float) -> float:
    """min(cap, start·exp(rate·iterations)), without overflow."""
    return start * math.exp(min(rate * iterations, math.log(cap / start)))
