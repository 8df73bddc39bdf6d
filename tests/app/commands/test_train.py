"""`mhpo train --on-critical`: what a critical alarm does to our own trainer."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.cli import main
from collectors import Recorder, open_run
from mhpo_core.alarms import CRITICAL, Alarm

STEPS = 8


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command takes SIGINT and SIGTERM for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(monkeypatch: pytest.MonkeyPatch, runs: Path, *more: str) -> tuple[list[tuple[str, str]], list[float]]:
    """Events and learning rates of a run for which an alarm waits before step 3."""
    waiting = [Alarm("gradient@2", "gradient", "unknown", CRITICAL, 2, 2, 9.0, 1.0, "It explodes.", {}, [])]

    def take(recorder: Recorder) -> Alarm | None:
        return waiting.pop() if waiting and recorder._last_step >= 2 else None

    monkeypatch.setattr(Recorder, "take_critical", take)
    command = ["train", "--preset", "healthy", "--out", str(runs), "--name", "r", "--device", "cpu"]
    for setting in (f"iterations={STEPS // 2}", "warm_start.steps=1", "rollout.prompts=4", "optimizer.lr_warmup=0"):
        command += ["--set", setting]
    assert main([*command, *more]) == 0
    with open_run(runs / "r") as run:
        events = run.sql("SELECT kind, detail FROM events").fetchall()
        return events, [row[0] for row in run.sql("SELECT lr FROM steps").fetchall()]


def test_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events, rates = train(monkeypatch, tmp_path, "--on-critical", "stop")
    assert len(rates) == 3
    assert events[-1] == ("stopped", "asked to stop after 3 steps, because of the critical alarm gradient@2")
    assert "critical alarm gradient@2" in capsys.readouterr().err


def test_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events, rates = train(monkeypatch, tmp_path, "--on-critical", "checkpoint")
    folder = next((tmp_path / "r").glob("checkpoint-alarm-*"))
    assert len(rates) == STEPS and events[-1][0] == "finished"
    position = torch.load(folder / "checkpoint.pt", weights_only=True)["position"]
    assert folder.name == f"checkpoint-alarm-{position['step']}" and 3 <= position["step"] < STEPS
    assert main(["verify", str(tmp_path / "r")]) == 0, "it is no foreign file"


def test_lower_lr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, usual = train(monkeypatch, tmp_path / "usual")
    events, rates = train(monkeypatch, tmp_path / "lowered", "--on-critical", "lower-lr")
    assert rates == pytest.approx([lr * (1.0 if step < 3 else 0.5) for step, lr in enumerate(usual)])
    assert sum("gradient@2" in detail for _, detail in events) == 1


def test_without_being_asked_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events, rates = train(monkeypatch, tmp_path)
    assert len(rates) == STEPS and not any("gradient@2" in detail for _, detail in events)
    assert not list((tmp_path / "r").glob("checkpoint-*"))
