"""The policy's chunked path: the model's own numbers and gradients, or whole logits and a sentence that says why."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Qwen2Config,
)

from mhpo_core.training import chunked_head
from mhpo_core.training import model as model_module
from mhpo_core.training.model import Policy

SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=1, n_head=2)
LINEAR = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma2-uncapped": Gemma2Config(**SIZES, final_logit_softcapping=None, query_pre_attn_scalar=8),
    "granite-unscaled": GraniteConfig(**SIZES, logits_scaling=1.0),
    "gpt2": GPT2,
}
SCALED = {
    "cohere": CohereConfig(**SIZES, logit_scale=0.0625),
    "granite": GraniteConfig(**SIZES, logits_scaling=1.01),
}
NAMES = ("logp", "entropy", "sum_p_squared")


@pytest.fixture(autouse=True)
def any_size_is_large(monkeypatch):
    monkeypatch.setattr(chunked_head, "LARGE_LOGITS_BYTES", 0)


def policy(config, dtype=torch.float32) -> Policy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    return Policy(model, torch.device("cpu"), dtype)


def stats(policy, *, chunked=True, temperature=0.8):
    """Of three completions of five tokens, after prompts of which one is padded."""
    prompt = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3], [3, 4, 5, 6]])
    completion = torch.randint(96, (3, 5), generator=torch.Generator().manual_seed(1))
    subject = policy if chunked else WholeLogits(policy.model, policy.device, policy.dtype)
    return subject.completion_stats(prompt, (prompt > 0).long(), completion, temperature=temperature)


class WholeLogits(Policy):
    """The path that every model has."""

    def __post_init__(self):
        super().__post_init__()
        self._head.applies = lambda *_: False


def gradients(policy, found):
    policy.model.zero_grad()
    (found.logp * torch.linspace(-1, 2, 15).reshape(3, 5)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.fixture
def paths(monkeypatch):
    """Which path each forward pass took."""
    taken = []
    for home, name in ((chunked_head, "chunked_token_stats"), (model_module, "token_stats")):
        original = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *a, _f=original, _n=name, **k: taken.append(_n) or _f(*a, **k))
    return taken


@pytest.mark.parametrize("name", LINEAR)
def test_values_and_gradients_of_the_whole_model_are_those_of_whole_logits(name, paths, caplog):
    subject = policy(LINEAR[name])
    found = stats(subject)
    mine = gradients(subject, found)
    expected = stats(subject, chunked=False)
    theirs = gradients(subject, expected)
    assert paths == ["chunked_token_stats", "token_stats"] and not caplog.records
    for field in NAMES:
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-5, atol=1e-5)
    assert mine.keys() == theirs.keys() == {n for n, _ in subject.model.named_parameters()}
    # float32 through two layers with weights that make logits of size 10
    largest = max(g.abs().max().item() for g in theirs.values())
    for parameter in mine:
        torch.testing.assert_close(mine[parameter], theirs[parameter], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", SCALED)
def test_a_head_that_does_more_keeps_its_whole_logits_and_says_so_once(name, paths, caplog):
    subject = policy(SCALED[name])
    first, second = stats(subject), stats(subject)
    assert paths == ["token_stats", "token_stats"]
    expected = stats(subject, chunked=False)
    for found in (first, second):
        assert all(torch.equal(getattr(found, field), getattr(expected, field)) for field in NAMES)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "computed from whole logits" in record.message and "its logits differ from hidden·weightᵀ" in record.message


def test_a_soft_cap_that_the_configuration_hides_is_seen_though_the_logits_are_small(caplog):
    subject = policy(LINEAR["gemma2"])
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.mul_(1e-3)
    # logits of 1e-3 and less: the cap changes them by a part in 10⁷
    unknown = subject.model.config.final_logit_softcapping
    subject.model.config.final_logit_softcapping = None
    own = subject.model.forward

    def capped(**inputs):
        output = own(**inputs)
        output.logits = unknown * torch.tanh(output.logits / unknown)
        return output

    subject.model.forward = capped
    stats(subject)
    assert "its logits differ" in caplog.text


class Adapter(nn.Linear):
    """Adds a term that is zero until it is trained."""


def test_a_head_of_another_class_is_not_trusted_by_its_first_numbers(paths, caplog):
    subject = policy(LINEAR["qwen2"])
    subject.model.lm_head.__class__ = Adapter
    stats(subject)
    assert paths == ["token_stats"] and "its output head is of class Adapter, not torch.nn.Linear" in caplog.text


def test_a_model_without_a_body_of_its_own_keeps_its_whole_logits(paths, caplog):
    subject = policy(LINEAR["qwen2"])
    subject.model.base_model_prefix = "absent"
    stats(subject)
    assert paths == ["token_stats"] and "the comparison failed with AttributeError" in caplog.text


def test_a_head_with_a_bias(paths):
    subject = policy(LINEAR["qwen2"])
    subject.model.lm_head.bias = nn.Parameter(torch.randn(96))
    found, expected = stats(subject), stats(subject, chunked=False)
    assert paths[0] == "chunked_token_stats"
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients(subject, found)["lm_head.bias"], gradients(subject, expected)["lm_head.bias"], rtol=1e-5, atol=1e-5
    )


def test_bfloat16_rounds_the_factors_but_not_the_logits(paths, monkeypatch):
    factors = []
    original = chunked_head.spot_check
    monkeypatch.setattr(chunked_head, "spot_check", lambda *a, **k: factors.append(a[:2]) or original(*a, **k))
    exact, rounded = policy(LINEAR["qwen2"]), policy(LINEAR["qwen2"], torch.bfloat16)
    chunked, whole = stats(rounded), stats(rounded, chunked=False)
    assert [x.dtype for x in factors.pop()] == [torch.bfloat16] * 2
    assert paths[0] == "chunked_token_stats" and chunked.logp.dtype == torch.float32
    assert 1e-3 < (chunked.logp - stats(exact).logp).abs().max() < 0.5
    # the last rounding alone: 2⁻⁹ of a logit of size 15
    assert 1e-4 < (chunked.logp - whole.logp).abs().max() < 0.06
    assert {g.dtype for g in gradients(rounded, chunked).values()} == {torch.float32}


def test_small_logits_are_kept_whole_until_the_first_large_batch(monkeypatch, paths):
    subject = policy(LINEAR["qwen2"])
    # stats() makes 15 tokens of 96 float32 logits
    monkeypatch.setattr(chunked_head, "LARGE_LOGITS_BYTES", 15 * 96 * 4)
    stats(subject)
    monkeypatch.setattr(chunked_head, "LARGE_LOGITS_BYTES", 15 * 96 * 4 - 1)
    stats(subject)
    monkeypatch.setattr(chunked_head, "LARGE_LOGITS_BYTES", 2**40)
    stats(subject)
    assert paths == ["token_stats", "chunked_token_stats", "chunked_token_stats"]


def test_the_head_is_compared_once_and_without_a_trace(monkeypatch):
    subject = policy(LINEAR["qwen2"])
    calls = []
    subject.model.register_forward_hook(lambda *_: calls.append(1))
    stats(subject)
    stats(subject)
    assert calls == [1] and not subject.model.lm_head._forward_pre_hooks
    assert all(p.grad is None for p in subject.model.parameters())


def test_every_twentieth_pass_is_followed_by_a_spot_check(monkeypatch, caplog):
    subject, checked, passes = policy(LINEAR["gemma2"]), [], 0
    original = chunked_head.spot_check
    monkeypatch.setattr(chunked_head, "spot_check", lambda *a, **k: checked.append(passes) or original(*a, **k))
    with torch.no_grad():
        while passes < 41:
            stats(subject)
            passes += 1
    assert checked == [0, 20, 40] and not caplog.records


@pytest.mark.parametrize("error,said", [(0.5e-3, None), (2e-3, "= 0.002 nats"), (float("nan"), "= nan nats")])
def test_a_wrong_kernel_is_reported_and_training_goes_on(monkeypatch, caplog, error, said):
    subject = policy(LINEAR["qwen2"])
    original = chunked_head.chunked_token_stats

    def wrong(*arguments, **options):
        found = original(*arguments, **options)
        found.logp.data[1, 2] += error
        return found

    monkeypatch.setattr(chunked_head, "chunked_token_stats", wrong)
    stats(subject).logp.sum().backward()
    # NaN is also a value that no distribution has
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * (
        0 if said is None else 2 if error != error else 1
    )
    if said:
        assert f"max |Δlogp| {said}" in caplog.text and "allowed is 1e-03" in caplog.text


def test_an_entropy_above_ln_v_is_reported(monkeypatch, caplog):
    subject = policy(LINEAR["qwen2"])
    original = chunked_head.chunked_token_stats

    def wrong(*arguments, **options):
        found = original(*arguments, **options)
        found.entropy[0, 1] = 40.0
        return found

    monkeypatch.setattr(chunked_head, "chunked_token_stats", wrong)
    stats(subject)
    assert "1 × entropy > ln V + 1e-3. Do not trust" in caplog.text
