"""Small configurations, policies and a sink that keeps what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mhpo_core.training import Config, from_dict
from mhpo_core.training.model import Policy, build_policy
from mhpo_core.training.tasks import DigitSum

TINY: dict[str, Any] = {
    "iterations": 2,
    "model": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32},
    "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 4},
    "objective": {"name": "grpo"},
    "optimizer": {"lr": 1e-3, "lr_warmup": 0},
}


@dataclass(frozen=True)
class EvenFirst(DigitSum):
    """Digit-sum prompts, reward 1 if the first token's id is even: about half of what an untrained model writes."""

    def reward(self, prompt, completion_ids):
        return float(completion_ids[0] % 2 == 0)


class ListSink:
    """Keeps every record and event."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.events: list[tuple[str, str]] = []

    def record(self, step: int, batch: Any, **rest: Any) -> None:
        self.steps.append({"step": step, "batch": batch, **rest})

    def event(self, kind: str, detail: str = "") -> None:
        self.events.append((kind, detail))


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sink() -> ListSink:
    return ListSink()


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """tiny(optimizer={"epochs": 2}) = the tiny run on EvenFirst with these keys changed."""

    def build(**changes: Any) -> Config:
        merged = {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else changes.get(k, v) for k, v in TINY.items()}
        config = from_dict({**merged, **{k: v for k, v in changes.items() if k not in TINY}})
        return config if "task" in changes else replace(config, task=EvenFirst())

    return build


def from_scratch(tiny: Callable[..., Config]) -> Policy:
    return build_policy(tiny().model, DigitSum(), torch.device("cpu"))


def with_absolute_positions(tiny: Callable[..., Config]) -> Policy:
    """GPT-2: unlike rotary ones, its positions show a shift that left padding causes."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    return Policy(model.eval(), torch.device("cpu"), torch.float32)


@pytest.fixture(params=[from_scratch, with_absolute_positions])
def any_policy(tiny, request) -> Policy:
    return far_from_uniform(request.param(tiny))


@pytest.fixture
def policy(tiny) -> Policy:
    return far_from_uniform(from_scratch(tiny))


def far_from_uniform(policy: Policy) -> Policy:
    """Random large weights, so that a wrong position or mask shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    return policy
