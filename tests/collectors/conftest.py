"""Shared by the tests of the store: one thread for torch, small segments on request."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from collectors import store


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def seal_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Seal after that many steps instead of 256."""
    return lambda steps: monkeypatch.setattr(store, "SEAL_AFTER_STEPS", steps)
