"""Chunked token statistics against whole logits, and against torch's own chunked cross entropy.

Shape letters: B sequences, T response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhpo_core import chunked_logprobs as module
from mhpo_core.chunked_logprobs import chunked_token_stats, default_chunk_rows
from mhpo_core.errors import BatchError
from mhpo_core.logprobs import TokenStats, token_stats
from mhpo_core.spot_check import spot_check

INF = math.inf
B, T, H, V = 2, 5, 6, 11
FIELDS = ("logp", "entropy", "sum_p_squared")


def problem(seed=0, dtype=torch.float64, spread=3.0, shape=(B, T, H, V)):
    """hidden, weight, bias with gradients, and ids."""
    b, t, h, v = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = {(b, t, h): spread, (v, h): h**-0.5, (v,): 1.0}
    tensors = [(s * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype) for size, s in sizes.items()]
    return *(x.requires_grad_() for x in tensors), torch.randint(v, (b, t), generator=generator)


def whole(hidden, weight, token_id, bias=None, temperature=1.0, softcap=None) -> TokenStats:
    """The same from (B, T, V) logits."""
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_stats(logits, token_id, temperature=temperature)


def upstream(like) -> torch.Tensor:
    """A different gradient for every token, of both signs, one of them 0."""
    return torch.linspace(-1.0, 1.5, like.numel(), dtype=like.dtype).reshape(like.shape).where(like != like[0, 0], 0)


def gradients(stats, tensors):
    return torch.autograd.grad((stats.logp * upstream(stats.logp.detach())).sum(), tensors)


@given(
    seed=st.integers(0, 10**6),
    chunk_rows=st.sampled_from([1, 2, 3, 4, 7, B * T - 1, B * T, B * T + 1, None]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    softcap=st.sampled_from([None, 0.7, 5.0]),
    with_bias=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_same_as_from_whole_logits(seed, chunk_rows, temperature, softcap, with_bias):
    hidden, weight, bias, token_id = problem(seed)
    options = {"temperature": temperature, "softcap": softcap, "bias": bias if with_bias else None}
    found = chunked_token_stats(hidden, weight, token_id, chunk_rows=chunk_rows, **options)
    expected = whole(hidden, weight, token_id, **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    tensors = [hidden, weight, bias] if with_bias else [hidden, weight]
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors), rtol=1e-12, atol=1e-12)
    assert found.vocabulary_size == expected.vocabulary_size == V


def test_by_hand():
    # H = 1, logits 0, ln 2, ln 1: p = (1/4, 1/2, 1/4); log p_1 = −ln 2, entropy 1.5·ln 2, Σp² = 3/8
    hidden, weight = torch.ones(1, 1, 1), torch.tensor([[1.0], [2.0], [1.0]]).log()
    stats = chunked_token_stats(hidden, weight, torch.tensor([[1]]))
    found = [getattr(stats, name).item() for name in FIELDS]
    assert found == pytest.approx([-math.log(2), 1.5 * math.log(2), 0.375], rel=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
def test_logp_and_its_gradients_are_those_of_torchs_own_kernel(with_bias):
    hidden, weight, bias, token_id = problem(shape=(1, 40, 8, 30))
    tensors = [hidden, weight, bias] if with_bias else [hidden, weight]
    bias = bias if with_bias else None
    found = chunked_token_stats(hidden, weight, token_id, bias=bias, chunk_rows=7)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16, chunking_method=None)
    loss = linear_cross_entropy(
        hidden[0], weight, token_id[0], linear_bias=bias, reduction="none", options=options
    )  # fmt: skip
    expected = TokenStats(-loss.unsqueeze(0), found.entropy, found.sum_p_squared, 30)
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_run_in_float32(dtype):
    hidden, weight, bias, token_id = problem(dtype=dtype, shape=(2, 30, 16, 500))
    options = {"temperature": 0.7, "softcap": 20.0}
    found = chunked_token_stats(hidden, weight, token_id, bias=bias, chunk_rows=13, **options)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = whole(*exact[:2], token_id, bias=exact[2], **options)
    for name in FIELDS:
        assert getattr(found, name).dtype == torch.float32
        # float32 logits of size up to 28 carry an error of 28·2⁻²⁴ = 2e-6 into log p
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-5)
    # the gradient is rounded to the dtype of its tensor at the end, and only there; a float16 also underflows
    eps = max(1e-5, torch.finfo(dtype).eps)
    for mine, reference in zip(gradients(found, [hidden, weight, bias]), gradients(expected, exact), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), reference, rtol=eps, atol=1e-5)


def test_autocast_rounds_nothing():
    hidden, weight, _, token_id = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_token_stats(hidden, weight, token_id)
        slopes = gradients(found, [hidden, weight])
    expected = chunked_token_stats(hidden, weight, token_id)
    assert torch.equal(found.logp, expected.logp)
    torch.testing.assert_close(slopes, gradients(expected, [hidden, weight]), rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_of_minus_infinity_take_no_share(softcap):
    hidden, weight, bias, token_id = problem()
    masked = torch.arange(V) % 3 == 0
    token_id = torch.where(token_id % 3 == 0, token_id + 1, token_id)
    removed = bias.detach().masked_fill(masked, -INF).requires_grad_()
    found = chunked_token_stats(hidden, weight, token_id, bias=removed, softcap=softcap, chunk_rows=3)
    expected = whole(hidden, weight, token_id, bias=removed, softcap=softcap)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    tensors = [hidden, weight, removed]
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors), rtol=1e-12, atol=1e-12)
    assert not found.violations(torch.ones(B, T)).any()


def test_a_sampled_token_without_probability_is_kept_as_minus_infinity():
    bias = torch.zeros(V).index_fill(0, torch.tensor([3]), -INF)
    stats = chunked_token_stats(torch.zeros(1, 1, H), torch.zeros(V, H), torch.tensor([[3]]), bias=bias)
    assert stats.logp.item() == -INF
    assert stats.entropy.item() == pytest.approx(math.log(V - 1), rel=1e-6)


def test_only_logp_carries_the_graph():
    hidden, weight, _, token_id = problem()
    stats = chunked_token_stats(hidden, weight, token_id)
    assert stats.logp.requires_grad and not stats.entropy.requires_grad and not stats.sum_p_squared.requires_grad
    with torch.no_grad():
        assert not chunked_token_stats(hidden, weight, token_id).logp.requires_grad


class Products(TorchDispatchMode):
    """Shape, dtype of the factors and dtype of the result of every matrix product."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mm" in str(function):
            self.made.add((tuple(result.shape), args[1].dtype, result.dtype))
        return result


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_requires_no_gradient_gets_none(frozen):
    *tensors, token_id = problem()
    tensors[frozen].requires_grad_(False)
    with Products() as products:
        stats = chunked_token_stats(*tensors[:2], token_id, bias=tensors[2], chunk_rows=1)
        stats.logp.sum().backward()
    assert [x.grad is None for x in tensors] == [i == frozen for i in range(3)]
    # one row's logits, the gradient of its hidden state and that of the weight: what is not wanted is not computed
    expected = [(1, V)] + [(1, H)] * (frozen != 0) + [(V, H)] * (frozen != 1)
    assert sorted(shape for shape, *_ in products.made) == sorted(expected)


