"""Log-probability, entropy and collision probability of sampled tokens, from hidden states, a few rows at a time.

The (B, T, V) logits never exist: each chunk of rows is reduced at once, and the backward pass computes it again. No
third-party kernel is the default because none returns Σp² and an entropy in float32; the best one, Liger's, computes
the entropy in the dtype of its input and keeps its logits out of memory only on Hopper GPUs.

Shape letters: B sequences, T response tokens, N = B·T rows, R rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhpo_core.errors import BatchError
from mhpo_core.logprobs import TokenStats

_CPU_BYTES = 64 * 2**20
# 4 GiB where there are 80 GB: about 4096 rows of 152k tokens. Below about 256 rows a GPU reads the weight more slowly
# than it multiplies, and each chunk also reads and writes the whole weight gradient once
_CUDA_BYTES, _CUDA_SHARE, _CUDA_MIN_ROWS = 4 * 2**30, 20, 1024


def chunked_token_stats(
    hidden: Tensor,
    weight: Tensor,
    token_id: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> TokenStats:
    """log p, H and Σp² of softmax(c·tanh((hidden·weightᵀ + bias) / c) / temperature), c = softcap, without c no tanh.

    The same numbers as `token_stats` of these logits, at R·V instead of several N·V of memory, forward and backward;
    the price is one more hidden·weightᵀ in the backward pass. Sums run in float32, in float64 if a tensor is; half
    precision is multiplied as it is on CUDA and as float32 on the CPU. A logit of −inf takes no share of H and Σp².
    Nothing waits for the device. An id outside [0, V) is not looked for: it fails as it does in `torch.gather`.

    Args:
        hidden: (B, T, H), any float dtype.
        weight: (V, H), of the output embedding.
        token_id: (B, T) int64, the sampled tokens.
        bias: (V,).
        temperature: the sampler's, > 0.
        softcap: > 0, the bound that Gemma 2 puts on its logits (`final_logit_softcapping`).
        chunk_rows: R ≥ 1; None takes `default_chunk_rows`.

    Returns:
        logp with gradients for hidden, weight and bias, whichever require them; entropy and Σp² carry no graph.

    Raises:
        BatchError: shapes, dtypes or devices do not fit, or a number is out of range.

    Source: the chunking of torch.nn.functional.linear_cross_entropy, its recomputing backward; H and Σp² added.
    """
    _check_tensors(hidden, weight, token_id, bias)
    _check_numbers(temperature, softcap, chunk_rows)
    rows = default_chunk_rows(weight.shape[0], hidden.device) if chunk_rows is None else chunk_rows
    logp, entropy, sum_p_squared = _ChunkedTokenStats.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, token_id.reshape(-1, 1), temperature, softcap, rows
    )
    return TokenStats(
        logp=logp.view(token_id.shape),
        entropy=entropy.view(token_id.shape),
        sum_p_squared=sum_p_squared.view(token_id.shape),
        vocabulary_size=weight.shape[0],
    )


def default_chunk_rows(vocabulary_size: int, device: torch.device) -> int:
    """R so that a chunk's float32 logits fill 64 MiB on the CPU, and with their half-precision copy 4 GiB on CUDA.

    The forward pass needs a second such chunk. On CUDA never fewer than 1024 rows, and at most 1/20 of the memory.

    Args:
        vocabulary_size: V.
        device: where the hidden states are.
    """
    if device.type != "cuda":
        return max(1, _CPU_BYTES // (4 * vocabulary_size))
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(_CUDA_MIN_ROWS, min(_CUDA_BYTES, memory // _CUDA_SHARE) // (6 * vocabulary_size))


class _ChunkedTokenStats(torch.autograd.Function):
    # every matrix product is in place or names its `out`: those are the ones that autocast leaves in their dtype

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_id: Tensor,
        temperature: float,
        softcap: float | None,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = _Logits.of(hidden, weight, bias, temperature, softcap, chunk_rows)
        exponentials = torch.empty_like(logits.buffer)
        logp, entropy, sum_p_squared, normalizer = (logits.buffer.new_empty(len(hidden), 1) for _ in range(4))
        for rows in logits.chunks(hidden):
            z = logits.write(hidden[rows])
            at_token, largest = z.gather(1, token_id[rows]), z.amax(dim=1, keepdim=True)
            e = torch.exp(z.sub_(largest), out=exponentials[: len(z)])
            total = e.sum(dim=1, keepdim=True)
            log_total = total.log()
            logp[rows] = at_token - largest - log_total
            normalizer[rows] = largest + log_total
            sum_p_squared[rows] = (torch.linalg.vector_norm(e, dim=1, keepdim=True) / total).square()
            # a logit of −inf has e = 0, and 0·(−inf) would be NaN
            z.clamp_(min=torch.finfo(z.dtype).min).mul_(e)
            entropy[rows] = log_total - z.sum(dim=1, keepdim=True) / total
        ctx.save_for_backward(hidden, weight, bias, token_id, normalizer)
        ctx.numbers = temperature, softcap, chunk_rows
        ctx.mark_non_differentiable(entropy, sum_p_squared)
        ctx.set_materialize_grads(False)
        return logp, entropy, sum_p_squared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """∂logp/∂z = onehot − p, chunk by chunk into the gradients that are asked for."""
        if grad_logp is None:
            return (None,) * 7
        hidden, weight, bias, token_id, normalizer = ctx.saved_tensors
        logits = _Logits.of(hidden, weight, bias, *ctx.numbers)
        sums = logits.buffer.dtype
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if for_bias else None
        for rows in logits.chunks(hidden):
            z, at_token = logits.write(hidden[rows]), token_id[rows]
            upstream = grad_logp[rows] / logits.temperature
            slope = logits.softcap_slope(z)
            z.sub_(normalizer[rows]).exp_().mul_(-upstream)
            # not scatter_add_, which is refused on CUDA where deterministic algorithms are asked for
            z.scatter_(1, at_token, z.gather(1, at_token) + upstream)
            if slope is not None:
                z.mul_(slope)
            operand = z.to(logits.weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(operand, logits.weight, out=operand.new_empty(len(z), hidden.shape[1]))
            if grad_weight is not None:
                _add_product(grad_weight, operand.t(), hidden[rows].to(operand.dtype))
            if grad_bias is not None:
                grad_bias += z.sum(dim=0)
        # autograd itself rounds the sums to the dtype of the tensor they belong to
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


@dataclass(frozen=True)
class _Logits:
    """Logits of one chunk after another, written into the same memory.

    Args:
        weight: (V, H), in the dtype it is multiplied in.
        buffer: (R, V), in the dtype of the sums.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    buffer: Tensor

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
        chunk_rows: int,
    ) -> _Logits:
        factors, sums = _dtypes(hidden, weight)
        buffer = hidden.new_empty(min(chunk_rows, len(hidden)), len(weight), dtype=sums)
        return cls(weight.to(factors), bias, temperature, softcap, buffer)

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """The rows of hidden, as many at a time as the buffer has."""
        for start in range(0, len(hidden), max(1, len(self.buffer))):
            yield slice(start, start + len(self.buffer))

    def write(self, hidden: Tensor) -> Tensor:
        """(R, V), the buffer."""
        z = _product(hidden.to(self.weight.dtype), self.weight.t(), self.buffer[: len(hidden)])
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z if self.temperature == 1.0 else z.div_(self.temperature)

    def softcap_slope(self, z: Tensor) -> Tensor | None:
        """1 − tanh², read from z."""
        if self.softcap is None:
            return None
        return (z * (self.temperature / self.softcap)).square_().neg_().add_(1.0)


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtype of the factors and of the sums of every matrix product."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64, torch.float64
    if hidden.device.type == "cuda" and hidden.dtype == weight.dtype:
        return hidden.dtype, torch.float32
    # on a CPU half precision is slower than float32
    return torch.float32, torch.float32


