"""The callback for transformers on a real Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import Dataset

from collectors import open_run
from mhpo_core.gradients import parameter_group
from tests.collectors.support import column, rows

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate; `make test` installs it")

from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from collectors.adapters.transformers import ScalarsAndGradients

pytestmark = pytest.mark.filterwarnings("ignore")


class Ones(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.arange(index, index + 6) % 16
        return {"input_ids": ids, "labels": ids}


class Spied(Trainer):
    def _clip_grad_norm(self, model):
        squares = {}
        for name, parameter in model.named_parameters():
            group = parameter_group(name)
            squares[group] = squares.get(group, 0.0) + float((parameter.grad.double() ** 2).sum())
        self.seen = [*getattr(self, "seen", []), {n: math.sqrt(v) for n, v in squares.items()}]
        return super()._clip_grad_norm(model)


def train(path, callback, **settings):
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "logging_steps": 1,
        "max_grad_norm": 0.1, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2,
    }  # fmt: skip
    trainer = Spied(
        model=LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)),
        args=TrainingArguments(str(path), **defaults | settings), train_dataset=Ones(), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return trainer


def test_scalars_and_the_norms_of_layers_before_clipping(tmp_path):
    trainer = train(tmp_path / "out", ScalarsAndGradients(tmp_path / "run", fsync=False))
    logged = [r for r in trainer.state.log_history if "loss" in r]
    with open_run(tmp_path / "run") as run:
        found = rows(run, "SELECT step, loss, grad_norm, lr FROM steps")
        assert found == [(r["step"], r["loss"], pytest.approx(r["grad_norm"]), r["learning_rate"]) for r in logged]
        for step, expected in enumerate(trainer.seen, 1):
            norms = dict(rows(run, f"SELECT parameter, grad_norm FROM gradients WHERE step = {step}"))
            assert norms == pytest.approx(expected, rel=1e-5) and math.dist(norms.values(), [0] * len(norms)) > 0.1
        assert column(run, "SELECT kind FROM events") == ["started", "finished"]


def test_norms_that_may_be_clipped_are_not_recorded(tmp_path):
    train(tmp_path / "out", ScalarsAndGradients(tmp_path / "run", fsync=False), logging_steps=2)
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT DISTINCT step FROM gradients ORDER BY step") == [2, 4]
        assert column(run, "SELECT step FROM steps WHERE loss IS NULL") == [1, 3]


def test_nothing_of_the_training_changes(tmp_path):
    recorded = train(tmp_path / "a", ScalarsAndGradients(tmp_path / "run", fsync=False)).model
    plain = train(tmp_path / "b", PrinterCallback()).model
    assert all(torch.equal(a, b) for a, b in zip(recorded.parameters(), plain.parameters(), strict=True))
