"""Faults: they start when they should, have the size they should, and reach what they should."""

from __future__ import annotations

import pytest
import torch

from mhpo_core.training import train
from mhpo_core.training.faults import FAULTS, LrSpike, Mismatch
from mhpo_core.training.randomness import seeded


@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_acts_before_its_iteration(name):
    fault = FAULTS[name]()
    logp = -torch.rand(8, 5)
    assert fault.report(logp, 0, seeded("cpu", 0)) is logp
    assert fault.lr_factor(0) == 1.0


def test_mismatch_disturbs_its_share_with_its_spread():
    logp = torch.full((400, 500), -1.0)
    fault = Mismatch(at=3, share=0.02, sigma=5.0)
    reported = fault.report(logp, 3, seeded("cpu", 0))
    error = (reported - logp)[reported != logp]
    # 200 000 tokens: 4 standard errors of a share of 0.02 are 0.00125; of a standard deviation of 5, 4·5/√(2·4000)
    assert error.numel() / logp.numel() == pytest.approx(0.02, abs=0.00125)
    assert error.std().item() == pytest.approx(5.0, abs=0.23)
    assert torch.equal(reported, fault.report(logp, 9, seeded("cpu", 0)))


@pytest.mark.parametrize("old_policy", ["rollout", "recomputed"])
def test_mismatch_reaches_logp_old_only_through_the_sampler(tiny, sink, old_policy):
    fault = {"name": "mismatch", "at": 1, "share": 0.5}
    train(tiny(rollout={"old_policy": old_policy}, optimizer={"minibatches": 1}, fault=fault), sink, "cpu")
    clean, disturbed = (row["batch"] for row in sink.steps)
    assert (clean.logp_rollout - clean.logp_new)[clean.mask].abs().max() < 1e-5
    assert (disturbed.logp_rollout - disturbed.logp_new)[disturbed.mask].abs().max() > 1
    old_error = (disturbed.logp_old - disturbed.logp_new)[disturbed.mask].abs().max()
    assert (old_error > 1) if old_policy == "rollout" else (old_error < 1e-5)


def test_mismatch_hits_other_tokens_in_every_iteration(tiny, sink):
    train(
        tiny(iterations=3, optimizer={"minibatches": 1}, fault={"name": "mismatch", "at": 0, "share": 0.5}), sink, "cpu"
    )
    batches = [row["batch"] for row in sink.steps]
    # minibatches are shuffled, so compare which errors occurred and not where
    errors = [{round(e, 3) for e in (b.logp_rollout - b.logp_new)[b.mask].tolist() if abs(e) > 0.1} for b in batches]
    assert all(errors) and not errors[0] & errors[1] | errors[1] & errors[2]


def test_lr_spike_multiplies_the_recorded_rate(tiny, sink):
    train(tiny(iterations=3, fault={"name": "lr-spike", "at": 2, "factor": 4.0}), sink, "cpu")
    assert [row["metrics"]["lr"] for row in sink.steps] == pytest.approx([1e-3] * 4 + [4e-3] * 2)
    assert LrSpike(at=2).lr_factor(1) == 1.0
