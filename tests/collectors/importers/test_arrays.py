"""Arrow's reading of JSON lines gives what Python's gives, or leaves the file to Python."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.importers import arrays, dumps, prime_rl
from collectors.importers.arrays import INTEGER, NOTHING, NUMBERS, TEXT, TRUTHS, Numbers, rows_of
from collectors.importers.prime_rl import FORMAT
from collectors.importers.steps import Notes
from collectors.importers.text import objects
from tests.collectors.importers.dump_files import read
from tests.collectors.importers.test_prime_rl import SAMPLE, export, row

FIELDS = {"a": NUMBERS, "b": TRUTHS, "n": INTEGER, "s": TEXT, "x": NOTHING}


def as_python(value):
    if not isinstance(value, Numbers):
        return value
    return [None if null else number for number, null in zip(value.values.tolist(), value.null.tolist(), strict=True)]


def same(path) -> bool:
    """False if the file is left to Python, True if what Arrow gives is the same."""
    found = rows_of(path, FIELDS)
    if found is None:
        return False
    notes = Notes()
    expected = [{name: row.get(name) for name in FIELDS} for _, row in objects(path, notes)]
    assert not list(notes), "Python has something to say about it"
    assert repr([{n: as_python(v) for n, v in row.items()} for row in found]) == repr(
        [{n: list(map(_float, v)) if isinstance(v, list) else v for n, v in row.items()} for row in expected]
    )
    return True


def _float(value):
    return None if value is None else float(value)


READ = [
    b'{"a": [1, 2.5, null, -0.0, 1e-310], "b": [true, null, false], "n": -3, "s": "\\u00e4\\ud83d\\ude00\\n", "x": []}',
    b'{"a": [NaN, Infinity, -Infinity]}\n\n  {"n": 4}  \r\n',
    b'{"a": [123456789012345678901234567890, 9007199254740993, 0.1, 2.2250738585072011e-308]}',
    b'{"a": null, "other": {"a": [true], "deep": [[["x"]]]}, "s": "2026-11-23T00:00:00"}\n{}',
    '{"s": "�"}'.encode(), b"",
]  # fmt: skip
LEFT_TO_PYTHON = [
    b'{"a": ["NaN"]}', b'{"a": [true]}', b'{"b": [1]}', b'{"a": 5}', b'{"n": 1.0}', b'{"n": "1"}', b'{"s": 1}',
    b'{"x": [1]}', b'{"x": [{}]}', b'{"n": 1, "n": 2}', b'{"n": 9223372036854775808}', b'{"a": [1e400]}',
    b'{"a": [Inf]}', b'{"y": [Inf]}', b'{"n": 1}\n{"n": 2', b'{"n": 1}\ntext', b"[1]", b"3", b'{"n": 1} {"n": 2}',
    b'{"n":\n1}', b'{"n": 1} {"n":\n2}', b'{"s": "\xff"}', b'{"y": "\xff"}', b'{"s": "\\ud800"}', b'{"s": "a\tb"}',
    b'\xef\xbb\xbf{"n": 1}', '{"n": 1}'.encode("utf-16"), b'{"n": 1,}', b'{"y": 01}', b'{"y": 1} # text',
]  # fmt: skip


@pytest.mark.parametrize("data", READ)
def test_what_is_read_is_what_python_reads(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    assert same(tmp_path / "x")


@pytest.mark.parametrize("data", LEFT_TO_PYTHON)
def test_what_is_odd_is_left_to_python(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    assert rows_of(tmp_path / "x", FIELDS) is None
    assert rows_of(tmp_path / "absent", FIELDS) is None


def test_a_file_of_several_blocks_is_read_in_order(tmp_path, monkeypatch):
    lines = [json.dumps({"n": i, "a": [i] * (i % 7)}) for i in range(500)]
    (tmp_path / "x").write_text("\n".join(lines))
    monkeypatch.setattr(arrays, "_BLOCK", 100)
    assert same(tmp_path / "x")
    assert [row["n"] for row in rows_of(tmp_path / "x", FIELDS)] == list(range(500))


VALUES = st.one_of(st.none(), st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.text(max_size=3))
ROWS = st.fixed_dictionaries({}, optional={
    "a": st.one_of(st.lists(st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.none()), max_size=4), VALUES),
    "b": st.one_of(st.lists(st.one_of(st.booleans(), st.none()), max_size=4), VALUES), "n": VALUES, "s": VALUES,
    "x": st.one_of(st.lists(VALUES, max_size=2), VALUES), "y": VALUES,
})  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(found=st.lists(ROWS, max_size=3), ascii_only=st.booleans())
def test_random_rows(tmp_path_factory, found, ascii_only):
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    text = "\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in found)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    same(path)


def test_exports_of_prime_rl_are_read_by_arrow(tmp_path):
    for file in (SAMPLE, export(tmp_path, 5, [row(), row(entropy=[None, 0.5, 1])])):
        assert rows_of(file, prime_rl._FIELDS) is not None


ODD = [
    {}, {"advantages": [None] * 3}, {"advantages": [0.5]}, {"advantages": []}, {"rl_weights": [1.0, 1.0, 1.0]},
    {"rl_weights": []}, {"rl_weights": None}, {"losses": []}, {"losses": None}, {"losses": [None, None, None]},
    {"rewards": [0.5, 0.5, None]}, {"rewards": [0.5, 1.0, 1.0]}, {"entropy": [None, 0.25, math.inf]},
    {"trainer_logprobs": [-1.0, -2.0]}, {"token_ids": [7, 8, -1]}, {"token_ids": [7, 8, 9.5]}, {"entropy": ...},
    {"loss_mask": [False] * 3}, {"loss_mask": [True, None, True]}, {"loss_mask": ...}, {"run_id": "a", "rank": 3},
    {"step": ..., "export_step": 5}, {"step": ...},
]  # fmt: skip


@pytest.mark.parametrize("change", ODD)
def test_a_step_is_the_same_either_way(tmp_path, monkeypatch, change):
    export(tmp_path, 5, [row(), row(**change)])
    fast, fast_notes = read(FORMAT, tmp_path)
    monkeypatch.setattr(dumps, "rows_of", lambda *_: None)
    slow, slow_notes = read(FORMAT, tmp_path)
    assert fast_notes == slow_notes and len(fast) == len(slow)
    for one, other in zip(fast, slow, strict=True):
        assert repr((one.sequences, one.metrics)) == repr((other.sequences, other.metrics))
        for name, values in vars(one.batch).items():
            expected = vars(other.batch)[name]
            assert (values is None) == (expected is None), name
            if values is not None:
                assert values.dtype == expected.dtype
                assert np.array_equal(values.numpy(), expected.numpy(), equal_nan=values.is_floating_point()), name
