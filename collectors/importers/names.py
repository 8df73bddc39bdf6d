"""Names of scalars: one table per framework, its name → our column of `steps`.

Only where both mean the same; what is not in a table is kept in `metrics` under its own name. Of several names for one
column the first that a step has counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from mhpo_core.metrics import METRICS

TRL = {
    "loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "reward": "reward_mean",
    "entropy": "entropy_mean", "completions/mean_length": "length_mean",
    "completions/clipped_ratio": "truncated_fraction", "clip_ratio/low_mean": "clip_fraction_low",
    "clip_ratio/high_mean": "clip_fraction_high",
}  # fmt: skip
VERL = {
    "actor/loss": "loss", "actor/pg_loss": "loss", "actor/grad_norm": "grad_norm", "actor/lr": "lr",
    "critic/score/mean": "reward_mean", "actor/entropy": "entropy_mean",
    # both are the mean of logp_old − logp_new
    "actor/ppo_kl": "kl_old_new_k1", "rollout_corr/k3_kl": "kl_rollout_old_k3",
    "response_length/mean": "length_mean", "response_length/clip_ratio": "truncated_fraction",
}  # fmt: skip
OPENRLHF = {
    "policy_loss": "loss", "actor_grad_norm": "grad_norm", "actor_lr": "lr", "reward": "reward_mean",
    "ppo_kl": "kl_old_new_k1", "response_length": "length_mean", "truncated": "truncated_fraction",
}  # fmt: skip
PRIME_RL = {
    "loss/mean": "loss", "optim/grad_norm": "grad_norm", "optim/lr": "lr", "reward/all/mean": "reward_mean",
    "entropy/all/mean": "entropy_mean", "seq_len/all/mean": "length_mean",
}  # fmt: skip
NEMO_RL = {"loss": "loss", "grad_norm": "grad_norm", "reward": "reward_mean", "lr": "lr"}
SLIME = {
    "loss": "loss", "pg_loss": "loss", "grad_norm": "grad_norm", "lr-pg_0": "lr", "ppo_kl": "kl_old_new_k1",
    "rollout/rewards": "reward_mean", "rollout/response_len/mean": "length_mean",
    "rollout/truncated_ratio": "truncated_fraction",
}  # fmt: skip
OWN = {name: name for name in METRICS}

TABLES: dict[str, Mapping[str, str]] = {
    "mhpo": OWN, "trl": TRL, "verl": VERL, "openrlhf": OPENRLHF, "prime-rl": PRIME_RL, "nemo-rl": NEMO_RL,
    "slime": SLIME,
}  # fmt: skip
UNKNOWN = "unknown"
"""Framework of a table of metrics that no framework's names give away."""

_PREFIXES = ("train/", "train_")
_TELLING = {
    "verl": ("actor/", "critic/", "response_length/", "rollout_corr/", "val-core/", "val-aux/"),
    "trl": ("completions/", "clip_ratio/", "frac_reward_zero_std"),
    "openrlhf": ("actor_lr", "actor_grad_norm", "policy_loss"), "prime-rl": ("mismatch_kl/", "optim/"),
    "slime": ("train_rollout_logprob_abs_diff", "rollout/raw_reward", "lr-pg_"),
    "nemo-rl": ("probs_ratio", "token_mult_prob_error", "gen_kl_error"),
}  # fmt: skip


def framework_of(names: Iterable[str]) -> str:
    """The framework whose names these are, by those that no other has."""
    plain = [_plain(name) for name in names]
    votes = {f: sum(n.startswith(told) for n in plain) for f, told in _TELLING.items()}
    best = max(votes, key=lambda f: votes[f])
    return best if votes[best] else UNKNOWN


def columns_of(metrics: Mapping[str, float], framework: str) -> tuple[dict[str, float], set[str]]:
    """Columns of `steps` and their values, and the names that gave them.

    Args:
        framework: key of TABLES; for another one, a name counts if it is a column's own or all frameworks agree on it.
    """
    table = TABLES.get(framework) or _COMMON
    given = {_plain(name): name for name in reversed(list(metrics))} | {name: name for name in metrics}
    columns: dict[str, float] = {}
    used: set[str] = set()
    for name, column in table.items():
        if name in given and column not in columns:
            columns[column] = metrics[given[name]]
            used.add(given[name])
    return columns, used


@lru_cache(4096)
def _plain(name: str) -> str:
    return next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)


def _common() -> dict[str, str]:
    """Our own names, and those of the frameworks that mean one column wherever they occur."""
    meanings: dict[str, set[str]] = {}
    for framework, table in TABLES.items():
        for name, column in table.items() if framework != "mhpo" else ():
            meanings.setdefault(name, set()).add(column)
    return OWN | {name: next(iter(found)) for name, found in meanings.items() if len(found) == 1}


_COMMON = _common()
