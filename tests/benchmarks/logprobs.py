"""Log-probability, entropy and Σp² of 4096 tokens: whole logits against chunks

Forward and backward, gradients for hidden states and weight, each path in processes of its own. Memory is the largest
resident set above what is resident once the inputs exist; both gradients, 71 MiB, are in it. Linux only. Seconds are
the median of the passes after the first. torch's own kernel returns log p alone, without entropy and Σp².
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear_cross_entropy

from mhpo_core.chunked_logprobs import chunked_token_stats
from mhpo_core.logprobs import token_stats

TOKENS, VOCABULARY, HIDDEN, PASSES = 4096, 32_000, 512, 4


def _whole(hidden: Tensor, weight: Tensor, token_id: Tensor) -> Tensor:
    return token_stats(hidden @ weight.t(), token_id).logp


def _chunked(hidden: Tensor, weight: Tensor, token_id: Tensor) -> Tensor:
    return chunked_token_stats(hidden, weight, token_id).logp


def _torch(hidden: Tensor, weight: Tensor, token_id: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -linear_cross_entropy(hidden[0], weight, token_id[0], reduction="none", options=options)


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "whole logits": _whole,
    "chunked": _chunked,
    "linear_cross_entropy (log p only)": _torch,
}


def run() -> Iterator[str]:
    """One row per path and number of threads."""
    logits = TOKENS * VOCABULARY / 2**18
    yield f"T = {TOKENS}, V = {VOCABULARY}, H = {HIDDEN}, float32; all logits are {logits:.0f} MiB."
    yield ""
    yield "| path | torch threads | peak MiB | forward s | backward s | both s |"
    yield "|---|---|---|---|---|---|"
    for threads in (1, 2):
        for name in PATHS:
            command = [sys.executable, "-m", "tests.benchmarks.logprobs", name, str(threads)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peak, forward, backward = map(float, printed.split())
            yield f"| {name} | {threads} | {peak:.0f} | {forward:.2f} | {backward:.2f} | {forward + backward:.2f} |"


def _measure(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    weight = (torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5).requires_grad_()
    token_id = torch.randint(VOCABULARY, (1, TOKENS))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before, seconds = pages * resource.getpagesize() / 2**20, []
    for _ in range(PASSES):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        logp = PATHS[name](hidden, weight, token_id)
        between = time.perf_counter()
        logp.sum().backward()
        seconds.append((between - started, time.perf_counter() - between))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
    print(peak - before, *np.median(seconds[1:], axis=0))


if __name__ == "__main__":
    _measure(sys.argv[1], int(sys.argv[2]))
