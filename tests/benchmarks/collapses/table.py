"""One row per optimizer step, under the column names of the labelled public logs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from collectors.reader import Run
from tests.benchmarks.collapses.labels import Label, label

# column → expression over the view `steps`; ppo_kl is the one between old and new policy
_COLUMNS = {
    "step": "step",
    "reward": "reward_mean",
    "reward_std": "reward_std",
    "ppo_kl": "kl_old_new_k3",
    "entropy": "entropy_mean",
    "grad_norm": "grad_norm",
    "clip_low": "clip_fraction_low",
    "clip_high": "clip_fraction_high",
    "clip_region": "clip_fraction_low + clip_fraction_high",
    "len_mean": "length_mean",
    "trunc": "truncated_fraction",
    "zero_std": "zero_std_groups / n_groups",
    "loss": "loss",
    "lr": "lr",
}


def step_table(run: Run) -> pd.DataFrame:
    """The columns of _COLUMNS, and `iteration` and `true_reward`, the task's own reward."""
    made = ", ".join(f"({sql}) AS {name}" for name, sql in _COLUMNS.items())
    steps = run.sql(f"SELECT {made} FROM steps ORDER BY step").df()
    metrics = run.sql("SELECT step, name, value FROM metrics WHERE name IN ('iteration', 'true_reward_mean')").df()
    by_step = metrics.pivot(index="step", columns="name", values="value").reindex(steps["step"])
    steps["iteration"] = by_step["iteration"].to_numpy(dtype=int)
    has_proxy = "true_reward_mean" in by_step
    steps["true_reward"] = by_step["true_reward_mean"].to_numpy() if has_proxy else steps["reward"]
    return steps


def label_of(table: pd.DataFrame, faulty: bool) -> Label:
    """The rule, on the task's own reward."""
    reward = table.groupby("iteration")["true_reward"].mean().to_numpy(dtype=float)
    taken = np.isfinite(table["loss"].to_numpy(dtype=float)) & np.isfinite(table["grad_norm"].to_numpy(dtype=float))
    return label(reward, taken, faulty)
