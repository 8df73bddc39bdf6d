"""A data set of prompts with reference answers, for any causal LM that has a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, ClassVar

import torch

from mhpo_core.errors import ConfigError, DataError
from mhpo_core.training.pretrained import load_tokenizer
from mhpo_core.training.tasks.base import Example, Prompt, TaskConfig
from mhpo_core.training.validation import setting

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _exact(completion: str, answer: str) -> bool:
    return completion.strip() == answer.strip()


def _contains(completion: str, answer: str) -> bool:
    return answer.strip() in completion


def _number(completion: str, answer: str) -> bool:
    found = _NUMBER.findall(completion)
    return bool(found) and to_number(found[-1]) == to_number(answer)


MATCHES: dict[str, Callable[[str, str], bool]] = {"exact": _exact, "contains": _contains, "number": _number}


def to_number(text: str) -> Decimal | None:
    """The number that a text such as `1,234.50` denotes, or None."""
    try:
        number = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


@dataclass(frozen=True)
class Jsonl(TaskConfig):
    """[task] name = "jsonl": one `{"prompt": …, "answer": …}` object per line.

    Reward 1 if the completion matches the answer, else 0.

    Args:
        path: the file.
        match: "exact" = equal but for outer white space; "contains" = the answer occurs; "number" = the last number
            of the completion equals the answer.
        chat_template: put the prompt as a user's message into the tokenizer's chat template.
    """

    name: ClassVar[str] = "jsonl"
    path: str = setting("")
    match: str = setting("exact", choices=tuple(MATCHES))
    chat_template: bool = setting(False)

    def open(self, model_path: str) -> JsonlTask:
        if not model_path:
            raise ConfigError(
                "[task]: jsonl with an empty [model] path, allowed is a pretrained model with a tokenizer. "
                "Set path in [model] to a local folder or a hub id."
            )
        return JsonlTask(self, load_tokenizer(model_path))


class JsonlTask:
    """The data set read, checked and tokenized. `tokenizer` is a transformers tokenizer."""

    def __init__(self, config: Jsonl, tokenizer: Any) -> None:
        self._config = config
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ConfigError("[task]: the tokenizer has no end token, jsonl needs one. Set eos_token in its config.")
        if config.chat_template and not tokenizer.chat_template:
            raise ConfigError(
                "[task]: chat_template = true, but the tokenizer has no chat template. Set chat_template = false."
            )
        self.vocab_size = len(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._prompts = [self._tokenize(where, *row) for where, row in read_rows(config.path, config.match)]

    def prompts(self, count: int, generator: torch.Generator) -> list[Prompt]:
        rows = len(self._prompts)
        # whole shuffled passes, so that a prompt repeats within an iteration only when the file is smaller than it
        order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))])
        return [self._prompts[i] for i in order[:count].tolist()]

    def examples(self, count: int, generator: torch.Generator) -> list[Example]:
        return [Example(p.ids, self._answer_ids(p)) for p in self.prompts(count, generator)]

    def reward(self, prompt: Prompt, completion_ids: Sequence[int]) -> float:
        return float(MATCHES[self._config.match](self.decode(completion_ids), prompt.answer))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def decode_token(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))

    def _answer_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return (*self._tokenizer(prompt.answer, add_special_tokens=False)["input_ids"], self.eos_id)

    def _tokenize(self, where: str, prompt: str, answer: str) -> Prompt:
        if self._config.chat_template:
            message = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them already
        else:
            ids = self._tokenizer(prompt)["input_ids"]
        if not ids:
            raise DataError(f"{where}: the prompt has no token, at least one is needed. Fill it in or drop the line.")
        return Prompt(tuple(ids), prompt, answer)


def read_rows(path: str, match: str) -> list[tuple[str, tuple[str, str]]]:
    """(`file:line`, (prompt, answer)) of every non-empty line.

    Raises:
        DataError: the file cannot be read or is empty, or a line is malformed; the message gives file and line.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"[task] path {path!r}: cannot be read ({error.strerror}). Give an existing .jsonl file."
        ) from error
    rows = [(f"{path}:{n}", _parse(f"{path}:{n}", line, match)) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"[task] path {path!r}: holds no line, at least one is needed. Add prompts.")
    return rows


def _parse(where: str, line: bytes, match: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{where}: not valid JSON ({error}). Write one object per line.") from error
    prompt, answer = (row.get("prompt"), row.get("answer")) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str) or isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(
            f"{where}: got {line.decode()[:80]!r}, allowed is an object with a text 'prompt' and a text or number "
            "'answer'. Correct the line."
        )
    if match == "number" and to_number(str(answer)) is None:
        raise DataError(f"{where}: answer {answer!r} with match = 'number', allowed is a number. Correct the line.")
    if not str(answer).strip():
        raise DataError(f"{where}: the answer is empty, every completion would match it. Fill it in or drop the line.")
    return prompt, str(answer)
