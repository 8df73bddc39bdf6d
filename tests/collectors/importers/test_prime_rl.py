"""prime-rl's token export: what of it becomes tokens, and what is left out."""

from __future__ import annotations

import codecs
import json
import math

import pytest
import torch

from collectors.importers.formats import recognise
from collectors.importers.prime_rl import FORMAT
from mhpo_core.errors import StoreError
from tests.collectors.importers.dump_files import DATA, lines_of, read, read_one, refused, single, trained, write_lines

SAMPLE = DATA / "prime-rl" / "token_exports" / "step_3" / "rank_0.jsonl"


def row(**given) -> dict:
    found = {
        "schema_version": 1, "step": 5, "rank": 0, "micro_step": 0, "micro_sequence_idx": 0, "export_sequence_idx": 0,
        "env_name": "math", "token_ids": [7, 8, 9], "position_ids": [0, 1, 2], "loss_mask": [False, True, True],
        "advantages": [0.5, 0.5, 0.5], "inference_logprobs": [-9.0, -1.0, -2.0], "entropy": [0.0, 0.25, 0.5],
        "trainer_logprobs": [-9.0, -1.5, -2.5],
    }  # fmt: skip
    return {name: value for name, value in (found | given).items() if value is not ...}


def export(root, step, rows, rank=0, stable=True):
    file = write_lines(root / "token_exports" / f"step_{step}" / f"rank_{rank}.jsonl", rows)
    if stable:
        (file.parent / "STABLE").touch()
    return file


def test_the_sample_gives_the_tokens_that_its_mask_selects():
    step, notes = read_one(FORMAT, DATA / "prime-rl")
    rows = lines_of(SAMPLE)
    assert step.step == 3 and step.ratio_known and step.metrics == {} and notes == []
    assert step.batch.mask.sum() == sum(sum(one["loss_mask"]) for one in rows) == 10
    fields = {
        "logp_new": "trainer_logprobs", "logp_old": "inference_logprobs", "advantage": "advantages",
        "entropy": "entropy", "token_id": "token_ids",
    }  # fmt: skip
    for ours, theirs in fields.items():
        selected = [[v for v, m in zip(one[theirs], one["loss_mask"], strict=True) if m] for one in rows]
        assert trained(step, ours) == (selected if ours == "token_id" else single(selected)), ours
    # what the exporter computed itself
    ratio = [[math.exp(n - o) for n, o in zip(*both, strict=True)]
             for both in zip(trained(step, "logp_new"), trained(step, "logp_old"), strict=True)]  # fmt: skip
    theirs = [[v for v, m in zip(one["importance_ratio"], one["loss_mask"], strict=True) if m] for one in rows]
    for got, told in zip(ratio, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(told), rtol=1e-6, atol=0)
    assert step.batch.logp_rollout is None and step.batch.logp_ref is None
    assert step.sequences.reward is None and step.sequences.group_id is None
    assert [one["export_sequence_idx"] for one in step.sequences.extra] == [0, 1]
    assert step.sequences.extra[0]["env_name"] == "math"


def test_a_folder_gives_its_complete_steps_in_numeric_order(tmp_path):
    for step in (10, 2):
        export(tmp_path, step, [row(step=step)])
    export(tmp_path, 9, [row(step=9)], stable=False)
    for path in (tmp_path, tmp_path / "token_exports"):
        steps, notes = read(FORMAT, path)
        assert [one.step for one in steps] == [2, 10]
        assert notes == ["A step without its STABLE marker is not complete and is left out (first: step_9)."]
    assert [one.step for one in read(FORMAT, tmp_path / "token_exports" / "step_2")[0]] == [2]


