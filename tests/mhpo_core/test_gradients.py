"""Gradient norms and clipping of hand-made parameters in one process, and which group a parameter belongs to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhpo_core.errors import ConfigError
from mhpo_core.gradients import GradientNorms, clip_gradients, gradient_norms, parameter_group


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
    up, down, embedding = (name for name, _ in named[:3])
    assert found.by_parameter == pytest.approx({up: 5.0, down: 12.0, embedding: 84.0}, rel=1e-6)
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
    for named in ([], [("a.weight", parameter([1.0], None))]):
        assert gradient_norms(named) == clip_gradients(named, 1.0) == GradientNorms(0.0, {}, {}, {})


def random_parameters(dtypes, scale=1.0) -> list[tuple[str, nn.Parameter]]:
    """40 parameters of 1 to 2 000 elements, norms from `scale`·1e-3 to `scale`·1e3; every seventh has no gradient."""
    generator = torch.Generator().manual_seed(0)
    named = []
    for i in range(40):
        shape = (i % 5 + 1, 10 * i + 1)
        made = nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)]))
        if i % 7:
            made.grad = (torch.randn(shape, generator=generator) * scale * 10.0 ** (i % 7 - 3)).to(made.dtype)
        named.append((f"layers.{i % 3}.m{i % 4}.{i}.weight", made))
    return named


def cloned(named) -> list[tuple[str, nn.Parameter]]:
    copies = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    for (_, copy), (_, p) in zip(copies, named, strict=True):
        copy.grad = None if p.grad is None else p.grad.clone()
    return copies


def bits(named) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.view(torch.uint8) for _, p in named]


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1, 1e9, math.inf])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.float64], [torch.float32, torch.float64]], ids=["float32", "float64", "mixed"]
)
def test_clipping_is_that_of_torch_bit_for_bit(dtypes, scale, max_norm):
    ours = random_parameters(dtypes, scale)
    theirs, before = cloned(ours), cloned(ours)
    found = clip_gradients(iter(ours), max_norm)
    total = nn.utils.clip_grad_norm_([p for _, p in theirs], max_norm).item()
    assert found.total == pytest.approx(total, rel=1e-6 if torch.float32 in dtypes else 1e-14)
    for one, other in zip(bits(ours), bits(theirs), strict=True):
        assert one is other is None or torch.equal(one, other)
    assert found == gradient_norms(before)  # measured before it was clipped
    after = gradient_norms(ours)
    assert after.total == pytest.approx(min(total, max_norm), rel=2e-6 + 1e-6 / total)
    assert after.weight_by_group == found.weight_by_group


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_clipping_a_nonfinite_or_zero_gradient_is_that_of_torch(bad, max_norm):
    # NaN: all NaN. ±Inf: the factor max_norm/Inf is 0 (NaN for max_norm = Inf), Inf·0 = NaN. Zero: 0·1
    ours = [("a.weight", parameter([1.0, 1.0], [bad, 0.0])), ("b.weight", parameter([1.0], [bad or 0.0]))]
    if bad:
        ours.append(("c.weight", parameter([1.0], [3.0])))
    theirs = cloned(ours)
    found = clip_gradients(ours, max_norm)
    total = nn.utils.clip_grad_norm_([p for _, p in theirs], max_norm).item()
    assert found.total == pytest.approx(total, nan_ok=True)
    assert found.nonfinite_by_group == ({"a": 1, "b": 1, "c": 0} if bad else {"a": 0, "b": 0})
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    finite = ours[-1][1].grad.item()  # 3 or 0
    assert math.isnan(finite) if math.isnan(bad) or (bad and max_norm == math.inf) else finite == 0.0


def test_clipping_half_precision_measures_in_float32():
    # ‖ones(4096)‖ = 64 and ‖(48,)‖ = 48: total 80; 40/80 = 0.5, in a bfloat16 sum of squares it would be far off
    named = [
        ("a.weight", parameter([0.0] * 4096, [1.0] * 4096, torch.bfloat16)),
        ("b.weight", parameter([0.0], [48.0], torch.float32)),
    ]
    assert clip_gradients(named, 40.0).total == pytest.approx(80.0, rel=1e-6)
    gradients = [p.grad for _, p in named]
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]
    assert gradients[0].tolist() == [0.5] * 4096 and gradients[1].item() == pytest.approx(24.0, rel=1e-6)


def test_clipping_reads_the_gradients_once():
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [a for a in tree_leaves(args) if isinstance(a, torch.Tensor) and a.numel() == 1000]
            if tensors:
                calls.append((str(func), len(tensors)))
            return func(*args, **kwargs or {})

    calls: list[tuple[str, int]] = []
    named = [(f"{i}.weight", parameter([[1.0] * 1000], [[1.0] * 1000])) for i in range(5)]
    with Log():
        clip_gradients(named, 1.0)
    # five gradients and five weights together; then the gradients
    assert calls == [("aten._foreach_norm.Scalar", 10), ("aten._foreach_mul_.Tensor", 5)]


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, -math.inf])
def test_a_norm_to_clip_to_that_is_not_above_zero(max_norm):
    named = [("a.weight", parameter([1.0], [1.0]))]
    with pytest.raises(ConfigError, match=rf"got max_norm {max_norm}, allowed is a number above 0 or infinity"):
        clip_gradients(named, max_norm)
    assert named[0][1].grad.item() == 1.0


@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_accumulated_micro_batches_have_the_norms_of_the_whole_batch(pieces):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    ids, target = torch.randint(11, (12, 5)), torch.randn(12, 5, 3, dtype=torch.float64)
    found = []
    for split in (1, pieces):
        model.zero_grad()
        for rows in torch.arange(12).chunk(split):
            ((model(ids[rows]) - target[rows]).square().sum() / target.numel()).backward()
        found.append(clip_gradients(model.named_parameters(), 0.01))
    whole, accumulated = found
    assert accumulated.total == pytest.approx(whole.total, rel=1e-12)
    assert accumulated.by_group == pytest.approx(whole.by_group, rel=1e-12)
    assert accumulated.weight_by_group == whole.weight_by_group and set(whole.by_group) == {"0", "1", "3"}


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
