"""RLLoggingBoard's records: texts and rewards always, tokens where there are advantages."""

from __future__ import annotations

import codecs
import json
import math

from collectors.importers.rlloggingboard import FORMAT
from tests.collectors.importers.dump_files import DATA, lines_of, read, read_one, refused, trained, write_lines

FOLDER = DATA / "rlloggingboard"


def row(step=1, **given) -> dict:
    return {"prompt": "p", "response": "r", "reward": 0.5, "step": step} | given


def test_the_token_record_keeps_what_it_cannot_align():
    step, notes = read_one(FORMAT, FOLDER / "readme_token_record.jsonl")
    (told,) = lines_of(FOLDER / "readme_token_record.jsonl")
    assert step.step == 4 and step.batch is None
    assert step.sequences.reward == [0.0] and step.sequences.prompt == [
        "<PAD>请编写“上相生坤位,中兴运泰开。”的下一句,要求押韵。"
    ]
    assert step.sequences.completion == ["威仪如鹤梦,道德似桃梅。<EOD><PAD>"] and step.sequences.length == [12]
    extra = step.sequences.extra[0]
    assert len(extra["response_tokens"]) == 13 and len(extra["logprobs"]) == 12
    assert extra == {
        name: told[name] for name in ("response_tokens", "logprobs", "ref_logprobs", "values", "token_rewards")
    }
    assert notes == ["Tokens without advantages are kept as they are written, beside the text (first: step 4)."]


def test_the_record_of_a_real_evaluation():
    file = FOLDER / "eval_poem_task.jsonl"
    told = lines_of(file)
    steps, notes = read(FORMAT, file)
    assert [one.step for one in steps] == list(range(0, 2400, 100)) and notes == []
    assert [one.sequences.count() for one in steps] == [128] * 23 + [56]
    assert [r for one in steps for r in one.sequences.reward] == [one["reward"] for one in told]
    # measured apart: python -c "sum(json.loads(line)['reward'] ...)"
    assert math.isclose(sum(steps[0].sequences.reward), -27.319372294372297)
    assert math.isclose(sum(steps[-1].sequences.reward), -2.5791666666666657)
    assert all(one.sequences.group_id is None and one.batch is None for one in steps)  # no prompt twice in a step
    assert steps[0].sequences.extra[0] == {"ref_response": "当时相见在京口,曾与新诗作画天。", "ref_reward": 0.0625}
    assert steps[-1].sequences.completion[-1] == "青楼梦破珠帘雨,古庙风高竹影枝。"


def test_with_advantages_there_are_tokens(tmp_path):
    rows = [
        row(logprobs=[-1.0, -2.0], advantages=[0.5, math.nan], ref_logprobs=[-3.0, "-Infinity"]),
        row(logprobs=[-1.0, None], advantages=[0.5, 0.5], ref_logprobs=[-3.0, -4.0]),
        row(logprobs=[-1.0, -2.0, -3.0], advantages=[0.5, 0.5], ref_logprobs=[-3.0, -4.0]),
        row(),
    ]
    step, notes = read_one(FORMAT, write_lines(tmp_path / "a.jsonl", rows))
    assert not step.ratio_known and trained(step, "logp_old") == [[-1.0, -2.0], [-1.0], [], []]
    assert trained(step, "logp_new") == trained(step, "logp_old")
    assert str(trained(step, "advantage")) == "[[0.5, nan], [0.5], [], []]"
    assert str(trained(step, "logp_ref")) == "[[-3.0, -inf], [-3.0], [], []]"
    assert step.sequences.length is None and step.sequences.count() == 4 and step.sequences.group_id == [0] * 4
    assert notes == [
        "A token that lacks a number is left out (first: step 1).",
        "Per-token arrays of a sequence have different lengths, its tokens are left out (first: step 1).",
    ]


def test_the_files_of_all_ranks_are_read_together(tmp_path):
    for rank in (0, 2, 10):
        file = tmp_path / f"rollout_data_rank{rank}.jsonl"
        write_lines(file, [row(s, rank=rank) for s in (1, 1, 2, 5) if (rank, s) != (2, 2)])
    steps, _ = read(FORMAT, tmp_path)
    assert [one.step for one in steps] == [1, 2, 5]
    assert [[e["rank"] for e in one.sequences.extra] for one in steps] == [[0, 0, 2, 2, 10, 10], [0, 10], [0, 2, 10]]


def test_a_step_that_comes_again_is_told_again(tmp_path):
    steps, notes = read(FORMAT, write_lines(tmp_path / "a.jsonl", [row(s) for s in (5, 5, 6, 4, 4, 6)]))
    assert [(one.step, one.sequences.count()) for one in steps] == [(5, 2), (6, 1), (4, 2), (6, 1)] and notes == []


def test_a_folder_with_two_records_is_not_one_run(tmp_path):
    write_lines(tmp_path / "a.jsonl", [row()])
    assert FORMAT.find(tmp_path) == [tmp_path / "a.jsonl"]
    write_lines(tmp_path / "b.jsonl", [row()])
    assert FORMAT.find(tmp_path) == []


def test_odd_lines(tmp_path):
    file, whole = tmp_path / "a.jsonl", json.dumps(row())
    odd = [
        json.dumps(row(None)),
        json.dumps(row("x")),
        json.dumps(row("1", reward="NaN")),
        json.dumps(row(1.0, reward=None)),
    ]
    file.write_bytes(codecs.BOM_UTF8 + "\n".join([whole, "[]", *odd, whole[:30]]).encode())
    step, notes = read_one(FORMAT, file)
    # the lines without a step come between lines of one step; they do not split it
    assert step.step == 1 and str(step.sequences.reward) == "[0.5, nan, None]"
    assert [note.split(" (first")[0] for note in notes] == [
        "A line is no JSON object and is left out", "A line without a step is left out, 2 times",
        "The last line is cut off and is left out",
    ]  # fmt: skip
    file.write_bytes(json.dumps(row(prompt="é"), ensure_ascii=False).encode("utf-16"))
    assert read_one(FORMAT, file)[0].sequences.prompt == ["é"]
    file.write_bytes(json.dumps(row(prompt="é"), ensure_ascii=False).encode("latin-1"))
    assert read_one(FORMAT, file)[0].sequences.prompt == ["\ufffd"]


def test_other_files(tmp_path):
    for text in ("", "{}\n", '{"step": 1, "reward": 2}\n', "no json\n"):
        (tmp_path / "a.jsonl").write_text(text)
        assert FORMAT.find(tmp_path / "a.jsonl") == [] == FORMAT.find(tmp_path)
    refused(FORMAT, [tmp_path / "a.jsonl"], "no line of .* is a JSON object")
