"""Norms and clipping of DTensor gradients on two real ranks (gloo, CPU), against the same model in one process.

Run as a script, this file is one rank: `test_gradients_distributed.py RANK FOLDER` does every scenario once and leaves
what it found in FOLDER; the tests compare.

Shape letters: B sequences, T tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhpo_core
from mhpo_core.gradients import clip_gradients, gradient_norms, parameter_group

RANKS = 2
TIMEOUT = 120.0
MICRO_BATCHES = 2
MAX_NORM = 0.5


# what every rank and the reference share


def qwen2(dtype: torch.dtype) -> nn.Module:
    """2 layers; 19 words over 2 ranks is an uneven split."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def backward(model: nn.Module, ids: Tensor, share: float = 1.0) -> None:
    logits = model(input_ids=ids, use_cache=False).logits.double()
    (share * nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())).backward()


def token_ids() -> Tensor:
    return torch.randint(19, (2 * RANKS * MICRO_BATCHES, 6), generator=torch.Generator().manual_seed(1))


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor_parallel_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


# one rank


def fully_sharded(mesh: Any, dtype: torch.dtype) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    model = qwen2(dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = token_ids()[mesh.get_rank() :: RANKS].chunk(MICRO_BATCHES)
    for i, ids in enumerate(mine):
        model.set_requires_gradient_sync(i + 1 == MICRO_BATCHES)
        backward(model, ids, 1 / MICRO_BATCHES)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    measured = asdict(gradient_norms(model.named_parameters()))
    with CommDebugMode() as communication:
        clipped = asdict(clip_gradients(model.named_parameters(), MAX_NORM))
    ours = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = before[name]
    total = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).full_tensor()
    theirs = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    collectives = {str(k): v for k, v in communication.get_comm_counts().items()}
    return dict(zip(
        ("norms", "clipped", "gradients", "torch_total", "torch_gradients", "collectives"),
        (measured, clipped, ours, total, theirs, collectives), strict=True,
    ))  # fmt: skip


def nonfinite_on_the_second_rank(mesh: Any, bad: float) -> dict[str, Any]:
    named = mixed(mesh)
    dict(named)["layers.0.mlp.weight"].grad.to_local()[-1, -1] = bad if mesh.get_rank() == 1 else 1.0
    found = asdict(clip_gradients(named, MAX_NORM))
    return {"norms": found, "gradients": {n: p.grad.to_local() for n, p in named if hasattr(p.grad, "to_local")}}


