"""The objectives against TRL's own code: `GRPOTrainer.compute_loss` of the installed trl, run on the tokens given here.

A real trainer is built around a model of one layer; only the method that would run the model is replaced, so that both
sides start from the same log-probabilities. None of TRL's formulas is repeated in this file. Its last part says where
TRL computes something else, one test per difference: a new TRL that drops one fails here.

Shape letters: B sequences, T response tokens, G group size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhpo_core import TokenBatch, group_advantages, objectives
from mhpo_core.objectives import Decoupled, Objective

pytest.importorskip("trl", reason="trl is not installed; `make test` installs it (pip install -e '.[test]')")

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

# TRL 1.16 still asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

B, T, G = 24, 9, 4
HALVES = (slice(B // 2), slice(B // 2, B))
LONGEST = 16  # max_completion_length; more than T, for dr_grpo divides by it whatever the padding
SAPO_TAU_NEG = float(np.float32(1.05))  # what TRL really uses, see the last part

Trainer = Callable[..., GRPOTrainer]


@dataclass(frozen=True)
class Sampled:
    """Log-probabilities (B, T), one advantage per sequence (B,), and the two masks whose product trains in TRL."""

    logp_new: Tensor
    logp_old: Tensor
    advantage: Tensor
    completion_mask: Tensor
    tool_mask: Tensor
    logp_rollout: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return (self.completion_mask * self.tool_mask).bool()


def ragged(spread: float, seed: int = 0) -> Sampled:
    """Random completions of 1 to T tokens with holes in them, advantages of all three signs."""
    rng = np.random.default_rng(seed)
    log_ratio = spread * rng.standard_normal((B, T))
    highest = -rng.uniform(0.05, 4, (B, T))
    lengths = np.append(rng.integers(1, T + 1, B - 1), T)
    tool_mask = rng.random((B, T)) < 0.8
    tool_mask[:, 0] = True
    return Sampled(
        # both are log-probabilities, so both stay below 0
        logp_new=torch.tensor(highest + np.minimum(log_ratio, 0)),
        logp_old=torch.tensor(highest - np.maximum(log_ratio, 0)),
        advantage=torch.tensor(rng.permutation(np.tile([1.7, -0.6, 0.0, 0.3, -2.1, 0.9, -0.2, 1.1], B // 8))),
        completion_mask=torch.tensor(np.arange(T) < lengths[:, None]).long(),
        tool_mask=torch.tensor(tool_mask).long(),
    )


def one_row(*log_ratio: float, advantage: float, dtype: torch.dtype = torch.float32) -> Sampled:
    """One sequence with these log-ratios, every token trains."""
    x = torch.tensor([log_ratio], dtype=dtype)
    ones = torch.ones(x.shape, dtype=torch.long)
    return Sampled(-0.5 + x.clamp(max=0), -0.5 - x.clamp(min=0), torch.tensor([advantage], dtype=dtype), ones, ones)


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> Trainer:
    """trainer(**settings): a GRPOTrainer whose GRPOConfig has these settings; cls= and config= for a subclass."""
    monkeypatch.setenv("CI", "1")  # without it a trainer reports its use over the network
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    shape = {"vocab_size": 3, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1}
    defaults = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "per_device_train_batch_size": B,
        "num_generations": G,
        "max_completion_length": LONGEST,
    }

    def build(cls: type = GRPOTrainer, config: type = GRPOConfig, **settings: Any) -> GRPOTrainer:
        built = cls(
            model=LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1)),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>"),
            reward_funcs=lambda prompts, reward, **_: reward,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * B}),
            args=config(str(tmp_path), **defaults | settings),
        )
        # Trainer.train() would set it
        built.current_gradient_accumulation_steps = built.args.gradient_accumulation_steps
        return built

    return build


def trl_inputs(tokens: Sampled) -> dict[str, Tensor]:
    """What a GRPOTrainer hands to its loss."""
    ids = torch.zeros_like(tokens.completion_mask)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": tokens.completion_mask,
        "tool_mask": tokens.tool_mask,
        "advantages": tokens.advantage,
        "old_per_token_logps": tokens.logp_old,
        "num_items_in_batch": tokens.mask.sum(),
    }


def answer_with(trainer: GRPOTrainer, logp: Tensor) -> None:
    """Make these the log-probabilities that the trainer's model gives; its entropies and router loss play no part."""
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)


