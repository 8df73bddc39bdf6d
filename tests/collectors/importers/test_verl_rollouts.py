"""verl's dumps of rollouts."""

from __future__ import annotations

import codecs
import json
import math

import pytest

from collectors.importers.verl_rollouts import FORMAT
from tests.collectors.importers.dump_files import DATA, read, read_one, refused, write_lines


def row(**given) -> dict:
    found = {"input": "p", "output": "o", "gts": "g", "score": 1.0, "step": 4}
    return {name: value for name, value in (found | given).items() if value is not ...}


@pytest.mark.parametrize(
    ("folder", "first"),
    [("rollout_data_dir_v0", {"gts": "8", "acc": 1.0, "request_id": "a"}),
     ("rollout_data_dir_v1", {"gts": "8", "uid": "q002_0_0"})],
)  # fmt: skip
def test_the_samples(folder, first):
    for path in (DATA / "verl" / folder, DATA / "verl" / folder / "7.jsonl"):
        step, notes = read_one(FORMAT, path)
        assert step.step == 7 and step.batch is None and step.metrics == {} and notes == []
        assert step.sequences.reward == [1.0, 0.0, 1.0, 0.0] and step.sequences.group_id == [0, 0, 1, 1]
        assert step.sequences.prompt == ["2+6=", "2+6=", "3+9=", "3+9="]
        assert step.sequences.completion == ["8", "81", "12", "x"] and step.sequences.extra[0] == first


def test_steps_come_by_number_and_validation_is_not_taken(tmp_path):
    for step in (10, 9, 100):
        write_lines(tmp_path / "run" / "rollouts" / f"{step}.jsonl", [row(step=step)])
        write_lines(tmp_path / "run" / "eval" / f"{step}.jsonl", [row(step=step + 1)])
    assert [one.step for one in read(FORMAT, tmp_path / "run")[0]] == [9, 10, 100]
    assert FORMAT.find(tmp_path) == []


def test_groups_are_samples_or_else_prompts(tmp_path):
    def group(*rows):
        return read_one(FORMAT, write_lines(tmp_path / "1.jsonl", list(rows)))[0].sequences.group_id

    # two samples of the same prompt are two groups; a uid of another make says nothing
    assert group(row(uid="a_b_0_0"), row(uid="a_c_0_0"), row(uid="a_b_1_0")) == [0, 1, 0]
    assert group(row(uid="5e0c-77"), row(uid="11d2-90"), row(input="q", uid=None)) == [0, 0, 1]
    assert group(row(input="p"), row(input="q")) is None


def test_the_step_is_that_of_the_line_else_of_the_name(tmp_path):
    file = write_lines(tmp_path / "12.jsonl", [row(step=...), row(step="5"), row(step=None), row(step=5.0)])
    steps, _ = read(FORMAT, file)
    assert [(one.step, one.sequences.count()) for one in steps] == [(12, 2), (5, 2)]
    file = write_lines(tmp_path / "other.jsonl", [row(step=-1), row()])
    steps, notes = read(FORMAT, file)
    assert [one.step for one in steps] == [4] and notes == ["A line without a step is left out (first: other.jsonl)."]


def test_odd_scores(tmp_path):
    scores = [None, "NaN", math.inf, "0.5", [1.0], "good", ...]
    step, _ = read_one(FORMAT, write_lines(tmp_path / "1.jsonl", [row(score=0.0), *(row(score=s) for s in scores)]))
    assert str(step.sequences.reward) == "[0.0, None, nan, inf, 0.5, 1.0, None, None]"
    step, _ = read_one(FORMAT, write_lines(tmp_path / "1.jsonl", [row(score=None, input=None, output=["x"])]))
    assert step.sequences.reward is None and step.sequences.prompt is None and step.sequences.completion == ["['x']"]


def test_damaged_and_other_files(tmp_path):
    whole = json.dumps(row())
    (tmp_path / "1.jsonl").write_bytes(codecs.BOM_UTF8 + f"{whole}\nnot json\n{whole}\n{whole[:20]}".encode())
    (tmp_path / "2.jsonl").write_text(whole[:20])
    (tmp_path / "3.jsonl").write_bytes(json.dumps(row(output="é"), ensure_ascii=False).encode("latin-1"))
    (tmp_path / "4.jsonl").write_text("")
    steps, notes = read(FORMAT, tmp_path)
    assert [one.sequences.completion for one in steps] == [["o", "o"], ["\ufffd"]]
    assert "A file cannot be read and is left out (first: 2.jsonl)." in notes
    refused(FORMAT, [tmp_path / "2.jsonl"], "no line of .* is a JSON object")
    (tmp_path / "5.jsonl").write_text('{"input": 1, "output": 2}\n')
    assert FORMAT.find(tmp_path / "5.jsonl") == [] == FORMAT.find(tmp_path / "4.jsonl")
