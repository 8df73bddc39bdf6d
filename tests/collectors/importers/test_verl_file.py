"""verl's file logger: a file that verl 0.9.1 wrote, and what restarts, crashes and other programs make of one."""

from __future__ import annotations

import json
import math

from collectors.importers.verl_file import FORMAT
from tests.collectors.importers.reading import DATA, read, refused

LOG = DATA / "verl" / "file_logger" / "proj" / "exp.jsonl"


def written(path, *lines, end="\n"):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
    return path


def test_a_log_of_verl_comes_back_number_by_number():
    expected = [json.loads(line) for line in LOG.read_text().splitlines()]
    for path in (LOG, LOG.parent, LOG.parent.parent):
        steps, notes = read(FORMAT, path)
        assert [(s.step, s.metrics) for s in steps] == [(row["step"], row["data"]) for row in expected]
        assert notes == [] and all(s.batch is None and s.wall_time is None for s in steps)
    assert [s.step for s in steps] == [7, 8] and len(steps[0].metrics) == 84
    assert steps[0].metrics["response_length/clip_ratio"] == 0.25


def test_nested_data_odd_numbers_and_clocks(tmp_path):
    data = {
        "a": {"b": 1, "c": {"d": [2.5]}},
        "n": math.nan,
        "i": "-Infinity",
        "s": "NaN",
        "u": None,
        "t": "text",
        "l": [1, 2],
    }
    steps, notes = read(FORMAT, written(tmp_path / "x.jsonl", {"step": 3, "data": data, "timestamp": 1.7e9}))
    found = steps[0].metrics
    assert set(found) == {"a/b", "a/c/d", "n", "i", "s"} and notes == [] and steps[0].wall_time == 1.7e9
    assert (found["a/b"], found["a/c/d"], found["i"]) == (1.0, 2.5, -math.inf) and math.isnan(found["n"] + found["s"])


def test_lines_of_one_step_are_one_and_a_rewind_is_another_attempt(tmp_path):
    path = written(
        tmp_path / "x.jsonl",
        {"step": 0, "data": {"val-core/x": 0.5}},
        {"step": 1, "data": {"a": 1}},
        {"step": 1, "data": {"b": 2}},
        {"step": 2, "data": {"a": 3}},
        {"step": 1, "data": {"a": 4}},
        {"step": 1, "data": {"a": 5}},
    )
    steps, notes = read(FORMAT, path)
    assert [(s.step, s.metrics) for s in steps] == [
        (0, {"val-core/x": 0.5}),
        (1, {"a": 1.0, "b": 2.0}),
        (2, {"a": 3.0}),
        (1, {"a": 4.0}),
        (1, {"a": 5.0}),
    ]
    assert len(notes) == 1 and "attempt" in notes[0]


def test_odd_lines_cost_themselves_alone(tmp_path):
    good = {"step": 1, "data": {"a": 1}}
    lines = [
        good,
        "[1]",
        {"step": -1, "data": {}},
        {"data": {"a": 1}},
        {"step": 2, "data": 7},
        {"step": "3", "data": {"a": 2}},
    ]
    steps, notes = read(FORMAT, written(tmp_path / "x.jsonl", *lines, '{"step": 4, "data": {"a": 0.1', end=""))
    assert [(s.step, s.metrics) for s in steps] == [(1, {"a": 1.0}), (3, {"a": 2.0})]
    assert [note.split(" (")[0] for note in notes] == [
        "A line is no JSON object and is left out",
        "A line has no step number and is left out, 2 times",
        "A line has no data and is left out",
        "The last line is cut off and is left out",
    ]


def test_a_byte_order_mark_and_utf_16_are_read(tmp_path):
    line = json.dumps({"step": 1, "data": {"a": 1}}) + "\n"
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "x.jsonl").write_text(line, encoding=encoding)
        assert read(FORMAT, tmp_path / "x.jsonl")[0][0].metrics == {"a": 1.0}


def test_other_files_are_left_alone(tmp_path):
    for name, text in {
        "a.jsonl": '{"step": 1, "loss": 2}',
        "b.jsonl": "",
        "c.jsonl": '{"data": {}}',
        "d.jsonl": '{"step": 1, "data": [1]}',
        "e.jsonl": "step: 1",
    }.items():
        (tmp_path / name).write_text(text)
        assert FORMAT.find(tmp_path / name) == []
    assert FORMAT.find(tmp_path) == FORMAT.find(tmp_path / "absent") == []
    assert FORMAT.find(DATA / "verl" / "real_verl_steps_142_143_145.log") == []


def test_several_experiments_are_not_mixed_into_one(tmp_path):
    files = [written(tmp_path / name, {"step": 1, "data": {"a": 1}}) for name in ("x2.jsonl", "x10.jsonl")]
    assert FORMAT.find(tmp_path) == files
    refused(FORMAT, files, r"2 experiments of verl: .*x2.*x10.*Give the file of one")
    refused(FORMAT, [written(tmp_path / "y", {"step": None, "data": {}})], "holds no line")
    refused(FORMAT, [written(tmp_path / "z", "text")], "no line .* is a JSON object")