def test_exports_of_which_no_step_is_complete_are_named(tmp_path):
    for step in (10, 9):
        export(tmp_path, step, [row(step=step)], stable=False)
    for path in (tmp_path, tmp_path / "token_exports"):
        with pytest.raises(StoreError) as raised:
            recognise(path)
        assert str(raised.value) == (
            f"import: {path} holds token exports of prime-rl of which no step is complete: STABLE is missing in "
            "step_9, step_10. Wait until prime-rl has written it, or give one of the files."
        )
    with pytest.raises(StoreError, match="no step is complete: STABLE is missing in step_9. Wait"):
        recognise(tmp_path / "token_exports" / "step_9")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert [form.name for form, _ in recognise(tmp_path)] == ["tables"], "another format is still found"
    (tmp_path / "token_exports" / "step_9" / "STABLE").touch()
    assert [form.name for form, _ in recognise(tmp_path)] == ["prime-rl", "tables"]


def test_a_single_file_needs_no_marker(tmp_path):
    export(tmp_path, 9, [row(step=9)], stable=False)
    step, notes = read_one(FORMAT, tmp_path / "token_exports" / "step_9" / "rank_0.jsonl")
    assert step.step == 9 and notes == []
    # the folder's number is the run's step where several runs share a trainer
    export(tmp_path, 8, [row(step=..., export_step=...)], stable=False)
    assert read_one(FORMAT, tmp_path / "token_exports" / "step_8" / "rank_0.jsonl")[0].step == 8
    moved = write_lines(tmp_path / "moved.jsonl", [row(step=4, export_step=6), row(step=4, export_step=6), row(step=7)])
    assert [(one.step, one.batch.n_sequences) for one in read(FORMAT, moved)[0]] == [(6, 2), (7, 1)]


def test_the_ranks_of_a_step_are_one_batch(tmp_path):
    for rank in (10, 2):
        export(tmp_path, 1, [row(rank=rank), row(rank=rank, token_ids=[1, 2, 3])], rank)
    step, _ = read_one(FORMAT, tmp_path)
    assert [one["rank"] for one in step.sequences.extra] == [2, 2, 10, 10]
    assert trained(step, "token_id") == [[8, 9], [2, 3]] * 2


def test_null_is_a_number_that_is_not_finite(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [row(trainer_logprobs=[None, None, None], entropy=[0.0, None, 1.0])])
    step, notes = read_one(FORMAT, file)
    assert [math.isnan(v) for v in trained(step, "logp_new")[0]] == [True, True] and notes == []
    assert str(trained(step, "entropy")) == "[[nan, 1.0]]" and trained(step, "logp_old") == [[-1.0, -2.0]]


def test_numbers_may_be_text_or_infinite(tmp_path):
    file = tmp_path / "a.jsonl"
    text = json.dumps(row(trainer_logprobs=[0, "NaN", "-Infinity"], advantages=[0, math.inf, 1e39]))
    file.write_text(text, "utf-8")
    step, _ = read_one(FORMAT, file)
    assert str(trained(step, "logp_new")) == "[[nan, -inf]]"
    assert trained(step, "advantage") == [[math.inf, 1e39]] and step.batch.advantage.dtype == torch.float64
    assert step.batch.logp_old.dtype == torch.float32


def test_a_token_that_only_another_loss_trains_is_left_out(tmp_path):
    losses = [{}, {"ce": {"advantage": None, "mask": True}}, {"rl": {"advantage": 0.5, "mask": True}}]
    file = write_lines(tmp_path / "a.jsonl", [row(losses=losses, rewards=[None, 1.0, 1.0])])
    step, notes = read_one(FORMAT, file)
    assert trained(step, "token_id") == [[9]] and step.sequences.reward == [1.0] and notes == []
    file = write_lines(tmp_path / "b.jsonl", [row(advantages=[None] * 3, rewards=[1.0, 2.0, 2.0]), row()])
    step, notes = read_one(FORMAT, file)
    assert trained(step, "token_id") == [[], [8, 9]] and step.sequences.reward is None
    assert notes == [
        "A sequence lacks a per-token array, its tokens are left out (first: step 5).",
        "A sequence has several rewards, none is taken (first: step 5).",
    ]


