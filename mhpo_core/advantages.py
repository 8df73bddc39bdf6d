"""Group-relative advantages.

Shape letters: B sequences, G group size; groups are consecutive rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhpo_core.errors import BatchError

TRL_STD_EPSILON = 1e-4  # trl 1.16 grpo_trainer.py; verl 0.9 uses 1e-6


def group_advantages(
    reward: Tensor,
    group_size: int,
    *,
    normalize_std: bool = True,
    std_over: str = "group",
    ddof: int = 1,
    epsilon: float = TRL_STD_EPSILON,
) -> Tensor:
    """A = (reward − group mean) / (std + epsilon).

    A group whose rewards are all equal gets advantage exactly 0 and trains nothing. A group of one does too; verl 0.9.1
    gives it its raw reward.

    Args:
        reward: (B,), reward units, B a multiple of group_size.
        group_size: G ≥ 1 completions per prompt, in consecutive rows.
        normalize_std: divide by a standard deviation (GRPO); False leaves it out (Dr. GRPO).
        std_over: "group" = each group's own standard deviation; "batch" = that of all rewards, as TRL's
            scale_rewards="batch".
        ddof: 1 = divide the variance by n−1, as TRL and verl do; 0 = by n.
        epsilon: added to the standard deviation.

    Returns:
        (B,), dimensionless with normalize_std, else in reward units.

    Raises:
        BatchError: reward is not (B,) or not floating-point, B is not a multiple of group_size, or an unknown std_over.

    Source: Shao et al. 2024, arXiv 2402.03300, eq. 4; epsilon and ddof as in TRL 1.16.
    """
    grouped = _grouped(reward, group_size)
    if std_over not in ("group", "batch"):
        raise BatchError(f"group_advantages: std_over = {std_over!r}, allowed are group, batch. Pick one of them.")
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    # the mean of equal float32 rewards can miss them by a rounding error, which a tiny std would blow up to 0.05
    centred = torch.where((grouped == grouped[:, :1]).all(dim=1, keepdim=True), 0.0, centred)
    if normalize_std and std_over == "batch" and reward.numel() > ddof:
        centred = centred / (reward.std(correction=ddof) + epsilon)
    elif normalize_std and std_over == "group" and group_size > ddof:
        centred = centred / (grouped.std(dim=1, correction=ddof, keepdim=True) + epsilon)
    return centred.reshape(-1)


def leave_one_out_advantages(reward: Tensor, group_size: int) -> Tensor:
    """RLOO: A = reward − mean reward of the other completions of the group.

    Args:
        reward: (B,), reward units, B a multiple of group_size.
        group_size: G ≥ 2 completions per prompt, in consecutive rows.

    Returns:
        (B,), reward units.

    Raises:
        BatchError: as `group_advantages`, or a group of one.

    Source: Ahmadian et al. 2024, arXiv 2402.14740.
    """
    grouped = _grouped(reward, group_size)
    if group_size < 2:
        raise BatchError("leave_one_out_advantages: group_size = 1, at least 2 are needed. Sample more completions.")
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group_size - 1)
    return (grouped - others).reshape(-1)


def _grouped(reward: Tensor, group_size: int) -> Tensor:
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
    return reward.reshape(-1, group_size)
