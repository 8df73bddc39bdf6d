"""Gradient norms of a hand-made model, and which group a parameter belongs to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mhpo_core.gradients import GradientNorms, gradient_norms, parameter_group


def parameter(values, gradient, dtype=torch.float32) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(values, dtype=dtype))
    if gradient is not None:
        made.grad = torch.tensor(gradient, dtype=dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_by_hand(dtype):
    # layer 0's mlp: (3, 4) and (12): √(9 + 16 + 144) = 13; the embedding: (84): total √(13² + 84²) = 85
    named = [
        ("model.layers.0.mlp.up_proj.weight", parameter([1.0, 2.0], [3.0, 4.0], dtype)),
        ("model.layers.0.mlp.down_proj.weight", parameter([2.0], [12.0], dtype)),
        ("model.embed_tokens.weight", parameter([[6.0, 8.0]], [[0.0, -84.0]], dtype)),
        ("model.frozen.weight", parameter([1.0], None, dtype)),
    ]
    found = gradient_norms(named)
    assert found.total == pytest.approx(85.0, rel=1e-6)
    assert found.by_group == pytest.approx({"model.layers.0.mlp": 13.0, "model.embed_tokens": 84.0}, rel=1e-6)
    # weights: √(1 + 4 + 4) = 3 and √(36 + 64) = 10
    assert found.weight_by_group == pytest.approx({"model.layers.0.mlp": 3.0, "model.embed_tokens": 10.0}, rel=1e-6)
    assert found.nonfinite_by_group == {"model.layers.0.mlp": 0, "model.embed_tokens": 0}


def test_doubles_keep_their_precision():
    gradient = [1.0, 1e-5]
    found = gradient_norms([("a.weight", parameter([0.0, 0.0], gradient, torch.float64))])
    assert found.total == pytest.approx(math.sqrt(1 + 1e-10), rel=1e-15)


def test_half_precision_is_summed_in_float32():
    # bfloat16 loses every 1 added to 256: the sum of squares of 4096 ones must be 4096
    found = gradient_norms([("a.weight", parameter([0.0] * 4096, [1.0] * 4096, torch.bfloat16))])
    assert found.total == pytest.approx(64.0, rel=1e-6)


def test_total_is_what_clipping_measures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    model(torch.randn(4, 5)).square().sum().backward()
    found = gradient_norms(model.named_parameters())
    assert found.total == pytest.approx(nn.utils.get_total_norm(p.grad for p in model.parameters()).item(), rel=1e-6)
    assert set(found.by_group) == {"0", "2"}
    assert sum(v**2 for v in found.by_group.values()) == pytest.approx(found.total**2, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_gradient_is_kept_and_counted(bad):
    named = [
        ("net.0.linear.weight", parameter([1.0, 1.0], [bad, 1.0])),
        ("net.0.linear.bias", parameter([1.0], [bad])),
        ("net.1.linear.weight", parameter([1.0], [2.0])),
    ]
    found = gradient_norms(named)
    assert found.nonfinite_by_group == {"net.0.linear": 2, "net.1.linear": 0}
    assert found.by_group["net.1.linear"] == 2.0
    for norm in (found.total, found.by_group["net.0.linear"]):
        assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    assert found.weight_by_group["net.0.linear"] == pytest.approx(math.sqrt(3), rel=1e-6)


def test_no_gradient_anywhere():
    assert gradient_norms([("a.weight", parameter([1.0], None))]) == GradientNorms(0.0, {}, {}, {})


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp"),
        ("model.layers.31.self_attn.q_proj.bias", "model.layers.31.self_attn"),
        ("model.layers.3.input_layernorm.weight", "model.layers.3.input_layernorm"),
        ("model.layers.3.mlp.experts.5.w1.weight", "model.layers.3.mlp"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
        ("head.0.weight", "head.0"),
        ("0.weight", "0"),
        ("scale", "scale"),
    ],
)
def test_parameter_group(name, group):
    assert parameter_group(name) == group