def test_arrays_of_different_lengths_cost_one_sequence_its_tokens(tmp_path):
    rows = [row(), row(trainer_logprobs=[-1.0, -2.0]), row(entropy=[0.5]), row(token_ids=[1.5, 2, 3])]
    step, notes = read_one(FORMAT, write_lines(tmp_path / "a.jsonl", rows))
    assert step.batch.mask.sum(1).tolist() == [2, 0, 2, 2] and step.batch.n_sequences == 4
    assert step.batch.entropy is None and step.batch.token_id is None
    assert "Per-token arrays of a sequence have different lengths, its tokens are left out (first: step 5)." in notes
    assert "A sequence has entropy that does not fit its tokens, it is left out (first: step 5)." in notes
    assert "A step has entropy for some of its sequences only, it is left out (first: step 5)." in notes


def test_a_step_without_tokens_keeps_its_sequences(tmp_path):
    step, _ = read_one(FORMAT, write_lines(tmp_path / "a.jsonl", [row(loss_mask=[False] * 3)]))
    assert step.batch is None and step.sequences.count() == 1


def test_odd_bytes_and_ends_cost_no_more_than_their_lines(tmp_path):
    whole = json.dumps(row(env_name="é"))
    file = tmp_path / "a.jsonl"
    file.write_bytes(codecs.BOM_UTF8 + f"{whole}\n\n[1]\n{whole}\n{whole[:40]}".encode())
    step, notes = read_one(FORMAT, file)
    assert step.batch.n_sequences == 2 and step.sequences.extra[0]["env_name"] == "é"
    assert [note.split(" (")[0] for note in notes] == [
        "A line is no JSON object and is left out", "The last line is cut off and is left out",
    ]  # fmt: skip
    file.write_bytes(whole.encode("utf-16"))
    assert read_one(FORMAT, file)[0].sequences.extra[0]["env_name"] == "é"
    # json.dumps writes é as \\u00e9; latin-1 bytes come from elsewhere
    file.write_bytes(json.dumps(row(env_name="é"), ensure_ascii=False).encode("latin-1"))
    step, notes = read_one(FORMAT, file)
    assert step.sequences.extra[0]["env_name"] == "\ufffd" and len(notes) == 1


def test_a_line_longer_than_what_is_read_to_recognise_it(tmp_path):
    n = 150_000
    long = row(token_ids=list(range(100_000, 100_000 + n)), loss_mask=[False] * (n - 1) + [True], advantages=[1.0] * n,
               inference_logprobs=[-1.0] * n, trainer_logprobs=[-2.0] * n, entropy=[0.5] * n)  # fmt: skip
    file = export(tmp_path, 1, [long])
    assert file.stat().st_size > 3 << 20
    step, _ = read_one(FORMAT, tmp_path)
    assert step.batch.logp_new.shape == (1, 1) and step.batch.token_id.item() == 100_000 + n - 1


def test_other_files_are_not_taken(tmp_path):
    for name, text in {"empty.jsonl": "", "a.jsonl": '{"step": 1}\n', "b.jsonl": "[]", "c.jsonl": "\x00\xff"}.items():
        (tmp_path / name).write_text(text)
        assert FORMAT.find(tmp_path / name) == []
    assert FORMAT.find(tmp_path) == [] and FORMAT.find(tmp_path / "nowhere") == []
    (tmp_path / "a.jsonl").write_text("no json\n")
    refused(FORMAT, [tmp_path / "a.jsonl"], "no line of .* is a JSON object")
    (tmp_path / "a.jsonl").write_text(json.dumps(row(step=None)) + "\n")
    assert read(FORMAT, tmp_path / "a.jsonl") == ([], ["A line without a step is left out (first: a.jsonl)."])


def test_a_damaged_rank_of_many_is_left_out(tmp_path):
    export(tmp_path, 1, [row()])
    (tmp_path / "token_exports" / "step_1" / "rank_1.jsonl").write_text('{"schema')
    step, notes = read_one(FORMAT, tmp_path)
    assert step.batch.n_sequences == 1
    assert "A file cannot be read and is left out (first: rank_1.jsonl)." in notes
