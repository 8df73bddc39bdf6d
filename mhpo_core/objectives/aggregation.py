"""From per-token values to one number, by name.

Shape letters: B sequences, T response tokens. |y_i| trained tokens of sequence i, N = Σ|y_i|, n = non-empty sequences.

A token-mean over an accumulated batch is `token-sum` divided by the tokens of the whole batch (DAPO); the mean of the
micro-batches' own token-means is another number (BNPO).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mhpo_core.errors import ObjectiveError


def _token_mean(values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return values.sum() / mask.sum()


def _token_sum(values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return values.sum()


def _seq_mean_token_mean(values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    lengths = mask.sum(dim=1)
    return (values.sum(dim=1) / lengths.clamp(min=1)).sum() / (lengths > 0).sum()


def _seq_mean_token_sum(values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return values.sum() / (mask.sum(dim=1) > 0).sum()


def _seq_mean_token_sum_norm(values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return _seq_mean_token_sum(values, mask, None) / _length("seq-mean-token-sum-norm", scale)


def _trl_grpo(values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return (values.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def _trl_dr_grpo(values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return values.sum(dim=1).mean() / _length("trl-dr_grpo", scale)


def _length(mode: str, scale: float | None) -> float:
    if scale is None or not 0 < scale < float("inf"):
        raise ObjectiveError(
            f"aggregate: loss_scale = {scale!r}, {mode} needs the fixed length > 0 it divides by. "
            "Pass the maximal completion length; the padded width would change the loss with the padding."
        )
    return scale


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, float | None], Tensor]] = {
    "token-mean": _token_mean,
    "token-sum": _token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
    "trl-grpo": _trl_grpo,
    "trl-dr_grpo": _trl_dr_grpo,
}


def aggregate(values: Tensor, mask: Tensor, mode: str, loss_scale: float | None = None) -> Tensor:
    """Reduce (B, T) values to a scalar; masked positions and fully masked sequences do not count.

    Args:
        values: (B, T); masked positions may hold anything, also NaN.
        mask: (B, T), True (or 1) = counts.
        mode: token-mean 1/N · token-sum 1 · seq-mean-token-mean 1/(n·|y_i|) · seq-mean-token-sum 1/n ·
            seq-mean-token-sum-norm 1/(n·loss_scale) · trl-grpo and trl-dr_grpo as seq-mean-token-mean and
            seq-mean-token-sum-norm with all B sequences in place of n.
        loss_scale: the constant length that the norm modes divide by.

    Raises:
        ObjectiveError: unknown mode, or loss_scale missing or not > 0.

    Source: verl 0.9.1 `agg_loss`, without its 1e-8 in the denominators; TRL 1.16 for the last two, where a fully masked
    sequence lowers the loss.
    """
    if mode not in AGGREGATIONS:
        raise ObjectiveError(f"aggregate: unknown mode {mode!r}, valid are {', '.join(AGGREGATIONS)}.")
    mask = mask.bool()
    return AGGREGATIONS[mode](torch.where(mask, values, torch.zeros_like(values)), mask, loss_scale)
