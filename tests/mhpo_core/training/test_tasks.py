"""Tasks: rewards by hand, prompts and examples that agree, data files with their errors."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from mhpo_core.errors import ConfigError, DataError
from mhpo_core.training import from_dict, open_task, train
from mhpo_core.training.randomness import seeded
from mhpo_core.training.tasks import DigitSum, Jsonl, Prompt
from mhpo_core.training.tasks.digit_sum import BOS, EOS, EQUALS, PAD
from mhpo_core.training.tasks.jsonl import MATCHES, JsonlTask

CHARACTERS = ["?", "<eos>", "<pad>", *"12345+=user:"]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ([2, 9, 4, 2, EOS], 1.0),  # 2+9+4+2 = 17
        ([9, 8, 0, 0, EOS], 1.0),  # 9+8 = 17
        ([2, 9, 4, 3, EOS], 0.0),  # 18
        ([2, 9, 4, 2, 0], 0.0),  # no end token
        ([9, 8, 0, EOS], 0.0),  # three digits
        ([9, 8, 0, 0, 0, EOS], 0.0),  # five digits
        ([9, 8, EQUALS, 0, EOS], 0.0),  # not a digit
        ([2, 9, 6, BOS - 10, EOS], 1.0),  # 2+9+6+0 = 17
        ([2, 5, BOS, 0, EOS], 0.0),  # 2+5+10+0 = 17, but <bos> is no digit
        ([EOS], 0.0),
        ([17], 0.0),
    ],
)
def test_digit_sum_reward(completion, reward):
    assert DigitSum(digits=4).reward(Prompt((), "17=", "17"), completion) == reward


@pytest.mark.parametrize(("digits", "width"), [(1, 1), (4, 2), (11, 2), (12, 3)])
def test_digit_sum_prompts_can_be_answered_and_examples_earn_the_reward(digits, width):
    task = DigitSum(digits=digits)
    prompts = task.prompts(300, seeded("cpu", digits))
    assert {len(p.ids) for p in prompts} == {width + 2}
    assert {int(p.answer) for p in prompts} <= set(range(9 * digits + 1))
    assert all(p.text == "".join(map(str, p.ids[1:-1])) + "=" and int(p.text[:-1]) == int(p.answer) for p in prompts)
    for example in task.examples(50, seeded("cpu", 1)):
        target = "".join(map(str, example.prompt_ids[1:-1]))
        assert task.reward(Prompt(example.prompt_ids, "", target), example.completion_ids) == 1.0


def test_digit_sum_text():
    assert DigitSum().decode([1, 0, EOS]) == "10<eos>"
    assert [DigitSum().decode_token(i) for i in (7, PAD, EQUALS)] == ["7", "<pad>", "="]
    with pytest.raises(ConfigError, match=r"\[task\]: digit-sum with \[model\] path = 'some/model'"):
        DigitSum().open("some/model")


@pytest.mark.parametrize(
    ("match", "completion", "answer", "expected"),
    [
        ("exact", " 42\n", "42", True),
        ("exact", "is 42", "42", False),
        ("contains", "the answer is 42.", "42", True),
        ("contains", "the answer is 4", "42", False),
        ("number", "3 and 4 make 7", "7", True),
        ("number", "7, no: 8", "7", False),
        ("number", "costs 1,234.50 in all", "1234.5", True),
        ("number", "-3", "3", False),
        ("number", "x = -3.", "-3", True),
        ("number", "none", "3", False),
    ],
)
def test_matches(match, completion, answer, expected):
    assert MATCHES[match](completion, answer) is expected


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """A tiny Qwen2 with a one-character tokenizer, saved as a user would have it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Qwen2Tokenizer(
        vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[], eos_token="<eos>", pad_token="<pad>", unk_token="?"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}="
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=len(CHARACTERS), num_key_value_heads=2, **shape)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "data.jsonl"
    rows = [("1+2", "3"), ("1+1+1+1", 4), ("2+3", "5"), ("1", "1")]
    path.write_text("\n\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in rows) + "\n", encoding="utf-8")
    return str(path)


def ids(*characters: str) -> tuple[int, ...]:
    return tuple(CHARACTERS.index(c) for c in characters)


def test_jsonl_prompts_rewards_and_examples(model_folder, data):
    task = Jsonl(path=data, match="number").open(model_folder)
    prompts = task.prompts(10, seeded("cpu", 0))
    for start in (0, 4):  # whole passes over the file
        assert sorted(p.text for p in prompts[start : start + 4]) == ["1", "1+1+1+1", "1+2", "2+3"]
    prompt = next(p for p in prompts if p.text == "1+2")
    assert prompt.ids == ids("1", "+", "2")
    right = ids("=", "3", "<eos>")
    assert (task.reward(prompt, right), task.reward(prompt, right[:1])) == (1.0, 0.0)
    assert task.decode(right) == "=3"
    assert [task.decode_token(i) for i in ids("<eos>", "3")] == ["<eos>", "3"]
    examples = {e.prompt_ids: e.completion_ids for e in task.examples(4, seeded("cpu", 0))}
    assert examples[prompt.ids] == ids("3", "<eos>")
    assert (task.vocab_size, task.eos_id, task.pad_id) == (len(CHARACTERS), *ids("<eos>", "<pad>"))


def test_jsonl_chat_template(model_folder, data):
    task = Jsonl(path=data, chat_template=True).open(model_folder)
    prompt = next(p for p in task.prompts(4, seeded("cpu", 0)) if p.text == "2+3")
    assert prompt.ids == ids(*"user:2+3=")


def test_jsonl_trains_a_saved_model(model_folder, data, sink):
    config = from_dict(
        {
            "iterations": 2,
            "model": {"path": model_folder},
            "task": {"name": "jsonl", "path": data, "match": "contains"},
            "warm_start": {"steps": 40, "batch_size": 8, "lr": 0.03, "lr_warmup": 5},
            "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 3},
        }
    )
    summary = train(config, sink, "cpu")
    assert summary.steps == len(sink.steps) == 4
    assert summary.rewards[0] > 0.3  # 4 answers learnt; 3 random tokens of 15 hit one in 5 times
    task = open_task(config)
    for row in sink.steps:
        sequences = row["sequences"]
        answers = {p.text: p.answer for p in task.prompts(4, seeded("cpu", 0))}
        found = [answers[p] in c for p, c in zip(sequences.prompt, sequences.completion, strict=True)]
        assert [bool(r) for r in row["reward"]] == found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"not valid JSON"),
        ("[1]", r"got '\[1\]', allowed is an object with a text 'prompt'"),
        ('{"prompt": "1"}', r"allowed is an object with a text 'prompt' and a text or number 'answer'"),
        ('{"prompt": 3, "answer": "3"}', r"allowed is an object"),
        ('{"prompt": "1", "answer": true}', r"allowed is an object"),
        ('{"prompt": "1", "answer": "three"}', r"answer 'three' with match = 'number', allowed is a number"),
        ('{"prompt": "", "answer": "3"}', r"the prompt has no token"),
    ],
)
def test_jsonl_names_file_and_line_of_a_malformed_row(model_folder, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "1", "answer": "1"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: .*{message}"):
        Jsonl(path=str(path), match="number").open(model_folder)


def test_jsonl_refuses_an_empty_answer_and_bytes_that_are_not_text(model_folder, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "1", "answer": " "}', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: the answer is empty"):
        Jsonl(path=str(path)).open(model_folder)
    path.write_bytes(b'{"prompt": "\xff", "answer": "1"}')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not valid JSON"):
        Jsonl(path=str(path)).open(model_folder)


def test_jsonl_refuses_files_and_models_that_are_not_there(model_folder, data, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds no line"):
        Jsonl(path=str(empty)).open(model_folder)
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        Jsonl(path=str(tmp_path / "none.jsonl")).open(model_folder)
    with pytest.raises(ConfigError, match=r"jsonl with an empty \[model\] path"):
        Jsonl(path=data).open("")
    with pytest.raises(ConfigError, match=r"\[model\]: no tokenizer could be loaded from path = '.*nowhere'"):
        Jsonl(path=data).open(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("attribute", "message"), [("chat_template", "has no chat template"), ("eos_token", "has no end token")]
)
def test_jsonl_refuses_a_tokenizer_that_lacks_what_it_needs(model_folder, data, attribute, message):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    setattr(tokenizer, attribute, None)
    with pytest.raises(ConfigError, match=message):
        JsonlTask(Jsonl(path=data, chat_template=True), tokenizer)
