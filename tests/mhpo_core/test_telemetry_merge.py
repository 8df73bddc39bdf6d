"""Parts of a step merge to the whole: any split, any order, and no value is read back from the device on the way."""

from __future__ import annotations

import math
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mhpo_core import TokenBatch, objectives
from mhpo_core.errors import BatchError
from mhpo_core.metrics import QUANTILE_LEVELS
from mhpo_core.objectives import OBJECTIVES
from mhpo_core.telemetry import accumulate, measure, merge, scalars_of
from mhpo_core.telemetry.accumulators import OUTLIERS
from mhpo_core.telemetry.one_pass import _largest

# operators that hand a value or a data-dependent shape to the host; indexing does with a Boolean mask
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "index by bool")
# whole sequences stay together in any split
EXACT = ("counts", "minima", "maxima", "bin_count", "bin_advantage")


def rows(batch, chosen) -> TokenBatch:
    present = {f.name: getattr(batch, f.name) for f in fields(batch) if getattr(batch, f.name) is not None}
    return TokenBatch(**{name: values[chosen] for name, values in present.items()})


def spoiled(batch) -> TokenBatch:
    """Some NaN and ±Inf at trained positions."""
    old = batch.logp_old.clone()
    old[0, 0], old[1, 1], old[2, 0] = math.nan, math.inf, -math.inf
    return replace(batch, logp_old=old)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=st.integers(0, 10**6), data=st.data())
@settings(deadline=None, max_examples=10)
def test_any_split_merges_to_the_whole(name, seed, data, random_batch):
    objective, batch = objectives.create(name), spoiled(random_batch(seed, 9, 11))
    batch = rows(batch, batch.mask.any(dim=1).nonzero().ravel())
    n = batch.n_sequences
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3)))
    pieces = [rows(batch, slice(a, b)) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    whole, merged = accumulate(batch, objective), merge([accumulate(p, objective) for p in pieces])
    for field in EXACT:
        assert torch.equal(getattr(merged, field), getattr(whole, field)), field
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-10, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(merged.bin_weight, whole.bin_weight, rtol=1e-10, atol=0)
    assert merged.n_rows == n
    torch.testing.assert_close(
        merged.outliers[..., 0].abs(), whole.outliers[..., 0].abs(), rtol=0, atol=0, equal_nan=True
    )


def test_merging_is_associative_and_takes_any_order(random_batch):
    parts = [accumulate(random_batch(seed, 3, 5), objectives.create("mhpo")) for seed in range(4)]
    together, nested = merge(parts), merge([merge(parts[:2]), merge(parts[2:])])
    backwards = merge(parts[::-1])
    for field in EXACT:
        assert torch.equal(getattr(together, field), getattr(nested, field))
        assert torch.equal(getattr(together, field), getattr(backwards, field))
    assert torch.equal(together.outlier_place, nested.outlier_place)


def test_outliers_point_at_the_largest_ratios_of_each_side(random_batch):
    batches = [random_batch(seed, 6, 20) for seed in range(3)]
    merged = merge([accumulate(b, objectives.create("grpo")) for b in batches])
    ratio = torch.cat([(b.logp_new - b.logp_old).masked_fill(~b.mask, math.nan) for b in batches])
    advantage = torch.cat([b.advantage for b in batches])
    for side, here in enumerate((advantage > 0, advantage < 0)):
        expected = ratio[here & ~ratio.isnan()].abs().sort(descending=True).values[:OUTLIERS]
        found, place = merged.outliers[side, :, 0], merged.outlier_place[side]
        torch.testing.assert_close(found[: len(expected)].abs(), expected, rtol=0, atol=0)
        assert torch.equal(ratio[place[: len(expected), 0], place[: len(expected), 1]], found[: len(expected)])
        assert found[len(expected) :].isnan().all() and (place[len(expected) :] == -1).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scalars_of_the_sums_are_those_of_the_exact_pass(name, random_batch):
    batch, objective = random_batch(11, 30, 40), objectives.create(name)
    exact, found = measure(batch, objective).scalars, scalars_of(accumulate(batch, objective))
    assert set(found) == set(exact)
    for metric, value in exact.items():
        by_bins = metric.endswith(("top1_share", *QUANTILE_LEVELS)) or any(f"_{q}_" in metric for q in QUANTILE_LEVELS)
        if value is None:
            assert found[metric] is None, metric
        elif not by_bins:
            assert found[metric] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), metric
        else:  # within a bin, 1/8 of the value, and the spacing of neighbouring tokens
            assert found[metric] == pytest.approx(value, rel=0.15, abs=0.05), metric


def test_merged_numbers_of_a_narrow_shift_and_of_infinite_ratios():
    # float32, 0.3 ± 1e-4: a variance of squares that float32 cannot tell apart; 5 % of ±Inf are in no quantile
    x = 0.3 + 1e-4 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = math.inf, -math.inf
    batch = TokenBatch(x, torch.zeros_like(x), torch.ones(40), torch.ones_like(x))
    exact = measure(batch, objectives.create("grpo")).scalars
    found = scalars_of(accumulate(batch, objectives.create("grpo")))
    assert found["log_ratio_std"] == pytest.approx(exact["log_ratio_std"], rel=1e-6)
    for name in ("p0001", "p50", "p9999"):
        assert found[f"log_ratio_{name}"] == pytest.approx(exact[f"log_ratio_{name}"], rel=1 / 8)