def mixed(mesh: Any) -> list[tuple[str, nn.Parameter]]:
    """Every layout at once: see `whole_mixed` for the same in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    other = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    layouts: dict[str, tuple[Any, list[Any]] | None] = {
        "layers.0.mlp.weight": (mesh, [Shard(0)]),
        "layers.0.mlp.bias": (mesh, [Shard(0)]),  # one element: none on the second rank
        "layers.0.norm.weight": (mesh, [Replicate()]),
        "layers.1.mlp.weight": (other, [Replicate(), Shard(1)]),
        "layers.1.mlp.bias": (other, [Shard(0), Replicate()]),
        "layers.1.norm.weight": (mesh, [Replicate()]),  # its gradient is a sum yet to be made
        "layers.1.attn.weight": (mesh, [Shard(0)]),  # the second rank has no gradient
        "layers.1.frozen.weight": (mesh, [Shard(0)]),  # no rank has one
        "head.weight": (mesh, [Shard(1)]),  # bfloat16
        "double.weight": (mesh, [Shard(0)]),
        "plain.weight": None,
    }
    named = []
    for (name, weight, gradient), layout in zip(whole_mixed(), layouts.values(), strict=True):
        if layout:
            weight = distribute_tensor(weight, *layout)
            gradient = distribute_tensor(gradient, *layout) if gradient is not None else None
        made = nn.Parameter(weight)
        if name == "layers.1.norm.weight":
            share = 0.25 if mesh.get_rank() == 0 else 0.75
            gradient = DTensor.from_local(gradient.to_local() * share, mesh, [Partial()])
        if name != "layers.1.attn.weight" or mesh.get_rank() == 0:
            made.grad = gradient
        named.append((name, made))
    assert list(layouts) == [name for name, _ in named]
    return named


def whole_mixed() -> list[tuple[str, Tensor, Tensor | None]]:
    """(name, weight, gradient) of one process."""
    shapes: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        ("layers.0.mlp.weight", (5, 3), torch.float32),
        ("layers.0.mlp.bias", (1,), torch.float32),
        ("layers.0.norm.weight", (4,), torch.float32),
        ("layers.1.mlp.weight", (3, 4), torch.float32),
        ("layers.1.mlp.bias", (3,), torch.float32),
        ("layers.1.norm.weight", (4,), torch.float32),
        ("layers.1.attn.weight", (4, 2), torch.float32),
        ("layers.1.frozen.weight", (4, 2), torch.float32),
        ("head.weight", (4, 6), torch.bfloat16),
        ("double.weight", (4,), torch.float64),
        ("plain.weight", (2, 2), torch.float32),
    ]
    made: list[tuple[str, Tensor, Tensor | None]] = []
    for seed, (name, shape, dtype) in enumerate(shapes):
        weight, gradient = values(seed, *shape).to(dtype), values(100 + seed, *shape).to(dtype)
        if name == "layers.1.attn.weight":
            gradient[2:] = 0.0  # the second rank's half, which has no gradient
        made.append((name, weight, None if "frozen" in name else gradient))
    return made


def mixed_scenario(mesh: Any) -> dict[str, Any]:
    named = mixed(mesh)
    found = asdict(clip_gradients(named, MAX_NORM))
    gradients = {n: p.grad for n, p in named if p.grad is not None and "attn" not in n}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
    half = dict(named)["layers.1.attn.weight"].grad
    return {"norms": found, "gradients": whole, "half": None if half is None else half.to_local()}


def tensor_parallel(mesh: Any) -> dict[str, Any]:
    from torch.distributed.tensor import Shard, parallel

    model = tensor_parallel_model()
    plan = {
        "0": parallel.SequenceParallel(),
        "1": parallel.ColwiseParallel(input_layouts=Shard(1)),
        "3": parallel.RowwiseParallel(),
    }
    parallel.parallelize_module(model, mesh, plan)
    model(values(50, 3, 4, 6).chunk(RANKS, dim=1)[mesh.get_rank()]).square().sum().backward()
    placements = {n: str(p.grad.placements) for n, p in model.named_parameters()}
    found = asdict(clip_gradients(model.named_parameters(), MAX_NORM))
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    return {"norms": found, "gradients": gradients, "placements": placements}


def one_rank(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    # a file to meet at: no port that another process could take
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT / 2),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {
        "float32": fully_sharded(mesh, torch.float32),
        "float64": fully_sharded(mesh, torch.float64),
        "mixed": mixed_scenario(mesh),
        "tensor_parallel": tensor_parallel(mesh),
        "nan": nonfinite_on_the_second_rank(mesh, float("nan")),
        "inf": nonfinite_on_the_second_rank(mesh, float("inf")),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


# the tests


def run_ranks(folder: Path) -> list[subprocess.Popen[bytes]]:
    # the package that pytest imported, whatever is installed
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(mhpo_core.__file__).parents[1])}
    started = []
    for rank in range(RANKS):
        with open(folder / f"{rank}.log", "wb") as log:
            command = [sys.executable, __file__, str(rank), str(folder)]
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env))
    return started


def wait_for(ranks: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all ended well; as soon as one fails the others wait for it in vain."""
    deadline = time.monotonic() + TIMEOUT
    while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    if any(r.poll() != 0 for r in ranks):
        logs = "\n".join(f"rank {i}: {r.poll()}\n{(folder / f'{i}.log').read_text()}" for i, r in enumerate(ranks))
        pytest.fail(f"the ranks did not end well in {TIMEOUT:.0f} s (None = still running)\n{logs}")


