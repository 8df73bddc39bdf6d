"""Digit sum: write a fixed number of digits that add up to the target.

Many answers are right, so the entropy stays informative while the reward rises: a task with one right answer drives
it to 0 even in a healthy run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from mhpo_core.errors import ConfigError
from mhpo_core.training.tasks.base import Example, Prompt, TaskConfig
from mhpo_core.training.validation import setting

SYMBOLS: tuple[str, ...] = (*"0123456789", "<bos>", "=", "<eos>", "<pad>", "<14>", "<15>")
BOS, EQUALS, EOS, PAD = 10, 11, 12, 13


@dataclass(frozen=True)
class DigitSum(TaskConfig):
    """[task] name = "digit-sum": prompt `<bos> target =`, for instance `17=`; answer `2942<eos>`.

    The target is written with as many digits as the largest one. Reward 1 if the completion is exactly `digits`
    digits and the end token, and they add up to the target; else 0.

    Args:
        digits: length of the answer.
    """

    name: ClassVar[str] = "digit-sum"
    vocab_size: ClassVar[int] = len(SYMBOLS)
    eos_id: ClassVar[int] = EOS
    pad_id: ClassVar[int] = PAD

    digits: int = setting(4, low=1, high=100)

    def open(self, model_path: str) -> DigitSum:
        if model_path:
            raise ConfigError(
                f"[task]: digit-sum with [model] path = {model_path!r}, allowed is a model from scratch, because the "
                "task has its own 16 tokens. Leave path empty, or use name = 'jsonl'."
            )
        return self

    def prompts(self, count: int, generator: torch.Generator) -> list[Prompt]:
        return [self._prompt(t) for t in torch.randint(9 * self.digits + 1, (count,), generator=generator).tolist()]

    def examples(self, count: int, generator: torch.Generator) -> list[Example]:
        return [Example(self._prompt(sum(d)).ids, (*d, EOS)) for d in self._draw(count, generator)]

    def reward(self, prompt: Prompt, completion_ids: Sequence[int]) -> float:
        *digits, last = completion_ids
        right_form = last == EOS and len(digits) == self.digits and max(digits) <= 9
        return float(right_form and sum(digits) == int(prompt.answer))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.decode_token, token_ids))

    def decode_token(self, token_id: int) -> str:
        return SYMBOLS[token_id]

    def _draw(self, count: int, generator: torch.Generator) -> list[list[int]]:
        return torch.randint(10, (count, self.digits), generator=generator).tolist()

    def _prompt(self, target: int) -> Prompt:
        text = f"{target:0{len(str(9 * self.digits))}d}"
        return Prompt((BOS, *map(int, text), EQUALS), f"{text}=", str(target))