class _Watched(TorchDispatchMode):
    """Names of all operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if "index" in str(func) and len(args) > 1 and isinstance(args[1], list | tuple) else []
        masked = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        self.names.append("index by bool" if masked else str(func))
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_every_way_of_reading_back():
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    for reads in (values.sum().item, lambda: values[mask], mask.nonzero, lambda: bool(mask.any()), values.unique):
        with _Watched() as watched:
            reads()
        assert any(word in n for n in watched.names for word in WAITING), watched.names


@pytest.mark.parametrize("n", [131_072, 131_073, 400_001])
def test_the_largest_of_a_long_vector_are_found_by_blocks(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    values[-1] = 99.0
    found, place = _largest(values, OUTLIERS)
    assert torch.equal(found, values.topk(OUTLIERS).values) and torch.equal(values[place], found)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_pass_reads_nothing_back(name, random_batch):
    batch, objective = random_batch(0), objectives.create(name)
    accumulate(batch, objective)  # the on-policy multiplier is computed once per objective, on the CPU
    with _Watched() as watched:
        accumulate(batch, objective)
    assert len(watched.names) > 50
    assert not [n for n in watched.names if any(word in n for word in WAITING)]


def test_two_transfers_bring_it_to_the_host(random_batch):
    accumulated = accumulate(random_batch(1), objectives.create("mhpo"))
    with _Watched() as watched:
        there = accumulated.cpu()
    assert sum("cat" in n for n in watched.names) == 2
    for field in fields(accumulated):
        mine, moved = getattr(accumulated, field.name), getattr(there, field.name)
        same = torch.equal(mine.nan_to_num(), moved.nan_to_num()) if isinstance(mine, torch.Tensor) else mine == moved
        assert same, field.name


def test_weights_of_the_advantage_are_exact_in_their_unit(random_batch):
    batch = random_batch(5, 20, 20)
    found = measure(batch, objectives.create("mhpo"))
    for side, here in (("positive", batch.advantage > 0), ("negative", batch.advantage < 0)):
        (histogram,) = [h for h in found.histograms if (h.quantity, h.side) == ("log_ratio", side)]
        total = batch.advantage[batch.mask & here].abs().sum().item()
        assert histogram.advantage_weight.sum() == pytest.approx(total, abs=1e-6 * histogram.count.sum())
        assert np.all(histogram.advantage_weight * 2**20 % 1 == 0)


def test_an_advantage_beyond_the_cap_cannot_overflow():
    one = torch.zeros(1, 1)
    batch = TokenBatch(one, one, torch.tensor([[1e30]]), torch.ones(1, 1))
    found = accumulate(batch, objectives.create("is_pg"))
    assert int(found.bin_advantage.sum()) == 2**38


def test_what_cannot_be_merged(random_batch):
    with pytest.raises(BatchError, match=r"merge: got no part"):
        merge([])
    batch = random_batch(0)
    parts = [accumulate(b, objectives.create("mhpo")) for b in (batch, replace(batch, entropy=None))]
    with pytest.raises(BatchError, match=r"the parts hold different quantities, .* logp_rollout, logp_ref and entropy"):
        merge(parts)


def test_restoring_force_by_hand():
    # M(1) = 1: of the four tokens that an update pulls back, r = 0.05 is below a tenth; r = 100 with A > 0 is not one
    ratio = torch.tensor([[0.05, 0.5, 2.0, 100.0, 100.0]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    batch = TokenBatch(ratio.log(), torch.zeros_like(ratio), advantage, torch.ones_like(ratio))
    assert measure(batch, objectives.create("grpo")).scalars["restoring_lost_fraction"] == 0.25
    # MHPO's multiplier is below a tenth of its own 0.265 at 0.05 and at 100, the sign-aware variant's at neither
    assert measure(batch, objectives.create("mhpo")).scalars["restoring_lost_fraction"] == 0.5
    assert measure(batch, objectives.create("mhpo_sa")).scalars["restoring_lost_fraction"] == 0.0


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("name", ["mhpo", "gspo"])
def test_compiled_is_the_same_pass(name, random_batch):
    objective = objectives.create(name)
    for shape in ((4, 6), (9, 3)):
        batch = random_batch(2, *shape, dtype=torch.float32)
        eager, compiled = accumulate(batch, objective), accumulate(batch, objective, compiled=True)
        assert torch.equal(eager.counts, compiled.counts) and eager.names == compiled.names
        torch.testing.assert_close(eager.sums, compiled.sums, rtol=1e-5, atol=1e-6)
        log_ratio = eager.names.quantities.index("log_ratio")
        assert torch.equal(eager.bin_count[log_ratio], compiled.bin_count[log_ratio])
        assert torch.equal(eager.bin_advantage, compiled.bin_advantage)
