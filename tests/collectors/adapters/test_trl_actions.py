"""What a critical alarm has a real GRPOTrainer do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from collectors import Recorder, open_run
from collectors.adapters.trl_actions import scale_learning_rate
from mhpo_core.alarms import CRITICAL, Alarm, Settings
from mhpo_core.errors import ConfigError
from tests.collectors.support import column, rows

pytest.importorskip("trl", reason="trl is not installed; `make test` installs it (pip install -e '.[test]')")

from transformers import TrainerCallback
from trl import GRPOTrainer

from collectors.adapters.trl import attach
from tests.collectors.adapters.tiny_trl import build

pytestmark = pytest.mark.filterwarnings("ignore")
SEEN = 2  # the step after which the alarm is known


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # without it a trainer reports its use over the network


def trained(monkeypatch: pytest.MonkeyPatch, folder: Path, on_critical: str | None, resume: bool = False, **settings):
    """A trainer for which an alarm waits once step 2 has been handed over."""
    waiting = [] if resume else [Alarm("gradient@2", "gradient", "unknown", CRITICAL, 2, 2, 9.0, 1.0, "", {}, [])]

    def take(recorder: Recorder) -> Alarm | None:
        return waiting.pop() if waiting and recorder._last_step >= SEEN else None

    monkeypatch.setattr(Recorder, "take_critical", take)
    trainer = build(folder / "out", gradient_accumulation_steps=1, **{"max_steps": 5} | settings)
    attach(trainer, folder / "run", on_critical=on_critical, fsync=False)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def rates(trainer) -> list[float]:
    return [record["learning_rate"] for record in trainer.state.log_history if "loss" in record]


def test_stop(monkeypatch, tmp_path):
    trainer = trained(monkeypatch, tmp_path, "stop")
    assert trainer.state.global_step == 3
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT step FROM steps") == [1, 2, 3], "the last step is recorded"
        acted, ended = rows(run, "SELECT kind, detail FROM events")[-2:]
    assert acted == ("alarm_action", "stop after step 3, critical alarm gradient@2: training ends")
    assert ended == ("stopped", "because of the critical alarm gradient@2")
    trainer.train()
    assert column(tmp_path / "run", "SELECT kind FROM events")[-1] == "finished", "a second training is another matter"


def test_save(monkeypatch, tmp_path):
    trainer = trained(monkeypatch, tmp_path, "save")
    assert trainer.state.global_step == 5
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("schedule", ["linear", pytest.param("cosine", marks=pytest.mark.slow)])
def test_lower_lr_halves_every_later_step_also_after_a_resume(monkeypatch, tmp_path, schedule):
    settings = {"lr_scheduler_type": schedule, "save_strategy": "steps", "save_steps": 4}
    usual = rates(trained(monkeypatch, tmp_path / "usual", None, **settings))
    lowered = rates(trained(monkeypatch, tmp_path / "run", "lower-lr", **settings))
    assert lowered == pytest.approx([lr * (1.0 if step <= 3 else 0.5) for step, lr in enumerate(usual, 1)])
    for leftover in (tmp_path / "run" / "out").glob("checkpoint-5"):
        leftover.rename(tmp_path / "aside")
    again = trained(monkeypatch, tmp_path / "run", "lower-lr", resume=True, **settings)
    assert rates(again)[-1] == pytest.approx(usual[-1] * 0.5) and again.state.global_step == 5


def test_a_real_alarm_stops_a_real_trainer(monkeypatch, tmp_path):
    """A NaN in the third gradient; thresholds so that one is critical."""

    class Breaks(GRPOTrainer):
        def training_step(self, model, *rest):
            loss = super().training_step(model, *rest)
            if self.state.global_step == 2:
                next(model.parameters()).grad[0, 0] = torch.nan
            return loss

    class Survives(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            for weight in model.parameters():
                weight.grad.nan_to_num_()

        def on_step_begin(self, args, state, control, **_):
            time.sleep(0.05)  # a step of a real model takes longer than finding an alarm

    trainer = build(tmp_path / "out", Breaks, gradient_accumulation_steps=1, max_steps=20)
    trainer.add_callback(Survives())
    attach(trainer, tmp_path / "run", on_critical="stop", fsync=False, alarms=Settings(nonfinite_rows=1))
    trainer.train()
    with open_run(tmp_path / "run") as run:
        first = column(run, "SELECT min(step) FROM alarms WHERE severity = 'critical'")[0]
        assert rows(run, "SELECT kind, detail FROM events")[-1][0] == "stopped"
    assert first == 3 and first < trainer.state.global_step < 10


def test_what_can_never_happen_is_refused(tmp_path):
    trainer = build(tmp_path / "out")
    with pytest.raises(ConfigError, match="allowed are stop, save, lower-lr"):
        attach(trainer, tmp_path / "run", on_critical="explode")
    with pytest.raises(ConfigError, match="alarms=None, allowed are runs of one process"):
        attach(trainer, tmp_path / "run", on_critical="stop", alarms=None)
    assert not (tmp_path / "run").exists()


def test_schedulers_within_schedulers_are_scaled():
    from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR

    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        parts = [ConstantLR(optimizer, 0.5, 2), LinearLR(optimizer, 1.0, 0.1, 4)]
        return optimizer, SequentialLR(optimizer, parts, milestones=[4])

    (plain, schedule), (scaled, other) = made(), made()
    for step in range(8):
        if step == 3:
            scale_learning_rate(scaled, other, 0.5)
        expected = plain.param_groups[0]["lr"] * (0.5 if step >= 3 else 1.0)
        assert scaled.param_groups[0]["lr"] == pytest.approx(expected), step
        for optimizer, one in ((plain, schedule), (scaled, other)):
            optimizer.step()
            one.step()
