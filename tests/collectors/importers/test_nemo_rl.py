"""NeMo-RL's dumps of training data."""

from __future__ import annotations

import json
import math

import pytest

from collectors.importers.nemo_rl import FORMAT
from tests.collectors.importers.dump_files import DATA, lines_of, read, read_one, refused, single, trained, write_lines

SAMPLE = DATA / "nemo-rl" / "train_data_step7.jsonl"


def row(**given) -> dict:
    found = {
        "content": ["ab"], "rewards": [1.0], "input_lengths": [4], "token_ids": [[1, 2, 3, 4, 0]],
        "token_loss_mask": [[0, 0, 1, 1, 0]], "sample_loss_mask": [1.0], "advantages": [[0.5] * 5],
        "generation_logprobs": [[0.0, 0.0, -1.0, -2.0, 0.0]], "prev_logprobs": [[0.0, 0.0, -1.5, -2.5, 0.0]], "idx": 0,
    }  # fmt: skip
    return {name: value for name, value in (found | given).items() if value is not ...}


def dump(tmp_path, rows, step=1):
    return write_lines(tmp_path / f"train_data_step{step}.jsonl", rows)


def test_the_sample_gives_the_tokens_that_its_masks_select():
    step, notes = read_one(FORMAT, DATA / "nemo-rl")
    rows = lines_of(SAMPLE)
    assert step.step == 7 and not step.ratio_known
    assert step.batch.mask.sum() == sum(sum(one["token_loss_mask"][0]) for one in rows) == 18
    fields = {
        "logp_old": "prev_logprobs", "logp_new": "prev_logprobs", "logp_rollout": "generation_logprobs",
        "advantage": "advantages", "token_id": "token_ids",
    }  # fmt: skip
    for ours, theirs in fields.items():
        selected = [[v for v, m in zip(one[theirs][0], one["token_loss_mask"][0], strict=True) if m] for one in rows]
        assert trained(step, ours) == (selected if ours == "token_id" else single(selected)), ours
    assert step.batch.logp_new.data_ptr() != step.batch.logp_old.data_ptr()
    assert step.sequences.reward == [0.0, 1.0, 0.0, 1.0] and step.sequences.group_id == [0, 0, 0, 0]
    assert step.sequences.completion == ["2+6=88888", "2+6=8888", "2+6=888888", "2+6=888"]
    assert step.sequences.extra[2] == {"idx": 2, "input_lengths": 9, "sample_loss_mask": 1.0}
    assert notes == ["NeMo-RL writes prompt and response as one text, it is shown as the completion."]


def test_steps_come_by_number_and_launches_one_after_the_other(tmp_path):
    for launch, step in ((999, 9), (999, 3), (1000, 4), (1, 2), (1, 10)):
        dump(tmp_path / f"exp_{launch:03d}", [row()], step)
    assert [one.step for one in read(FORMAT, tmp_path)[0]] == [2, 10, 3, 9, 4]
    assert [one.step for one in read(FORMAT, tmp_path / "exp_001")[0]] == [2, 10]


def test_sequences_with_the_same_prompt_are_a_group(tmp_path):
    other = [[1, 9, 3, 4, 0]]
    rows = [row(), row(token_ids=other), row(token_ids=[[1, 2, 7, 7, 7]]), row(token_ids=other)]
    assert read_one(FORMAT, dump(tmp_path, rows))[0].sequences.group_id == [0, 1, 0, 1]
    # where every prompt is alone there are no groups, rather than groups that all have no spread
    assert read_one(FORMAT, dump(tmp_path, rows[:2]))[0].sequences.group_id is None


def test_a_masked_sample_and_the_first_position_do_not_train(tmp_path):
    rows = [row(sample_loss_mask=[0.0]), row(token_loss_mask=[[1, 0, 1, 1, 0]])]
    step, _ = read_one(FORMAT, dump(tmp_path, rows))
    assert trained(step, "token_id") == [[], [3, 4]]


@pytest.mark.parametrize("advantage", [0.25, [0.25], [[0.25]]])
def test_one_advantage_stands_for_all_tokens(tmp_path, advantage):
    step, _ = read_one(FORMAT, dump(tmp_path, [row(advantages=advantage)]))
    assert trained(step, "advantage") == [[0.25, 0.25]]


def test_null_is_unknown_and_nan_is_a_number(tmp_path):
    values = [[0.0, 0.0, None, math.nan, 0.0]]
    step, notes = read_one(FORMAT, dump(tmp_path, [row(prev_logprobs=values), row(generation_logprobs=[["NaN"] * 5])]))
    assert trained(step, "token_id") == [[4], [3, 4]] and str(trained(step, "logp_old")) == "[[nan], [-1.5, -2.5]]"
    assert str(trained(step, "logp_rollout")) == "[[-2.0], [nan, nan]]"
    assert "A token that lacks a number is left out (first: step 1)." in notes
    step, _ = read_one(FORMAT, dump(tmp_path, [row(rewards=[None]), row(rewards=["NaN"]), row(rewards=[math.inf])]))
    assert str(step.sequences.reward) == "[None, nan, inf]"


def test_an_older_dump_without_advantages_keeps_its_texts(tmp_path):
    step, notes = read_one(FORMAT, dump(tmp_path, [row(advantages=..., token_ids=...)]))
    assert step.batch is None and step.sequences.completion == ["ab"] and step.sequences.group_id is None
    assert "A sequence lacks a per-token array, its tokens are left out (first: step 1)." in notes


def test_different_lengths(tmp_path):
    rows = [row(prev_logprobs=[[0.0, -1.0]]), row(generation_logprobs=[[0.0]]), row(token_ids="text")]
    step, _ = read_one(FORMAT, dump(tmp_path, rows))
    assert step.batch.mask.sum(1).tolist() == [0, 2, 2]
    assert step.batch.logp_rollout is None and step.batch.token_id is None


def test_damaged_and_other_files(tmp_path):
    whole = json.dumps(row())
    (tmp_path / "train_data_step1.jsonl").write_text(f"{whole}\n{whole[:50]}")
    (tmp_path / "train_data_step2.jsonl").write_text(whole[:50])
    (tmp_path / "train_data_step3.jsonl").write_text("")
    (tmp_path / "val_data_step1.jsonl").write_text(whole)
    steps, notes = read(FORMAT, tmp_path)
    assert [(one.step, one.batch.n_sequences) for one in steps] == [(1, 1)]
    assert "A file cannot be read and is left out (first: train_data_step2.jsonl)." in notes
    assert FORMAT.find(tmp_path / "val_data_step1.jsonl") == [] == FORMAT.find(tmp_path / "train_data_step3.jsonl")
    refused(FORMAT, [tmp_path / "train_data_step2.jsonl"], "no line of .* is a JSON object")
