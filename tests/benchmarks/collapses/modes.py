"""The failure modes: which preset shows each, and what takes its cause away.

A twin is the same configuration without the cause. It has seeds of its own: most presets differ only in their fault,
so that twins with the seeds of the faulty runs would be one healthy run counted many times.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhpo_core.training import Config, load_preset

TWIN_SEEDS = 1000  # twin of seed s of the m-th mode: 1000·(m + 1) + s
_NO_FAULT = ("fault.name=none",)


@dataclass(frozen=True)
class Mode:
    """One failure mode.

    Args:
        name: of the mode and of its preset.
        cure: overrides that take the cause away.
    """

    name: str
    cure: tuple[str, ...] = _NO_FAULT


MODES = (
    Mode("mismatch"),
    Mode("mismatch-growth"),
    Mode("lr-spike"),
    Mode("reward-hack"),
    Mode("length-blowup"),
    Mode("nan"),
    Mode("entropy-collapse", ("optimizer.lr=3e-4",)),
    Mode("reuse", ("objective.name=grpo",)),
)


@dataclass(frozen=True)
class Case:
    """One run of the benchmark.

    Args:
        mode: it shows, or that its twin shows.
        seed: of the faulty run.
        faulty: False = the healthy twin.
    """

    mode: Mode
    seed: int
    faulty: bool

    @property
    def id(self) -> str:
        """Name of its folder."""
        return f"{self.mode.name}-{'' if self.faulty else 'twin-'}{self.seed}"

    @property
    def config(self) -> Config:
        """What is trained."""
        if self.faulty:
            return load_preset(self.mode.name, [f"seed={self.seed}"])
        seed = TWIN_SEEDS * (MODES.index(self.mode) + 1) + self.seed
        return load_preset(self.mode.name, [f"seed={seed}", f"name={self.id}", *self.mode.cure])

    @property
    def fault_step(self) -> int | None:
        """First optimizer step that the cause acts on; None for a twin. A cause without a fault is there from 0 on."""
        at = getattr(self.config.fault, "at", 0)
        return at * self.config.updates_per_iteration if self.faulty else None


def cases(seeds: int) -> list[Case]:
    """Faulty runs and twins, mode by mode."""
    return [Case(mode, seed, faulty) for mode in MODES for seed in range(seeds) for faulty in (True, False)]
