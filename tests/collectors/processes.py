"""Functions run in processes of their own, which may be killed. A fork server, because importing torch is slow."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tests.collectors.writer import PROCESSES


def call(work: Callable[..., Any], *arguments: Any, killed: bool = False, seconds: float = 120.0) -> None:
    """Run it in a process of its own to its end, or until it kills itself."""
    process = start(work, *arguments)
    process.join(seconds)
    assert process.exitcode == (-signal.SIGKILL if killed else 0), f"{work.__name__} ended with {process.exitcode}"


def start(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run it in a process of its own; it dies with the test."""
    process = PROCESSES.Process(target=_run, args=(work, arguments), daemon=True)
    process.start()
    return process


def _run(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        raise
