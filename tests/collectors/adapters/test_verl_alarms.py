"""MHPO_ON_CRITICAL=stop: one clear error between two steps; nothing where it was not asked for. Needs no verl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from collectors import Recorder
from collectors.adapters import verl as adapter
from collectors.adapters.worker import Worker
from mhpo_core.alarms import CRITICAL, Alarm
from mhpo_core.errors import AlarmError
from tests.collectors.support import column, rows

B, T = 4, 7


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MHPO_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("MHPO_OPTIONS", '{"tokens": "all", "fsync": false}')
    monkeypatch.delenv("MHPO_ON_CRITICAL", raising=False)
    monkeypatch.setattr(adapter, "_HERE", Worker("verl"))
    yield tmp_path / "run"
    adapter.close()


def vanilla(
    old_log_prob: Any, log_prob: Any, advantages: Any, response_mask: Any, loss_agg_mode: str, config: Any,
    rollout_is_weights: Any = None,
) -> tuple[Any, dict[str, float]]:  # fmt: skip
    """A loss called as verl calls its own."""
    ratio = (log_prob - old_log_prob).exp()
    return -(ratio * advantages * response_mask).sum() / response_mask.sum(), {}


class Trainer:
    """Trains a number; the old log-probabilities become NaN from some step on, three of which are critical."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.01)
        self.loss = adapter.recording("vanilla", vanilla)

    def micro_batch(self, value: float = -1.0) -> None:
        old = torch.full((B, T), value)
        loss, _ = self.loss(
            old_log_prob=old, log_prob=torch.full((B, T), -1.0) + self.weight, advantages=torch.ones(B, T),
            response_mask=torch.ones(B, T, dtype=torch.bool), loss_agg_mode="token-mean",
            config={"clip_ratio": 0.2},
        )  # fmt: skip
        loss.backward()

    def step(self, value: float = -1.0) -> None:
        for _ in range(2):
            self.micro_batch(value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert adapter._HERE.telemetry is None or adapter._HERE.telemetry.recorder.flush(30)


def test_a_critical_alarm_ends_the_run_before_the_next_step(run, monkeypatch):
    monkeypatch.setenv("MHPO_ON_CRITICAL", "stop")
    trainer = Trainer()
    trained = 0
    with pytest.raises(AlarmError, match="MHPO_ON_CRITICAL is 'stop' and .* has the critical alarm") as raised:
        for number in range(12):
            trainer.step(math.nan if number >= 4 else -1.0)
            trained += 1
    assert "\n" not in str(raised.value)
    assert trained == column(run, "SELECT min(step) FROM alarms WHERE severity = 'critical'")[0] < 12
    assert column(run, "SELECT count(*) FROM steps") == [trained], "no step is cut in two"
    assert rows(run, "SELECT kind, detail FROM events")[-1][0] == "stopped"


def test_within_a_step_nothing_is_raised(run, monkeypatch):
    monkeypatch.setenv("MHPO_ON_CRITICAL", "stop")
    trainer = Trainer()
    trainer.micro_batch()
    alarm = Alarm("x@1", "x", "unknown", CRITICAL, 1, 1, 9.0, 1.0, "It breaks.", {}, [])
    monkeypatch.setattr(Recorder, "take_critical", lambda self: alarm)
    trainer.micro_batch()
    trainer.optimizer.step()
    with pytest.raises(AlarmError, match="the critical alarm x@1. It breaks. `mhpo check"):
        trainer.micro_batch()


def test_without_being_asked_nothing_is_raised(run):
    trainer = Trainer()
    for number in range(9):
        trainer.step(math.nan if number >= 4 else -1.0)
    adapter.close()
    assert column(run, "SELECT count(*) > 0 FROM alarms WHERE severity = 'critical'") == [True]
    assert column(run, "SELECT kind FROM events")[-1] == "finished"


def test_an_action_that_is_none_is_said_and_harms_nothing(run, monkeypatch, caplog):
    monkeypatch.setenv("MHPO_ON_CRITICAL", "explode")
    Trainer().step()
    assert "MHPO_ON_CRITICAL is 'explode', allowed is 'stop'" in caplog.text


def test_a_rank_that_does_not_watch_says_so(run, monkeypatch, caplog):
    monkeypatch.setenv("MHPO_ON_CRITICAL", "stop")
    monkeypatch.setattr("collectors.adapters.worker.place_in_job", lambda: {"rank": 1, "world_size": 2})
    Trainer().step()
    assert "only rank 0 watches a run" in caplog.text
