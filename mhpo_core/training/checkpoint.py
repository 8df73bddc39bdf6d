"""Checkpoints: one file, written aside and renamed, so that a crash leaves the old one or the new."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhpo_core.errors import ConfigError, StoreError
from mhpo_core.training.config import Config

FILE_NAME = "checkpoint.pt"
# A resumed run may be longer, be called something else and save at another pace.
_FREE_TO_CHANGE = ("name", "iterations", "checkpoint")

_PARTS = {"config", "model", "optimizer", "position"}


@dataclass
class Position:
    """How far a run is.

    Args:
        iteration: the next one.
        step: the next optimizer step.
        skipped_steps: steps not taken because the loss or a gradient was NaN or ±Inf.
        rewards: mean reward of every iteration so far.
        lr_factor: what interventions have multiplied the learning rate by.
    """

    iteration: int = 0
    step: int = 0
    skipped_steps: int = 0
    rewards: list[float] = field(default_factory=list)
    lr_factor: float = 1.0


def aside(folder: Path, step: int) -> Path:
    """Where a checkpoint before this step is saved beside the run's own."""
    return folder.with_name(f"{folder.name}-alarm-{step}")


def save(folder: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Replace the folder's checkpoint.

    Raises:
        StoreError: the folder cannot be written.
    """
    state = {
        "config": config.to_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "position": asdict(position),
    }
    partial = folder / f"{FILE_NAME}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / FILE_NAME)
    except (OSError, RuntimeError) as error:
        raise StoreError(
            f"checkpoint {folder}: cannot be written ({error}). Free space or give another folder."
        ) from error


def restore(folder: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Load the folder's checkpoint into model and optimizer.

    Raises:
        StoreError: there is none, or it cannot be read.
        ConfigError: it was written with other settings.
    """
    state = _load(folder / FILE_NAME)
    _require_same(state["config"], config.to_dict())
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Position(**state["position"])


def _load(path: Path) -> dict[str, Any]:
    try:
        # weights_only: a checkpoint from elsewhere must not be able to run code
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or "it is empty").splitlines()[0]
        raise StoreError(f"checkpoint {path}: cannot be read ({reason}). Train without resuming.") from error
    if not isinstance(state, dict) or set(state) != _PARTS:
        raise StoreError(f"checkpoint {path}: cannot be read (it is not from this program). Train without resuming.")
    return state


def _require_same(saved: dict[str, Any], given: dict[str, Any]) -> None:
    changed = [k for k in given if k not in _FREE_TO_CHANGE and saved.get(k) != given[k]]
    if changed:
        raise ConfigError(
            f"resume: {', '.join(changed)} differ from the checkpoint's, allowed to differ are "
            f"{', '.join(_FREE_TO_CHANGE)}. Restore the settings, or train without resuming."
        )
