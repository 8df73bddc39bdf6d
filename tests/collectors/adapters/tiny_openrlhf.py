"""The modules of OpenRLHF that its actor trains with: those of an installed OpenRLHF, else stand-ins.

OpenRLHF itself needs DeepSpeed and FlashAttention to import; its `PolicyLoss` and `Actor` use neither on a CPU, so
empty modules stand for them. The stand-ins take and return what those of 0.11.2 do.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

SPEC = find_spec("openrlhf")
VOCABULARY, PROMPT, RESPONSE = 13, 3, 5
_ABSENT = {
    "deepspeed": (), "flash_attn": (), "flash_attn.utils": (), "flash_attn.utils.distributed": ("all_gather",),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
}  # fmt: skip
_LOSS = """
import torch
class PolicyLoss(torch.nn.Module):
    def __init__(self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, policy_loss_type="ppo"):
        super().__init__()
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.policy_loss_type = policy_loss_type
    def forward(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
                batch_num_tokens=None, global_batch_size=None):
        difference = log_probs - old_log_probs
        if self.policy_loss_type == "gspo":
            lengths = action_mask.sum(-1, keepdim=True)
            difference = (difference * action_mask).sum(-1, keepdim=True) / lengths + 0 * difference
        ratio = difference.exp()
        clipped = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)
        best = torch.min(ratio * advantages, clipped * advantages)
        if self.dual_clip is not None:
            best = torch.where(advantages < 0, torch.max(best, self.dual_clip * advantages), best)
        if self.policy_loss_type == "gspo":
            loss = -((best * action_mask).sum(-1) / action_mask.sum(-1)).mean()
        elif batch_num_tokens is None:
            loss = -(best * action_mask).sum() / action_mask.sum()
        else:
            loss = -(best * action_mask).sum() / batch_num_tokens * dp_size
        return loss, loss.detach() * 0, loss.detach() * 0, None, None
"""
_ACTOR = """
import torch
class Actor(torch.nn.Module):
    def __init__(self, pretrain_or_model):
        super().__init__()
        self.model = pretrain_or_model
    def forward(self, sequences, action_mask=None, attention_mask=None, return_output=False, return_entropy=False):
        output = self.model(sequences, attention_mask=attention_mask, position_ids=None)
        logp = output.logits.log_softmax(-1)
        if return_entropy:
            output.entropy = -(logp.exp() * logp).sum(-1)[:, :-1]
        taken = logp[:, :-1].gather(-1, sequences[:, 1:, None])[..., 0][:, -action_mask.shape[1] :]
        taken = taken * action_mask.float()
        return (taken, output) if return_output else taken
"""


class TinyModel(torch.nn.Module):
    """A language model that knows one token back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.table(input_ids))


def place(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make `openrlhf.models` importable, and not imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        patch.delitem(sys.modules, name)
    if SPEC is None:
        models = folder / "openrlhf" / "models"
        models.mkdir(parents=True)
        for name, text in (("loss", _LOSS), ("actor", _ACTOR)):
            (models / f"{name}.py").write_text(text)
    else:
        models = Path(SPEC.submodule_search_locations[0]) / "models"
        for name in ("peft", "transformers.generation.utils"):
            importlib.import_module(name)  # they ask whether DeepSpeed is there, before it seems to be
        for name, attributes in _ABSENT.items():
            if name not in sys.modules:
                absent = ModuleType(name)
                absent.__dict__.update(dict.fromkeys(attributes))
                patch.setitem(sys.modules, name, absent)
    for name, path in (("openrlhf", models.parent), ("openrlhf.models", models)):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        patch.setitem(sys.modules, name, package)


def make(**settings):
    """The actor, its loss and its optimizer."""
    actor = importlib.import_module("openrlhf.models.actor").Actor(TinyModel())
    actor.packing_samples = False
    loss = importlib.import_module("openrlhf.models.loss").PolicyLoss(**settings)
    return SimpleNamespace(actor=actor, loss=loss, optimizer=torch.optim.AdamW(actor.parameters(), lr=0.5))


def experience(seed: int, rows: int = 3) -> SimpleNamespace:
    """What the replay buffer gives: ids (B, PROMPT + RESPONSE), the rest (B, RESPONSE)."""
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(VOCABULARY, (rows, PROMPT + RESPONSE), generator=generator)
    mask = torch.rand(rows, RESPONSE, generator=generator) > 0.3
    mask[:, 0] = True
    old = -3 * torch.rand(rows, RESPONSE, generator=generator)
    return SimpleNamespace(
        sequences=sequences, attention_mask=torch.ones_like(sequences), action_mask=mask, action_log_probs=old,
        advantages=torch.randn(rows, RESPONSE, generator=generator), rollout_log_probs=old - 0.01,
    )  # fmt: skip


def train(made, steps: list[list[SimpleNamespace]]) -> list[torch.Tensor]:
    """Optimizer steps over micro-batches, as ActorPPOTrainer.training_step and DeepSpeed make them; their losses."""
    losses = []
    for parts in steps:
        total = sum(part.action_mask.sum() for part in parts) / len(parts)
        for one in parts:
            with torch.no_grad():
                made.actor(one.sequences, one.action_mask, attention_mask=one.attention_mask)
            logp, output = made.actor(
                one.sequences, one.action_mask, attention_mask=one.attention_mask, return_output=True,
                return_entropy=True,
            )  # fmt: skip
            loss = made.loss(
                logp, one.action_log_probs, one.advantages, action_mask=one.action_mask,
                rollout_log_probs=one.rollout_log_probs, dp_size=1, batch_num_tokens=total, global_batch_size=None,
            )[0]  # fmt: skip
            losses.append(loss.detach().clone())
            (loss / len(parts)).backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
    return losses
