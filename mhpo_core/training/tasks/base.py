"""What the training loop needs of a task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from mhpo_core.training.validation import Variant


@dataclass(frozen=True)
class Prompt:
    """One question.

    Args:
        ids: its tokens, at least one.
        text: what people read.
        answer: the reference that the verifier compares with.
    """

    ids: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True)
class Example:
    """One supervised example for the warm start: prompt tokens, completion tokens with the end token."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


class Task(Protocol):
    """A source of prompts with a verifiable reward."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, for a model from scratch."""

    @property
    def eos_id(self) -> int:
        """The token that ends a completion."""

    @property
    def pad_id(self) -> int:
        """The token that fills a batch."""

    def prompts(self, count: int, generator: torch.Generator) -> list[Prompt]:
        """`count` prompts drawn with the generator."""

    def examples(self, count: int, generator: torch.Generator) -> list[Example]:
        """`count` supervised examples drawn with the generator."""

    def reward(self, prompt: Prompt, completion_ids: Sequence[int]) -> float:
        """The verifier's reward of a completion, given with its end token if it has one."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, shown to people."""

    def decode_token(self, token_id: int) -> str:
        """Text of one token, special tokens too."""


@dataclass(frozen=True)
class TaskConfig(Variant):
    """[task]: settings of a task; `open` turns them into the task itself."""

    section: ClassVar[str] = "[task]"

    @abstractmethod
    def open(self, model_path: str) -> Task:
        """The task for a model from this path; empty = from scratch.

        Raises:
            ConfigError: the task does not go with such a model.
            DataError: its data cannot be read.
        """
