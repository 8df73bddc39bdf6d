"""Group-relative advantages.

Shape letters: B sequences, G group size; groups are consecutive rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhpo_core.errors import BatchError

TRL_STD_EPSILON = 1e-4  # trl 1.16 grpo_trainer.py; verl 0.9 uses 1e-6


def group_advantages(
    reward: Tensor, group_size: int, *, normalize_std: bool = True, ddof: int = 1, epsilon: float = TRL_STD_EPSILON
) -> Tensor:
    """A = (reward − group mean) / (group std + epsilon).

    A group whose rewards are all equal gets advantage exactly 0 and trains nothing.

    Args:
        reward: (B,), reward units, B a multiple of group_size.
        group_size: G ≥ 1 completions per prompt, in consecutive rows.
        normalize_std: divide by the group's standard deviation (GRPO); False leaves it out (Dr. GRPO).
        ddof: 1 = divide the variance by G−1, as TRL and verl do; 0 = by G.
        epsilon: added to the standard deviation.

    Returns:
        (B,), dimensionless with normalize_std, else in reward units.

    Raises:
        BatchError: reward is not (B,) or not floating-point, or B is not a multiple of group_size.

    Source: Shao et al. 2024, arXiv 2402.03300, eq. 4; epsilon and ddof as in TRL 1.16.
    """
    if reward.dim() != 1 or group_size < 1 or reward.numel() % group_size:
        raise BatchError(
            f"group_advantages: reward has shape {tuple(reward.shape)} for groups of {group_size}, allowed is (B,) "
            "with B a multiple of the group size. Sample the same number of completions for every prompt."
        )
    if not reward.is_floating_point():
        raise BatchError(
            f"group_advantages: reward has dtype {reward.dtype}, allowed are floating-point dtypes. "
            "Convert it, for instance with reward.float()."
        )
    grouped = reward.reshape(-1, group_size)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    # the mean of equal float32 rewards can miss them by a rounding error, which a tiny std would blow up to 0.05
    centred = torch.where((grouped == grouped[:, :1]).all(dim=1, keepdim=True), 0.0, centred)
    if normalize_std and group_size > ddof:
        centred = centred / (grouped.std(dim=1, correction=ddof, keepdim=True) + epsilon)
    return centred.reshape(-1)
