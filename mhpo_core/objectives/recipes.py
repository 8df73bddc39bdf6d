"""Recipes: an objective, an aggregation and the advantages that were published together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from mhpo_core.batch import TokenBatch
from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives.base import Objective
from mhpo_core.objectives.registry import create


@dataclass(frozen=True)
class Recipe:
    """A published combination; `recipe(name)` gives it.

    Args:
        name: key of RECIPES.
        objective: the objective.
        aggregation: name for `aggregate`.
        normalize_std: group advantages are divided by the group's standard deviation.
        source: who defines the combination.
    """

    name: str
    objective: Objective
    aggregation: str
    normalize_std: bool
    source: str

    def loss(self, batch: TokenBatch, loss_scale: float | None = None) -> Tensor:
        """The objective's loss with the recipe's aggregation; see `Objective.loss`."""
        return self.objective.loss(batch, self.aggregation, loss_scale)


@dataclass(frozen=True)
class _Row:
    objective: str
    aggregation: str
    source: str
    normalize_std: bool = True
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


RECIPES: dict[str, _Row] = {
    "reinforce": _Row("reinforce", "seq-mean-token-sum", "Williams 1992"),
    "is_pg": _Row("is_pg", "token-mean", "no bound, the baseline that collapses"),
    "grpo": _Row("ppo_clip", "seq-mean-token-mean", "arXiv 2402.03300; TRL loss_type=grpo"),
    "bnpo": _Row("ppo_clip", "token-mean", "TRL loss_type=bnpo; the mean is over the local micro-batch"),
    "dr_grpo": _Row("ppo_clip", "trl-dr_grpo", "arXiv 2503.20783; TRL loss_type=dr_grpo", normalize_std=False),
    "dapo": _Row("dapo_clip", "token-mean", "arXiv 2503.14476; the mean is over the global batch"),
    "dual_clip": _Row("dual_clip", "token-mean", "verl 0.9.1 `vanilla`"),
    "two_sided": _Row("two_sided_clip", "token-mean", "INTELLECT-2, arXiv 2505.07291"),
    "cispo": _Row("cispo", "token-mean", "MiniMax-M1, arXiv 2506.13585; TRL loss_type=cispo"),
    "cispo_verl": _Row("cispo_verl", "token-mean", "verl 0.9.1 defaults"),
    "sapo": _Row("sapo", "seq-mean-token-mean", "arXiv 2511.20347; TRL loss_type=sapo"),
    "topr": _Row("topr", "token-mean", "arXiv 2503.14286, per token as in ROLL"),
    "tis": _Row("tis", "token-mean", "verl 0.9.1 `rollout_is` on a policy gradient"),
    "mis": _Row("mis", "token-mean", "verl 0.9.1 `rollout_rs` on a policy gradient"),
    "icepop": _Row("icepop", "token-mean", "rllm"),
    "dppo_tv": _Row("dppo_tv", "seq-mean-token-sum-norm", "arXiv 2602.04879"),
    "dppo_kl": _Row("dppo_kl", "seq-mean-token-sum-norm", "arXiv 2602.04879"),
    "vespo": _Row("vespo", "token-mean", "TRL loss_type=vespo"),
    "gspo": _Row("gspo", "seq-mean-token-mean", "arXiv 2507.18071"),
    "gspo_token_mean": _Row("gspo", "token-mean", "verl 0.9.1's default, not the paper's"),
    "luspo": _Row("luspo", "seq-mean-token-sum", "TRL loss_type=luspo"),
    "gmpo": _Row("gmpo", "seq-mean-token-mean", "arXiv 2507.20673; TRL experimental"),
    "mhpo": _Row("mhpo", "seq-mean-token-mean", "arXiv 2603.16929, the formula"),
    "mhpo_token_mean": _Row("mhpo", "token-mean", "the verl port of arXiv 2603.16929"),
    "mhpo_lfm_only": _Row("mhpo_lfm_only", "seq-mean-token-mean", "arXiv 2603.16929, ablation"),
}  # fmt: skip


def recipe(name: str, **hyperparameters: Any) -> Recipe:
    """The recipe of that name, with these hyperparameters of its objective.

    Raises:
        ObjectiveError: unknown name or hyperparameter.
    """
    if name not in RECIPES:
        close = get_close_matches(str(name), RECIPES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ObjectiveError(f"recipe: unknown name {name!r}, valid are {', '.join(RECIPES)}.{hint}")
    row = RECIPES[name]
    objective = create(row.objective, **{**row.hyperparameters, **hyperparameters})
    return Recipe(name, objective, row.aggregation, row.normalize_std, row.source)
