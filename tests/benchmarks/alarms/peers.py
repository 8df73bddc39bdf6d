"""Other tools' own code on a labelled run, row by row, with their defaults and under the names that they expect.

They are not part of the test environment. Each runs if it can be imported, and its row says how to install it if not.
What they raise counts at the row at which it was raised; rows of theirs count once for any severity and once for the
highest alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata

import pandas as pd

from tests.benchmarks.alarms.labelled import LabelledRun

_PIP = "pip install --no-deps --target .venv/alarm-peers "

Names = Mapping[str, tuple[str, ...]]
"""Column of ours → what the tool calls it."""


@dataclass(frozen=True)
class Peer:
    """Another tool.

    Args:
        package: on PyPI.
        module: that must be importable.
        install: command; into a folder of its own, because it is nothing that our tests may import.
        raised: row → severities raised there, of a run.
        variants: added to the name → least severity that counts.
    """

    package: str
    module: str
    install: str
    raised: Callable[[LabelledRun], dict[int, list[int]]]
    variants: Mapping[str, int]

    @property
    def missing(self) -> bool:
        """Whether its code cannot be imported here."""
        try:
            import_module(self.module)
        except ImportError:
            return True
        return False

    @property
    def name(self) -> str:
        return f"{self.package} {metadata.version(self.package)}"

    def rows(self, run: LabelledRun) -> dict[str, list[int]]:
        """Name of the variant → rows at which it raised something."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raised = self.raised(run)
        return {
            f"{self.name}, {variant}": [row for row, severities in raised.items() if max(severities) >= least]
            for variant, least in self.variants.items()
        }


def _renamed(row: Mapping[str, float], names: Names) -> dict[str, float]:
    return {theirs: row[ours] for ours, all_theirs in names.items() if ours in row for theirs in all_theirs}


RLWATCH: Names = {
    "entropy": ("entropy",),
    "ppo_kl": ("kl_divergence",),
    "kl": ("kl_divergence",),  # after ppo_kl, which it replaces where both are logged, as in its TRL callback
    "reward": ("reward_mean",),
    "reward_std": ("reward_std",),
    "loss": ("loss",),
    "lr": ("learning_rate",),
    "clip_region": ("clip_fraction",),
    "grad_norm": ("grad_norm",),
}


def _rlwatch(run: LabelledRun) -> dict[int, list[int]]:
    """`RLWatch.log_step` at every row; what it returns has passed its cooldown of 100 steps."""
    from rlwatch import RLWatch, RLWatchConfig

    found: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        config = RLWatchConfig(run_id="run", framework="manual")
        config.storage.log_dir = folder
        monitor = RLWatch(config)
        for i, row in enumerate(run.rows):
            sent = monitor.log_step(int(run.steps[i]), **_renamed(row, RLWATCH))
            if sent:
                found[i] = [{"warning": 1, "critical": 2}[alert.severity] for alert in sent]
        monitor.store.close()
    return found


RLDOCTOR: Names = {
    "reward": ("reward",),
    "reward_std": ("reward_std",),
    "kl": ("kl",),
    "ppo_kl": ("actor/ppo_kl",),
    "entropy": ("entropy",),
    "grad_norm": ("grad_norm",),
    "clip_region": ("clip_ratio/region_mean",),
    "clip_low": ("clip_ratio/low_mean",),
    "clip_high": ("clip_ratio/high_mean",),
    "len_mean": ("completions/mean_length",),
    "trunc": ("completions/clipped_ratio",),
    "zero_std": ("frac_reward_zero_std",),
    "loss": ("loss",),
    "lr": ("learning_rate",),
    "true_reward": ("eval_score",),
}


def _rldoctor(**settings: int) -> Callable[[LabelledRun], dict[int, list[int]]]:
    def raised(run: LabelledRun) -> dict[int, list[int]]:
        from rl_doctor.live import LiveMonitor

        logging.getLogger("rl-doctor").setLevel(logging.CRITICAL)
        monitor = LiveMonitor(config={"algorithm": "grpo"}, on_finding=lambda finding: None, **settings)
        fresh = [
            monitor.log(_renamed(row, RLDOCTOR), step=int(step))
            for step, row in zip(run.steps.tolist(), run.rows, strict=True)
        ]
        return {i: [int(finding.severity) for finding in findings] for i, findings in enumerate(fresh) if findings}

    return raised


TOOLKIT: Names = {
    "reward": ("reward_mean", "group_reward_mean"),
    "reward_std": ("reward_std", "group_reward_std"),
    "kl": ("kl",),
    "ppo_kl": ("approx_kl",),
    "entropy": ("entropy",),
    "grad_norm": ("grad_norm",),
    "clip_region": ("clip_fraction",),
    "len_mean": ("completion_length", "output_length_mean"),
    "trunc": ("truncation_rate",),
    "loss": ("grpo_loss",),
    "is_mean": ("importance_sampling_ratio",),
}
_EVERY = 10  # rows: the callback's live_warning_interval; it also asks for ten rows first


def _toolkit(run: LabelledRun) -> dict[int, list[int]]:
    """`run_heuristics(…, "grpo")` on the rows so far, every 10 rows; raised = not found 10 rows before."""
    from post_training_toolkit.models.heuristics import run_heuristics

    records = [{"step": int(run.steps[i]), **_renamed(row, TOOLKIT)} for i, row in enumerate(run.rows)]
    rank = {"low": 1, "medium": 2, "high": 3}
    found: dict[int, list[int]] = {}
    before: set[tuple[str, str]] = set()
    for n in range(_EVERY, len(records) + 1, _EVERY):
        try:
            insights = run_heuristics(pd.DataFrame(records[:n]), "grpo")
        except Exception:  # its callback goes on without findings, too
            insights = []
        now = {(insight.type, insight.severity) for insight in insights}
        if now - before:
            found[n - 1] = [rank[severity] for _, severity in now - before]
        before = now
    return found


PEERS = (
    Peer(
        "rlwatch",
        "rlwatch",
        _PIP + "rlwatch==0.5.1 scipy slack-sdk",
        _rlwatch,
        {"any alert": 1, "critical alone": 2},
    ),
    Peer("rldoctor", "rl_doctor", _PIP + "rldoctor==0.2.0", _rldoctor(), {"WARN and CRIT": 3, "CRIT alone": 4}),
    Peer(
        "rldoctor",
        "rl_doctor",
        _PIP + "rldoctor==0.2.0",
        _rldoctor(check_every=5, min_steps=8),
        {"checked every 5 rows from row 10, WARN and CRIT": 3, "checked every 5 rows from row 10, CRIT alone": 4},
    ),
    Peer(
        "post-training-toolkit",
        "post_training_toolkit.models.heuristics",
        _PIP + "git+https://github.com/microsoft/post-training-toolkit@7ab9855 scipy matplotlib seaborn contourpy "
        "cycler fonttools kiwisolver pyparsing",
        _toolkit,
        {"any insight": 1, "high alone": 3},
    ),
)
"""The package post-training-toolkit 0.0.1 on PyPI is an empty placeholder; the code is on GitHub."""


def peers(run: LabelledRun) -> dict[str, list[int]]:
    """Rows of every peer that is installed, by its name and variant."""
    return {name: rows for peer in PEERS if not peer.missing for name, rows in peer.rows(run).items()}