def test_no_tokens():
    hidden, weight, bias, token_id = problem(shape=(2, 0, H, V))
    stats = chunked_token_stats(hidden, weight, token_id, bias=bias)
    stats.logp.sum().backward()
    assert stats.logp.shape == stats.entropy.shape == (2, 0) and not weight.grad.any() and not bias.grad.any()


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation allocated."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        new = [x.numel() for x in made if x.untyped_storage()._cdata not in given]  # neither a view nor in place
        self.numel = max([self.numel, *new])
        return result


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_tensor_holds_all_logits(softcap):
    b, t, h, v, chunk_rows = 4, 50, 8, 300, 16
    hidden, weight, bias, token_id = problem(dtype=torch.float32, shape=(b, t, h, v))
    largest = {}
    for path, options in ((whole, {}), (chunked_token_stats, {"chunk_rows": chunk_rows})):
        with LargestTensor() as forward:
            stats = path(hidden, weight, token_id, bias=bias, softcap=softcap, **options)
        with LargestTensor() as backward:
            stats.logp.sum().backward()
        largest[path] = forward.numel, backward.numel
    assert largest[whole] == (b * t * v, b * t * v)
    assert largest[chunked_token_stats] == (chunk_rows * v, chunk_rows * v)


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: .item(), a branch on a tensor and nonzero all raise."""
    with FakeTensorMode():
        hidden, weight = (torch.randn(size, requires_grad=True) for size in ((B, T, H), (V, H)))
        token_id, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)
        stats = chunked_token_stats(hidden, weight, token_id, softcap=5.0, temperature=0.5, chunk_rows=3)
        stats.logp.sum().backward()
        stats.violations(mask)
        spot_check(hidden, weight, token_id, stats.logp, mask, softcap=5.0, temperature=0.5)


def test_on_cuda_half_precision_is_multiplied_as_it_is_and_summed_in_float32(monkeypatch):
    """On meta tensors, which have the products that CUDA has and the CPU has not, but no values."""

    def dtypes(device, *names):
        tensors = [SimpleNamespace(dtype=getattr(torch, name), device=SimpleNamespace(type=device)) for name in names]
        return tuple(str(dtype).removeprefix("torch.") for dtype in module._dtypes(*tensors))

    assert dtypes("cuda", "bfloat16", "bfloat16") == ("bfloat16", "float32")
    assert dtypes("cuda", "float16", "float16") == ("float16", "float32")
    assert dtypes("cuda", "bfloat16", "float32") == dtypes("cuda", "float32", "float32") == ("float32", "float32")
    assert dtypes("cpu", "bfloat16", "bfloat16") == ("float32", "float32")
    assert dtypes("cuda", "float64", "float64") == dtypes("cpu", "float32", "float64") == ("float64", "float64")

    monkeypatch.setattr(module, "_dtypes", lambda *_: (torch.bfloat16, torch.float32))
    hidden, weight, bias = (
        torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in ((B, T, H), (V, H), (V,))
    )
    token_id = torch.empty(B, T, dtype=torch.int64, device="meta")
    with Products() as products:
        stats = chunked_token_stats(hidden, weight, token_id, bias=bias, softcap=5.0, temperature=0.5, chunk_rows=3)
        stats.logp.sum().backward()
    assert {getattr(stats, name).dtype for name in FIELDS} == {torch.float32}
    assert {x.grad.dtype for x in (hidden, weight, bias)} == {torch.bfloat16}
    # nine rows in three chunks and the tenth alone; the gradient of hidden is done in one product and not summed
    half, single = torch.bfloat16, torch.float32
    expected = {(shape, half, single) for shape in ((3, V), (1, V), (V, H))} | {
        (shape, half, half) for shape in ((3, H), (1, H))
    }
    assert products.made == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_on_cuda(dtype):
    *tensors, token_id = problem(dtype=dtype, shape=(2, 30, 16, 500))
    there = [x.detach().cuda().requires_grad_() for x in tensors]
    torch.cuda.set_sync_debug_mode("error")
    found = chunked_token_stats(*there[:2], token_id.cuda(), bias=there[2], chunk_rows=13)
    slopes = gradients(found, there)
    torch.cuda.set_sync_debug_mode("default")
    expected = chunked_token_stats(*tensors[:2], token_id, bias=tensors[2], chunk_rows=13)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=1e-4, atol=1e-4)
    # in bfloat16 the slopes of the logits are rounded too, and their errors add up over 500 tokens
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for mine, reference in zip(slopes, gradients(expected, tensors), strict=True):
        torch.testing.assert_close(mine.cpu(), reference, rtol=tolerance, atol=tolerance)


def test_the_default_chunk_fills_its_budget():
    assert default_chunk_rows(32_000, torch.device("cpu")) == 64 * 2**20 // (4 * 32_000)
    assert default_chunk_rows(10**9, torch.device("cpu")) == 1


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"hidden": torch.zeros(T, H)}, r"hidden has shape \(5, 6\), weight \(11, 6\).* allowed are \(B, T, H\)"),
        ({"weight": torch.zeros(H, V)}, r"weight \(6, 11\) and bias None, allowed"),
        ({"weight": torch.zeros(V)}, r"weight \(11,\)"),
        ({"bias": torch.zeros(V + 1)}, r"bias \(12,\), allowed"),
        ({"token_id": torch.zeros(B, T + 1, dtype=torch.int64)}, r"token_id has shape \(2, 6\).* allowed are \(2, 5\)"),
        ({"token_id": torch.zeros(B, T)}, r"dtype torch.float32, allowed .* torch.int64"),
        ({"hidden": torch.zeros(B, T, H, dtype=torch.int64)}, r"got torch.int64 on cpu, .* floating-point hidden"),
        ({"weight": torch.zeros(V, H, device="meta")}, r"torch.float32 on meta, .* device of token_id"),
        ({"temperature": 0.0}, r"temperature is 0.0, allowed are finite numbers > 0"),
        ({"temperature": math.nan}, r"temperature is nan"),
        ({"softcap": -1.0}, r"softcap is -1.0, allowed are finite numbers > 0\. Give the one of the model, or None"),
        ({"chunk_rows": 0}, r"chunk_rows is 0, allowed are whole numbers ≥ 1\. Leave it out"),
    ],
)
def test_what_does_not_fit_is_named(changes, said):
    arguments = {"hidden": torch.zeros(B, T, H), "weight": torch.zeros(V, H), "token_id": torch.zeros(B, T).long()}
    with pytest.raises(BatchError, match=f"^chunked_token_stats: .*{said}"):
        chunked_token_stats(**{**arguments, **changes})