@pytest.fixture(scope="module")
def reference() -> dict[str, list[tuple[str, Tensor, Tensor | None]]]:
    """scenario → (name, weight, gradient before clipping) in one process, from one backward pass over all rows."""
    models = {"float32": qwen2(torch.float32), "float64": qwen2(torch.float64)}
    for model in models.values():
        backward(model, token_ids())
    models["tensor_parallel"] = tensor_parallel_model()
    models["tensor_parallel"](values(50, 3, 4, 6)).square().sum().backward()
    taken = {k: [(n, p.detach(), p.grad) for n, p in model.named_parameters()] for k, model in models.items()}
    return {**taken, "mixed": whole_mixed()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank found: scenario → result."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = run_ranks(folder)
    try:
        request.getfixturevalue("reference")  # meanwhile
        wait_for(ranks, folder)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def grouped(named: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    squares: dict[str, float] = defaultdict(float)
    for name, tensor in named:
        squares[parameter_group(name)] += tensor.double().square().sum().item()
    return {group: square**0.5 for group, square in squares.items()}


def distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖"""
    one, other = one.double(), other.double()
    return ((one - other).norm() / other.norm()).item()


SCENARIOS = {"float32": 1e-6, "float64": 1e-12, "mixed": 1e-6, "tensor_parallel": 1e-12}


@pytest.mark.parametrize(("scenario", "tolerance"), SCENARIOS.items())
def test_the_norms_are_those_of_one_process(found, reference, scenario, tolerance):
    trained = [(name, weight, gradient) for name, weight, gradient in reference[scenario] if gradient is not None]
    gradients, weights = grouped((n, g) for n, _, g in trained), grouped((n, w) for n, w, _ in trained)
    total = sum(norm**2 for norm in gradients.values()) ** 0.5
    for rank in found:
        norms = rank[scenario]["norms"]
        assert norms["by_group"] == pytest.approx(gradients, rel=tolerance, abs=0)
        assert norms["weight_by_group"] == pytest.approx(weights, rel=tolerance, abs=0)
        assert norms["total"] == pytest.approx(total, rel=tolerance, abs=0)
        assert norms["nonfinite_by_group"] == dict.fromkeys(gradients, 0)
        assert norms == found[0][scenario]["norms"]
        assert rank[scenario].get("clipped", norms) == norms  # gradient_norms and clip_gradients


@pytest.mark.parametrize(("scenario", "tolerance"), SCENARIOS.items())
def test_the_clipped_gradients_are_those_of_one_process(found, reference, scenario, tolerance):
    gradients = {name: gradient.double() for name, _, gradient in reference[scenario] if gradient is not None}
    total = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    assert total > 1.2 * MAX_NORM
    for rank in found:
        clipped = rank[scenario]["gradients"]
        # of the half gradient see below
        assert gradients.keys() - clipped.keys() == ({"layers.1.attn.weight"} if scenario == "mixed" else set())
        for name, gradient in clipped.items():
            # bfloat16 keeps 8 bits: an element is off by 2⁻⁸ of itself at most
            allowed = 2**-8 if gradient.dtype == torch.bfloat16 else tolerance
            assert distance(gradient, gradients[name] * MAX_NORM / (total + 1e-6)) <= allowed, name


@pytest.mark.parametrize("scenario", ["float32", "float64"])
def test_clipping_is_that_of_torch_on_the_same_ranks(found, scenario):
    for rank in found:
        result = rank[scenario]
        assert result["clipped"]["total"] == pytest.approx(result["torch_total"].item(), rel=SCENARIOS[scenario])
        for name, gradient in result["gradients"].items():
            assert distance(gradient, result["torch_gradients"][name]) <= SCENARIOS[scenario]


@pytest.mark.parametrize("scenario", ["float32", "float64"])
def test_gradients_and_weights_cost_one_collective(found, scenario):
    for rank in found:
        assert rank[scenario]["collectives"] == {"c10d_functional.all_reduce": 1}


def test_the_half_gradient_of_one_rank_is_clipped(found, reference):
    # the second rank has none, and the first its half: rows 0 and 1
    (expected,) = (gradient[:2] for name, _, gradient in reference["mixed"] if name == "layers.1.attn.weight")
    first, second = (rank["mixed"]["half"] for rank in found)
    assert second is None
    assert distance(first, expected * MAX_NORM / found[0]["mixed"]["norms"]["total"]) <= 2e-6


def test_tensor_parallelism_leaves_sums_to_be_made(found):
    # else the scenario does not show that they are made before the norm is taken
    assert found[0]["tensor_parallel"]["placements"]["0.weight"] == "(Partial(sum),)"


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_nonfinite_element_on_one_rank_is_seen_by_all(found, bad):
    for number, rank in enumerate(found):
        norms, gradients = rank[bad]["norms"], rank[bad]["gradients"]
        assert str(norms["total"]) == str(norms["by_group"]["layers.0.mlp"]) == bad
        assert {g for g, count in norms["nonfinite_by_group"].items() if count} == {"layers.0.mlp"}
        assert norms["nonfinite_by_group"]["layers.0.mlp"] == 1
        assert norms["by_group"]["head"] == found[0]["mixed"]["norms"]["by_group"]["head"]
        for name, gradient in gradients.items():
            at_nan = gradient.isnan()
            if bad == "nan":
                assert at_nan.all()
            else:  # Inf·0 = NaN where the infinity was, 0 elsewhere
                assert at_nan.sum() == (name == "layers.0.mlp.weight" and number == 1)
                assert not gradient[~at_nan].any()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), Path(sys.argv[2]))
