"""The OpenRLHF adapter: training stays the same to the bit, and every step is recorded once."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from collectors import Recorder, open_run
from collectors.adapters import openrlhf as adapter
from collectors.adapters.imports import when_imported
from collectors.adapters.worker import Worker
from mhpo_core.batch import TokenBatch
from tests.collectors.adapters.tiny_openrlhf import RESPONSE, experience, make, place, train
from tests.collectors.support import column, rows

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = [[experience(1), experience(2, rows=4)], [experience(3)]]


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MHPO_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("MHPO_OPTIONS", '{"tokens": "all", "fsync": false}')
    monkeypatch.setattr(adapter, "_HERE", Worker("openrlhf"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    place(tmp_path / "lib", monkeypatch)
    yield tmp_path / "run"
    adapter.close()


def trained(recorded: bool, **settings):
    if recorded:
        adapter.setup()
    made = make(**settings)
    losses = train(made, STEPS)
    return losses, [weight.detach().clone() for weight in made.actor.parameters()]


def test_training_is_the_same_to_the_bit_and_all_of_it_is_recorded(run):
    losses, weights = trained(recorded=False)
    assert not run.exists()
    for name in ("openrlhf.models.loss", "openrlhf.models.actor"):
        del sys.modules[name]
    same_losses, same_weights = trained(recorded=True)
    assert all(map(torch.equal, losses, same_losses)) and all(map(torch.equal, weights, same_weights))
    assert adapter.active() == "PolicyLoss"
    adapter.close()
    counts = [int(sum(part.action_mask.sum() for part in parts)) for parts in STEPS]
    with open_run(run) as opened:
        assert rows(opened, "SELECT step, n_sequences, n_tokens, lr, loss FROM steps") == [
            (1, 7, counts[0], 0.5, None), (2, 3, counts[1], 0.5, None),
        ]  # fmt: skip
        stored = column(opened, "SELECT value FROM metrics WHERE name = 'train/policy_loss' ORDER BY step")
        assert stored == pytest.approx([float(losses[0] + losses[1]) / 2, float(losses[2])])
        got = opened.sql("FROM tokens ORDER BY step, sequence_id, position").fetchnumpy()
        parts = [part for micro_batches in STEPS for part in micro_batches]
        masks = [part.action_mask for part in parts]
        for name, values in {
            "token_id": [part.sequences[:, -RESPONSE:] for part in parts],
            "logp_old": [part.action_log_probs for part in parts],
            "logp_rollout": [part.rollout_log_probs for part in parts],
            "advantage": [part.advantages for part in parts],
        }.items():
            given = torch.cat([v[mask] for v, mask in zip(values, masks, strict=True)]).numpy()
            assert np.array_equal(got[name], given), name
        entropy = first_entropy(parts[0])
        assert np.allclose(got["entropy"][: len(entropy)], entropy, atol=1e-5)
        kinds = dict(rows(opened, "SELECT kind, detail FROM events"))
        assert kinds["openrlhf"].startswith("PolicyLoss of openrlhf")


def first_entropy(part) -> np.ndarray:
    """Entropy at the trained tokens before any update, from the weights that every run begins with."""
    actor = make().actor
    logp = actor.model(part.sequences).logits.log_softmax(-1).double()
    entropy = -(logp.exp() * logp).sum(-1)[:, -RESPONSE - 1 : -1]
    return entropy[part.action_mask].detach().numpy()


def test_the_loss_follows_from_the_columns(run):
    losses, _ = trained(recorded=True)
    adapter.close()
    with open_run(run) as opened:
        got = opened.sql("FROM tokens WHERE step = 2").fetchnumpy()
    ratio = np.exp(got["logp_new"].astype(float) - got["logp_old"])
    surrogate = np.minimum(ratio * got["advantage"], ratio.clip(0.8, 1.2) * got["advantage"])
    assert -surrogate.mean() == pytest.approx(float(losses[2]), rel=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"clip_eps_low": 0.1, "clip_eps_high": 0.3}, {"dual_clip": 1.5}, {"policy_loss_type": "gspo"}]
)
def test_the_objective_has_the_gradient_of_the_loss(settings):
    """d loss / d logp = −M·A / N under the token mean, / (B·|y|) where sequences are averaged."""
    loss, part = make(**settings).loss, experience(5)
    generator = torch.Generator().manual_seed(6)
    logp = (part.action_log_probs + 0.4 * torch.randn(part.advantages.shape, generator=generator)).requires_grad_()
    loss(logp, part.action_log_probs, part.advantages, action_mask=part.action_mask)[0].backward()
    batch = TokenBatch(logp.detach(), part.action_log_probs, part.advantages, part.action_mask)
    multiplier = adapter.objective_of(loss).terms(batch).gradient_multiplier
    mask = part.action_mask
    share = len(mask) * mask.sum(dim=1, keepdim=True) if settings.get("policy_loss_type") == "gspo" else mask.sum()
    expected = torch.where(mask, -multiplier * part.advantages / share, 0.0)
    if settings.get("policy_loss_type") == "gspo":  # a sequence shares one ratio: its advantages act as their mean
        assert torch.allclose(logp.grad.sum(dim=1), expected.sum(dim=1), rtol=2e-5, atol=1e-7)
    else:
        assert torch.allclose(logp.grad, expected, rtol=2e-5, atol=1e-8)
    assert ((multiplier - 1).abs() > 0.05).any()


def test_without_a_run_nothing_is_recorded_and_it_is_said_once(run, monkeypatch, caplog):
    monkeypatch.delenv("MHPO_RUN")
    trained(recorded=True)
    assert adapter.active() is None and not run.exists()
    assert sum("MHPO_RUN is not set" in record.message for record in caplog.records) == 1


def broken_record(monkeypatch, run):
    def broken(*args, **kwargs):
        raise OverflowError("no room for this")

    monkeypatch.setattr(Recorder, "record", broken)


def file_in_place_of_the_run(monkeypatch, run):
    run.write_text("a file")


def another_signature(monkeypatch, run):
    monkeypatch.setitem(adapter._FIELDS, "advantage", "no such argument")


def unexpected_arguments(monkeypatch, run):
    monkeypatch.setattr(adapter, "_arguments", {}.__getitem__)


def unexpected_ring(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "a_ring", SimpleNamespace(RING_ATTN_GROUP="no group"))
    monkeypatch.setattr(adapter, "_RING", "a_ring")


TROUBLES = [broken_record, file_in_place_of_the_run, another_signature, unexpected_arguments, unexpected_ring]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_with_the_recording_never_reaches_the_training(trouble, monkeypatch, run):
    losses, weights = trained(recorded=False)
    for name in ("openrlhf.models.loss", "openrlhf.models.actor"):
        del sys.modules[name]
    trouble(monkeypatch, run)
    same_losses, same_weights = trained(recorded=True)
    assert all(map(torch.equal, losses, same_losses)) and all(map(torch.equal, weights, same_weights))


def test_ranks_of_a_ring_record_once(run, monkeypatch):
    monkeypatch.setattr(adapter, "_repeats_another_rank", lambda: True)
    trained(recorded=True)
    assert not run.exists()


def test_an_action_waits_for_its_module_and_runs_once(tmp_path, monkeypatch):
    (tmp_path / "waited_for.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    seen, before = [], list(sys.meta_path)
    when_imported("waited_for", lambda module: seen.append(module.value))
    assert not seen
    import waited_for

    assert seen == [3] and sys.meta_path == before
    when_imported("waited_for", lambda module: seen.append(module.__name__))
    assert seen == [3, "waited_for"]
    del sys.modules["waited_for"], waited_for


def test_a_module_that_fails_fails_as_ever(tmp_path, monkeypatch):
    (tmp_path / "fails_to_import.py").write_text("raise ValueError('as ever')")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    when_imported("fails_to_import", seen.append)
    with pytest.raises(ValueError, match="as ever"):
        import fails_to_import  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        import no_such_module_at_all  # noqa: F401
    assert not seen
