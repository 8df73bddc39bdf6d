"""The tokens of a batch as an objective sees them: one dtype, nothing at masked positions, no graph.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mhpo_core.batch import TokenBatch

# exp(x) leaves the float32 range above 88.7228 and the float64 range above 709.7827.
LARGEST_EXPONENT = {torch.float32: 88.72, torch.float64: 709.78}


@dataclass(frozen=True)
class Tokens:
    """Inputs of `Objective.evaluate`, all (B, T) in the dtype that is computed in; masked positions hold 0.

    Args:
        logp_new, logp_old: nats.
        log_ratio: logp_new − logp_old, nats, never clamped.
        exponent: log_ratio, clamped from above to what exp can hold in that dtype.
        advantage: reward units.
        mask: True = the token trains.
        log_mismatch: logp_old − logp_rollout, nats; None where the batch has no logp_rollout.
        result_dtype: what the terms are rounded to.
    """

    logp_new: Tensor
    logp_old: Tensor
    log_ratio: Tensor
    exponent: Tensor
    advantage: Tensor
    mask: Tensor
    log_mismatch: Tensor | None = None
    result_dtype: torch.dtype = torch.float64

    @staticmethod
    def of(batch: TokenBatch, dtype: torch.dtype | None = None) -> Tokens:
        """The batch's tokens, computed in float64 unless told otherwise.

        Masked positions are overwritten before anything is computed from them, so a NaN there stays there.

        Args:
            dtype: to compute in. None is float64, because the ratio of a float32 batch can leave the float32 range
                where ratio times advantage is inside it; float32 on devices without float64.
        """
        result_dtype = Tokens.result_dtype_of(batch)
        if dtype is None:
            dtype = result_dtype if batch.logp_new.device.type == "mps" else torch.float64

        def trained(values: Tensor) -> Tensor:
            return torch.where(batch.mask, values.detach().to(dtype), 0.0)

        logp_new, logp_old = trained(batch.logp_new), trained(batch.logp_old)
        log_ratio = logp_new - logp_old
        rollout = batch.logp_rollout
        limit = LARGEST_EXPONENT[dtype]
        return Tokens(
            logp_new=logp_new,
            logp_old=logp_old,
            log_ratio=log_ratio,
            exponent=log_ratio.clamp(max=limit),
            advantage=trained(batch.advantage),
            mask=batch.mask,
            log_mismatch=None if rollout is None else logp_old - trained(rollout),
            result_dtype=result_dtype,
        )

    @staticmethod
    def result_dtype_of(batch: TokenBatch) -> torch.dtype:
        """float64 where a log-probability is, else float32."""
        doubles = torch.float64 in (batch.logp_new.dtype, batch.logp_old.dtype)
        return torch.float64 if doubles else torch.float32

    def along(self, logp_new: Tensor, advantage: Tensor) -> Tokens:
        """The same tokens with everything that depends on these log-probabilities computed from them again."""
        log_ratio = logp_new - self.logp_old
        limit = LARGEST_EXPONENT[log_ratio.dtype]
        exponent = log_ratio.clamp(max=limit)
        return replace(self, logp_new=logp_new, log_ratio=log_ratio, exponent=exponent, advantage=advantage)

    @property
    def too_large(self) -> Tensor:
        """(B, T) bool: the ratio does not fit the dtype of the result."""
        return self.overflows(self.log_ratio)

    def overflows(self, exponent: Tensor) -> Tensor:
        """True where exp(exponent) does not fit the dtype of the result."""
        return exponent > LARGEST_EXPONENT[self.result_dtype]

    def bounded_exp(self, exponent: Tensor) -> Tensor:
        """exp, with the exponent clamped from above to what the dtype that is computed in can hold."""
        return exponent.clamp(max=LARGEST_EXPONENT[exponent.dtype]).exp()

    def times_advantage(self, weight: Tensor) -> Tensor:
        """weight · A, and 0 where A is 0 whatever the weight is."""
        return torch.where(self.advantage == 0, 0.0, product(weight, self.advantage))

    def score_function(self, weight: Tensor) -> dict[str, Tensor]:
        """Terms of J = stop_gradient(weight)·A·logp_new; a weight of 0 drops the token, also at logp_new = −Inf."""
        value = torch.where(weight == 0, 0.0, weight * self.logp_new)
        return {"surrogate": self.times_advantage(value), "gradient_multiplier": weight}

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sum over the trained tokens of each sequence, repeated at each of its positions."""
        return values.sum(dim=1, keepdim=True).expand_as(values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Mean over the trained tokens of each sequence, repeated at each of its positions; 0 where none trains."""
        return self.sequence_sum(values) / self.mask.sum(dim=1, keepdim=True).clamp(min=1)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right; what two finite factors overflow to is the largest finite value."""
    result = left * right
    overflowed = result.isinf() & left.isfinite() & right.isfinite()
    return torch.where(overflowed, result.sign() * torch.finfo(result.dtype).max, result)