def trl_loss(trainer: GRPOTrainer, tokens: Sampled, inputs: dict[str, Tensor] | None = None) -> tuple[float, Tensor]:
    """TRL's loss and its gradient with respect to logp_new."""
    logp_new = tokens.logp_new.clone().requires_grad_()
    answer_with(trainer, logp_new)
    loss = trainer.compute_loss(trainer.model, inputs or trl_inputs(tokens))
    loss.backward()
    return loss.item(), logp_new.grad


def our_loss(
    objective: Objective, tokens: Sampled, aggregation: str | None = None, loss_scale: float | None = None
) -> tuple[float, Tensor]:
    """This project's loss and its gradient with respect to logp_new."""
    logp_new = tokens.logp_new.clone().requires_grad_()
    batch = TokenBatch(logp_new, tokens.logp_old, tokens.advantage, tokens.mask, tokens.logp_rollout)
    loss = objective.loss(batch, aggregation, loss_scale)
    loss.backward()
    return loss.item(), logp_new.grad


def disagreement(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> float:
    """The larger of the two differences, each relative to the largest magnitude on TRL's side."""
    (loss, gradient), (trl_value, trl_gradient) = found, expected
    assert math.isfinite(trl_value) and trl_gradient.isfinite().all() and trl_gradient.any()
    return max(
        abs(loss - trl_value) / abs(trl_value),
        float((gradient - trl_gradient).abs().max() / trl_gradient.abs().max()),
    )


@dataclass(frozen=True)
class Peer:
    """TRL's settings beside the objective and the aggregation that should be the same."""

    settings: dict[str, Any]
    objective: Objective
    aggregation: str
    loss_scale: float | None = None

    def loss(self, tokens: Sampled, objective: Objective | None = None) -> tuple[float, Tensor]:
        """Ours; with another objective in place of the right one."""
        return our_loss(objective or self.objective, tokens, self.aggregation, self.loss_scale)


PPO = objectives.create("ppo_clip", eps_low=0.2, eps_high=0.2)
DAPO = objectives.create("dapo_clip", eps_low=0.2, eps_high=0.28)
TWO_SIDED = objectives.create("two_sided_clip", eps_low=0.2, eps_high=0.2, delta=4.0)
CISPO = objectives.create("cispo", ratio_min=0.0, ratio_max=5.0)
SAPO = objectives.create("sapo", tau_pos=1.0, tau_neg=SAPO_TAU_NEG)
VESPO = objectives.create("vespo", k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0)
GSPO = objectives.create("gspo", eps_low=3e-4, eps_high=4e-4)
LUSPO = objectives.create("luspo", eps_low=2e-3, eps_high=2.5e-3)
GMPO = objectives.create("gmpo", eps_low=0.4, eps_high=0.5)
OPSM = objectives.create("opsm_ppo", kl_threshold=0.05, base=PPO)

BY_SEQUENCE = {"importance_sampling_level": "sequence"}
TRL_GSPO = BY_SEQUENCE | {"epsilon": 3e-4, "epsilon_high": 4e-4}
TRL_LUSPO = BY_SEQUENCE | {"epsilon": 2e-3, "epsilon_high": 2.5e-3}
TRL_GMPO = {"cls": GMPOTrainer, "config": GMPOConfig, "epsilon": 0.4, "epsilon_high": 0.5}
PEERS = {
    "grpo": Peer({"loss_type": "grpo"}, PPO, "seq-mean-token-mean"),
    "bnpo": Peer({"loss_type": "bnpo"}, PPO, "token-mean"),
    "dr_grpo": Peer({"loss_type": "dr_grpo"}, PPO, "seq-mean-token-sum-norm", LONGEST),
    "dapo": Peer({"loss_type": "dapo", "epsilon_high": 0.28}, DAPO, "token-mean"),
    "delta": Peer({"loss_type": "dapo", "delta": 4.0}, TWO_SIDED, "token-mean"),
    "cispo": Peer({"loss_type": "cispo", "epsilon_high": 5.0}, CISPO, "token-mean"),
    "sapo": Peer({"loss_type": "sapo"}, SAPO, "seq-mean-token-mean"),
    "vespo": Peer({"loss_type": "vespo"}, VESPO, "token-mean"),
    "gspo": Peer({"loss_type": "grpo"} | TRL_GSPO, GSPO, "seq-mean-token-mean"),
    "gspo-token-mean": Peer({"loss_type": "dapo"} | TRL_GSPO, GSPO, "token-mean"),
    "luspo": Peer({"loss_type": "luspo"} | TRL_LUSPO, LUSPO, "seq-mean-token-sum"),
    "gmpo": Peer(TRL_GMPO, GMPO, "seq-mean-token-mean"),
    "off-policy-mask": Peer({"loss_type": "grpo", "off_policy_mask_threshold": 0.05}, OPSM, "seq-mean-token-mean"),
}


@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize("name", PEERS)
def test_loss_and_gradient_are_those_of_trl(trainer: Trainer, name: str, spread: float) -> None:
    peer, tokens = PEERS[name], ragged(spread)
    assert disagreement(peer.loss(tokens), trl_loss(trainer(**peer.settings), tokens)) < 1e-13


def changed(value: Any) -> Any:
    """Another allowed value of a hyperparameter."""
    if isinstance(value, Objective):
        return replace(value, eps_low=1.5 * value.eps_low)
    return 1.5 * value or 0.5


@pytest.mark.parametrize("name", PEERS)
def test_the_comparison_notices_every_hyperparameter(trainer: Trainer, name: str) -> None:
    peer, tokens = PEERS[name], ragged(1.0)
    expected = trl_loss(trainer(**peer.settings), tokens)
    for hyperparameter in fields(peer.objective):
        value = getattr(peer.objective, hyperparameter.name)
        wrong = replace(peer.objective, **{hyperparameter.name: changed(value)})
        assert disagreement(peer.loss(tokens, wrong), expected) > 1e-5, hyperparameter.name


@pytest.mark.parametrize("name", [name for name in PEERS if name != "bnpo"])
def test_two_micro_batches_add_up_to_the_loss_of_the_step(trainer: Trainer, name: str) -> None:
    peer, tokens = PEERS[name], ragged(0.3)
    accumulated = two_micro_batches(trainer, peer, tokens)
    assert disagreement(peer.loss(tokens), accumulated) < 1e-13


def two_micro_batches(trainer: Trainer, peer: Peer, tokens: Sampled) -> tuple[float, Tensor]:
    """TRL's loss and gradient of a step whose sequences come in two halves."""
    theirs = trainer(**peer.settings, per_device_train_batch_size=B // 2, gradient_accumulation_steps=2)
    rows = [{name: values[half] for name, values in vars(tokens).items() if values is not None} for half in HALVES]
    # TRL counts the tokens of the whole step before it splits it
    whole = {"num_items_in_batch": tokens.mask.sum()}
    losses, gradients = zip(
        *(trl_loss(theirs, h, trl_inputs(h) | whole) for h in (Sampled(**r) for r in rows)), strict=True
    )
    return sum(losses), torch.cat(gradients)


def trl_step(trainer: GRPOTrainer, tokens: Sampled, reward: list[float]) -> dict[str, Tensor]:
    """TRL's own way from rewards, and from log-probabilities of an engine where there are any, to its loss inputs."""
    rows = [slice(n) for n in tokens.completion_mask.sum(dim=1)]
    ids, tool_mask, logp_rollout = (
        None if values is None else [row[kept].tolist() for row, kept in zip(values, rows, strict=True)]
        for values in (tokens.completion_mask, tokens.tool_mask, tokens.logp_rollout)
    )
    trainer._generate = lambda prompts: (ids, ids, tool_mask, prompts, logp_rollout, {}, None, None)
    answer_with(trainer, tokens.logp_old)
    return trainer._generate_and_score_completions([{"prompt": "a", "reward": r} for r in reward])


def random_rewards(seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(0, 1, B).tolist()


@pytest.mark.parametrize(
    ("scale_rewards", "settings"),
    [("group", {}), ("batch", {"std_over": "batch"}), ("none", {"normalize_std": False})],
)
def test_advantages_are_those_of_trl(trainer: Trainer, scale_rewards: str, settings: dict[str, Any]) -> None:
    # the last group has equal rewards, exactly representable: both sides give it 0
    reward = random_rewards()[:-G] + [0.5] * G
    found = trl_step(trainer(scale_rewards=scale_rewards), ragged(0.1), reward)["advantages"]
    # TRL keeps rewards in float32
    assert found.dtype == torch.float32 and not found[-G:].any()
    torch.testing.assert_close(group_advantages(torch.tensor(reward), G, **settings), found, rtol=1e-5, atol=1e-6)


def with_engine(tokens: Sampled) -> Sampled:
    """The same tokens, sampled by an engine that disagrees with logp_old; in float32, as TRL reads them from vLLM."""
    mismatch = np.random.default_rng(1).standard_normal((B, T))
    return replace(tokens, logp_rollout=(tokens.logp_old - torch.tensor(mismatch)).float().double())


def trl_engine_loss(
    trainer: Trainer, name: str, tokens: Sampled, **correction: Any
) -> tuple[Sampled, tuple[float, Tensor]]:
    """TRL's whole way: rewards → advantages, the engine's log-probabilities → weights, both → loss."""
    settings = {f"vllm_importance_sampling_{key}": value for key, value in correction.items()}
    theirs = trainer(**PEERS[name].settings, **settings)
    theirs.use_vllm = True  # the switch alone: vLLM itself is not installed
    inputs = trl_step(theirs, tokens, random_rewards())
    return replace(tokens, advantage=inputs["advantages"].double()), trl_loss(theirs, tokens, inputs)


@pytest.mark.parametrize(
    ("mode", "bounds"),
    [
        ("token_truncate", {"clip_max": 3.0}),
        ("token_mask", {"clip_max": 3.0}),
        ("token_mask_two_sided", {"clip_max": 3.0, "clip_min": 0.5}),
        ("sequence_truncate", {"clip_max": 1.2}),
        ("sequence_mask", {"clip_max": 1.2}),
        ("sequence_mask_two_sided", {"clip_max": 1.2, "clip_min": 0.4}),
    ],
)
@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo", "dapo", "delta", "cispo", "sapo", "gspo", "luspo"])
def test_engine_mismatch_weights_are_those_of_trl(
    trainer: Trainer, name: str, mode: str, bounds: dict[str, float]
) -> None:
    peer, trl_mode = PEERS[name], mode.removesuffix("_two_sided")
    tokens, expected = trl_engine_loss(trainer, name, with_engine(ragged(0.3)), mode=trl_mode, **bounds)

    def ours(objective: Objective) -> float:
        return disagreement(peer.loss(tokens, objective), expected)

    objective = Decoupled(base=peer.objective, mode=mode, **bounds)
    assert ours(objective) < 1e-13
    for bound, value in bounds.items():
        assert ours(replace(objective, **{bound: 0.5 * value})) > 1e-5, bound


# --- what TRL 1.16 computes differently ---

COUNTING_ALL_ROWS = {"seq-mean-token-mean": "trl-grpo", "seq-mean-token-sum-norm": "trl-dr_grpo"}


def test_bnpo_averages_over_the_micro_batch_and_so_depends_on_the_split(trainer: Trainer) -> None:
    peer, tokens = PEERS["bnpo"], ragged(0.3)
    whole = peer.loss(tokens)
    assert disagreement(whole, trl_loss(trainer(**peer.settings), tokens)) < 1e-13
    assert disagreement(whole, two_micro_batches(trainer, peer, tokens)) > 0.05


@pytest.mark.parametrize("name", PEERS)
def test_sequence_means_count_rows_without_tokens(trainer: Trainer, name: str) -> None:
    """TRL divides by all B rows, this project by the n that train; GMPO adds −A/B for each row that does not."""
    peer, tokens, empty = PEERS[name], ragged(0.3), slice(6)
    tokens.completion_mask[empty] = 0
    expected = trl_loss(trainer(**peer.settings), tokens)
    extra = -float(tokens.advantage[empty].sum()) / B if name == "gmpo" else 0.0
    share = 1.0 if peer.aggregation == "token-mean" else (B - 6) / B
    loss, gradient = peer.loss(tokens)
    assert disagreement((share * loss + extra, share * gradient), expected) < 1e-13
    if peer.aggregation in COUNTING_ALL_ROWS:
        loss, gradient = replace(peer, aggregation=COUNTING_ALL_ROWS[peer.aggregation]).loss(tokens)
        assert disagreement((loss + extra, gradient), expected) < 1e-13


@pytest.mark.parametrize("name", PEERS)
def test_a_ratio_that_overflows_has_a_nan_gradient(trainer: Trainer, name: str) -> None:
    """TRL bounds exp(x) when it is infinite already: 0·∞ in the backward pass in float32, for A = 0 too."""
    peer = PEERS[name]
    for advantage, survives in ((1.0, {"cispo", "vespo", "gmpo"}), (0.0, {"cispo", "vespo"})):
        _, found = trl_loss(trainer(**peer.settings), one_row(89.0, advantage=advantage))
        assert bool(found.isnan()) == (name not in survives)
    for advantage in (1.0, 0.0, -1.0):
        loss, gradient = peer.loss(one_row(89.0, advantage=advantage))
        assert math.isfinite(loss) and gradient.isfinite()


@pytest.mark.parametrize("name", PEERS)
def test_a_masked_token_poisons_the_losses_per_token(trainer: Trainer, name: str) -> None:
    """TRL masks after exp, so a token that does not train gets a NaN gradient; often the loss is NaN as well."""
    peer, survives = PEERS[name], {"cispo", "vespo", "gspo", "gspo-token-mean", "luspo", "gmpo"}
    tokens = one_row(0.1, 100.0, advantage=-1.0)
    tokens.completion_mask[0, 1] = 0
    _, found = trl_loss(trainer(**peer.settings), tokens)
    assert found[0].isnan().tolist() == [False, name not in survives]
    loss, gradient = peer.loss(tokens)
    expected = peer.loss(one_row(0.1, advantage=-1.0))
    assert (loss, gradient.tolist()) == (expected[0], [[float(expected[1]), 0.0]])


def test_sapo_rounds_its_temperature_to_float32(trainer: Trainer) -> None:
    tokens = ragged(1.0)
    theirs = trl_loss(trainer(loss_type="sapo", sapo_temperature_neg=1.05), tokens)
    exact = objectives.create("sapo", tau_pos=1.0, tau_neg=1.05)
    rounded = replace(exact, tau_neg=1.0499999523162842)
    assert disagreement(our_loss(rounded, tokens), theirs) < 1e-13
    assert 1e-8 < disagreement(our_loss(exact, tokens), theirs) < 1e-6


def test_sapo_has_no_gradient_in_float32_from_log_ratio_3_on(trainer: Trainer) -> None:
    """y(1 − y) with y rounded to 1; a fifth of it is already gone or too much at 2.8."""
    theirs = trainer(loss_type="sapo")
    for log_ratio, low, high in ((2.0, 0, 1e-3), (2.8, 0.05, 0.5), (3.0, 1, 1)):
        _, single = trl_loss(theirs, one_row(log_ratio, advantage=1.0))
        _, double = trl_loss(theirs, one_row(log_ratio, advantage=1.0, dtype=torch.float64))
        _, ours = our_loss(SAPO, one_row(log_ratio, advantage=1.0))
        assert low <= abs(float(single / double) - 1) <= high
        assert float(ours) == pytest.approx(float(double), rel=3e-5)


@pytest.mark.parametrize(
    ("log_ratio", "trl_log_w"), [((30.0, -25.0), 0.0), ((-12.0, -12.0), math.log(1e-8)), ((2.0, -3.0), -1.0)]
)
def test_vespo_clamps_each_log_ratio_and_their_sum(
    trainer: Trainer, log_ratio: tuple[float, float], trl_log_w: float
) -> None:
    """Each to ±20, log W to [log 1e-8, 20]: in the first case W = 1 in place of e⁵, all of the gradient or none."""
    tokens = one_row(*log_ratio, advantage=1.0, dtype=torch.float64)
    _, found = trl_loss(trainer(**PEERS["vespo"].settings), tokens)
    _, exact = our_loss(VESPO, tokens)
    # φ(W)·A of one token, over one token instead of two
    _, clamped = our_loss(VESPO, one_row(trl_log_w, advantage=1.0, dtype=torch.float64))
    torch.testing.assert_close(found, clamped.expand(1, 2) / 2, rtol=1e-12, atol=0)
    assert torch.allclose(found, exact, rtol=1e-12, atol=0) == (sum(log_ratio) == trl_log_w)


def test_cispo_has_a_cap_and_no_floor_and_the_cap_is_the_ratio_itself(trainer: Trainer) -> None:
    """`epsilon_high` is not 1 + ε: left unset it is `epsilon`, and even a token on-policy weighs only 0.2."""
    for settings, cap in (({}, 0.2), ({"epsilon_high": 5.0}, 5.0)):
        theirs = trainer(loss_type="cispo", **settings)
        for log_ratio in (-5.0, 0.0, 1.0, 3.0):
            for advantage in (1.0, -1.0):
                _, gradient = trl_loss(theirs, one_row(log_ratio, advantage=advantage))
                assert -advantage * float(gradient) == pytest.approx(min(math.exp(log_ratio), cap), rel=1e-6)


def test_equal_rewards_can_leave_an_advantage(trainer: Trainer) -> None:
    """The float32 mean of three times 0.9 is not 0.9, and TRL divides the difference by 1e-4."""
    reward = [0.9] * B
    found = trl_step(trainer(num_generations=3), ragged(0.1), reward)["advantages"]
    assert 1e-4 < float(found.abs().max()) < 1e-2
    assert not group_advantages(torch.tensor(reward), 3).any()


def test_a_completion_without_a_reward_is_left_out_of_its_group(trainer: Trainer) -> None:
    """TRL averages over the others and gives it advantage 0; a NaN reward makes the whole group NaN here."""
    reward = [None, *random_rewards()[1:]]
    found = trl_step(trainer(), ragged(0.1), reward)["advantages"]
    assert found[0] == 0
    torch.testing.assert_close(found[1:G], group_advantages(torch.tensor(reward[1:G]), G - 1), rtol=1e-5, atol=1e-6)
    assert group_advantages(torch.tensor([math.nan, *reward[1:]]), G).isnan().tolist() == [True] * G + [False] * (B - G)


def test_the_off_policy_mask_measures_against_the_engine_where_it_can(trainer: Trainer) -> None:
    """logp_old equals logp_new, only the engine differs: TRL drops the sequence, this project keeps it."""
    theirs = trainer(**PEERS["off-policy-mask"].settings)
    tokens = one_row(0.0, advantage=-1.0)
    far = {"sampling_per_token_logps": tokens.logp_old + 1}
    assert trl_loss(theirs, tokens)[0] == our_loss(OPSM, tokens)[0] == 1
    assert trl_loss(theirs, tokens, trl_inputs(tokens) | far)[0] == 0
    assert our_loss(OPSM, replace(tokens, logp_rollout=tokens.logp_old + 1))[0] == 1


def test_vespo_takes_the_engine_mismatch_into_its_sequence_ratio(trainer: Trainer) -> None:
    """Without truncation that is VESPO against logp_rollout instead of a weight on each token."""
    tokens, expected = trl_engine_loss(trainer, "vespo", with_engine(ragged(0.3)), mode="token_truncate", clip_max=1e6)
    assert disagreement(our_loss(VESPO, replace(tokens, logp_old=tokens.logp_rollout)), expected) < 1e-13
    assert disagreement(our_loss(Decoupled(base=VESPO, clip_max=1e6), tokens, "token-mean"), expected) > 0.1


def test_gmpo_ignores_the_engine_mismatch(trainer: Trainer) -> None:
    tokens, expected = trl_engine_loss(trainer, "gmpo", with_engine(ragged(0.3)), mode="token_truncate")
    assert disagreement(our_loss(GMPO, tokens), expected) < 1e-13


def test_a_token_the_engine_could_not_score_weighs_1(trainer: Trainer) -> None:
    """Here its NaN reaches the loss, and so the telemetry that counts it."""
    tokens = with_engine(ragged(0.3))
    tokens.logp_rollout[0, 0] = math.nan
    tokens, expected = trl_engine_loss(trainer, "grpo", tokens, mode="token_truncate")
    objective = Decoupled(base=PPO, mode="token_truncate", clip_max=3.0)
    assert math.isnan(our_loss(objective, tokens)[0])
    tokens.logp_rollout[0, 0] = tokens.logp_old[0, 0]
    assert disagreement(our_loss(objective, tokens), expected) < 1e-13