# `out_dtype` exists on CUDA only, and `_dtypes` asks for it nowhere else


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype, out=torch.empty_like(total))


def _check_tensors(hidden: Tensor, weight: Tensor, token_id: Tensor, bias: Tensor | None) -> None:
    size = weight.shape[0] if weight.dim() == 2 else "V"
    bias_shape = None if bias is None else tuple(bias.shape)
    if (
        (hidden.dim(), weight.dim()) != (3, 2)
        or hidden.shape[2] != weight.shape[1]
        or bias_shape not in (None, (size,))
    ):
        raise BatchError(
            f"chunked_token_stats: hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)} and bias "
            f"{bias_shape}, allowed are (B, T, H), (V, H) and (V,) or None. "
            "Pass the hidden states before the output embedding, and its weight and bias as they are."
        )
    if token_id.shape != hidden.shape[:2] or token_id.dtype != torch.int64:
        raise BatchError(
            f"chunked_token_stats: token_id has shape {tuple(token_id.shape)} and dtype {token_id.dtype}, allowed are "
            f"{tuple(hidden.shape[:2])} and torch.int64. Pass one sampled id per hidden state."
        )
    floats = [hidden, weight] if bias is None else [hidden, weight, bias]
    if not all(t.is_floating_point() for t in floats) or len({t.device for t in (*floats, token_id)}) > 1:
        found = ", ".join(f"{t.dtype} on {t.device}" for t in (*floats, token_id))
        raise BatchError(
            f"chunked_token_stats: got {found}, allowed are floating-point hidden, weight and bias on the device of "
            "token_id. Convert them with .to()."
        )


def _check_numbers(temperature: float, softcap: float | None, chunk_rows: int | None) -> None:
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise BatchError(
                f"chunked_token_stats: {name} is {value}, allowed are finite numbers > 0. Give the one of the "
                f"{'sampler' if name == 'temperature' else 'model, or None'}."
            )
    if chunk_rows is not None and chunk_rows < 1:
        raise BatchError(
            f"chunked_token_stats: chunk_rows is {chunk_rows}, allowed are whole numbers ≥ 1. "
            "Leave it out for the default."
        )
