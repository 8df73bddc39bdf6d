"""W&B: the log of an offline run that wandb wrote, logs framed here, and exported CSV files."""

from __future__ import annotations

import csv
import gzip
import json
import math
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.importers import leveldb
from collectors.importers.steps import Notes
from collectors.importers.wandb import FORMAT
from tests.collectors.importers.reading import DATA, read, refused, same

PACKED = DATA / "wandb" / "run-fixture1.wandb.gz"
EXPORT = DATA / "trackio" / "wandb_export_lm_loss.csv"
START = b":W&B\xe1\xbe\x00"
BLOCK = 32768


def framed(records: list[bytes]) -> bytes:
    """As the LevelDB log format tells it: no part header starts in the last six bytes of a block."""
    out = START
    for data in records:
        first = True
        while first or data:
            left = BLOCK - len(out) % BLOCK
            if left < 7:
                out += b"\0" * left
                left = BLOCK
            part, data = data[: left - 7], data[left - 7 :]
            kind = (1 if not data else 2) if first else (4 if not data else 3)
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
            if kind in (1, 4):
                break
    return out


def sized(number: int, data: bytes) -> bytes:
    out, size = b"", len(data)
    while size > 127:
        out, size = out + bytes([size & 127 | 128]), size >> 7
    key = number << 3 | 2
    return (bytes([key & 127 | 128, key >> 7]) if key > 127 else bytes([key])) + out + bytes([size]) + data


def history(**values: object) -> bytes:
    items = [
        sized(1, n.encode()) + sized(16, (v if isinstance(v, str) else json.dumps(v)).encode())
        for n, v in values.items()
    ]
    return sized(2, b"".join(sized(1, item) for item in items))


def log(path, *records: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(framed(list(records)))
    return path


def plain(steps):
    return [(s.step, s.metrics) for s in steps]


@pytest.fixture
def real(tmp_path):
    path = tmp_path / "wandb" / "offline-run-20231114_221320-fixture1" / "run-fixture1.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.decompress(PACKED.read_bytes()))
    return path


def test_a_run_that_wandb_wrote_comes_back_number_by_number(real, tmp_path):
    (tmp_path / "wandb" / "latest-run").symlink_to(real.parent)
    expected = [(10 * i, {"train/loss": 1.0 / i, "nested/a": i, "nested/b/c": -i}) for i in range(1, 6)]
    expected[1][1]["eval/loss"] = 7.5
    expected[2][1].update({"train/nan": math.nan, "train/inf": math.inf, "train/ninf": -math.inf})
    expected += [(60, {"train/loss": 0.125}), (70, {"train/loss": 0.0625})]
    for path in (real, real.parent, real.parent.parent, tmp_path):
        assert len(FORMAT.find(path)) == 1
        steps, notes = read(FORMAT, path)
        assert notes == [] and [s.step for s in steps] == [step for step, _ in expected]
        assert all(same(found.metrics, metrics) for found, (_, metrics) in zip(steps, expected, strict=True))
    assert real.stat().st_size > BLOCK  # a record lies across two blocks
    times = [s.wall_time for s in steps]
    assert times == sorted(times) and all(1.7e9 < t < 1.9e9 for t in times)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(8, 56124))
def test_a_log_cut_anywhere_gives_no_wrong_number(tmp_path_factory, cut):
    whole, path = tmp_path_factory.mktemp("cut") / "whole.wandb", tmp_path_factory.mktemp("cut") / "x.wandb"
    whole.write_bytes(gzip.decompress(PACKED.read_bytes()))
    path.write_bytes(whole.read_bytes()[:cut])
    expected = {s.step: {n: repr(v) for n, v in s.metrics.items()} for s in FORMAT.steps([whole], Notes())}
    try:
        for found in FORMAT.steps([path], Notes()):
            assert {n: repr(v) for n, v in found.metrics.items()}.items() <= expected[found.step].items()
    except Exception as error:
        assert "holds no step" in str(error)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.one_of(st.integers(0, 40), st.integers(BLOCK - 40, BLOCK + 40), st.just(70_000)), max_size=8))
def test_records_of_any_length_come_back(tmp_path_factory, sizes):
    written = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    path = log(tmp_path_factory.mktemp("log") / "x.wandb", *written)
    notes = Notes()
    assert list(leveldb.records(path, len(START), notes)) == written and list(notes) == []


def test_a_flipped_byte_costs_the_rest_of_its_block(tmp_path):
    rows = [history(_step=i, loss=i / 2) for i in range(2000)]
    path = log(tmp_path / "run-a.wandb", *rows)
    data = bytearray(path.read_bytes())
    assert len(data) > 2 * BLOCK
    data[BLOCK // 2] ^= 1
    path.write_bytes(data)
    steps, notes = read(FORMAT, path)
    found = [s.step for s in steps]
    lost = sorted(set(range(2000)) - set(found))
    assert found == sorted(found) and lost == list(range(lost[0], lost[-1] + 1)) and lost[0] > 0 and lost[-1] < 1999
    per_block = BLOCK / (len(data) / 2000)
    assert abs(len(lost) - per_block / 2) < per_block * 0.1
    assert all(s.metrics == {"loss": s.step / 2} for s in steps)
    assert len(notes) == 1 and notes[0].startswith("A block is damaged and the rest of it is left out (first: byte 16")


def test_parts_of_a_record_are_not_joined_across_damage(tmp_path):
    path = log(tmp_path / "run-a.wandb", b"a" * 80_000, b"next")  # parts in three blocks
    data = bytearray(path.read_bytes())
    data[BLOCK + 100] ^= 1
    path.write_bytes(data)
    notes = Notes()
    assert list(leveldb.records(path, len(START), notes)) == [b"next"] and len(list(notes)) == 1


def test_rows_without_a_training_step_are_left_out_once_it_differs(tmp_path):
    rows = [
        history(_step=0, a=1),
        history(_step=1, a=2, **{"train/global_step": 10}),
        history(_step=2, b=3),
        history(_step=3, a=4, global_step="20"),
    ]
    steps, notes = read(FORMAT, log(tmp_path / "run-a.wandb", *rows))
    assert plain(steps) == [(0, {"a": 1.0}), (10, {"a": 2.0})]
    assert notes == ["A row has no training step and is left out, 2 times (first: record 3 of run-a.wandb)."]
    rows = [history(_step=i, a=i, **({"training/global_step": i} if i else {})) for i in range(3)]  # verl
    assert [s.step for s in read(FORMAT, log(tmp_path / "run-b.wandb", *rows))[0]] == [0, 1, 2]


def test_media_texts_and_nulls_are_no_metrics(tmp_path):
    image = {"_type": "image-file", "size": 7}
    row = history(
        _step=1,
        loss=0.5,
        img=image,
        t="text",
        n=None,
        l=[1, 2],
        bad="{",
        nan="NaN",
        s='"-Infinity"',
        **{"h/_type": '"x"', "h/n": 3},
    )
    steps, notes = read(FORMAT, log(tmp_path / "run-a.wandb", row))
    assert same(steps[0].metrics, {"loss": 0.5, "nan": math.nan, "s": -math.inf})
    assert notes == ["A value is no JSON and is left out, 2 times (first: t)."]


def test_the_step_of_the_row_counts_where_no_item_has_one(tmp_path):
    rows = [sized(2, history(a=1)[2:] + b"\x12\x02\x08\x05"), sized(2, history(a=2)[2:] + b"\x12\x00")]
    assert plain(read(FORMAT, log(tmp_path / "run-a.wandb", *rows))[0]) == [(5, {"a": 1.0}), (0, {"a": 2.0})]


def test_a_resumed_run_goes_on_and_two_runs_are_refused(tmp_path):
    one = log(tmp_path / "wandb" / "offline-run-2-a" / "run-a.wandb", history(_step=1, x=1), history(_step=2, x=2))
    two = log(tmp_path / "wandb" / "offline-run-10-a" / "run-a.wandb", history(_step=2, x=3))
    assert FORMAT.find(tmp_path) == [one, two]
    assert plain(read(FORMAT, tmp_path)[0]) == [(1, {"x": 1.0}), (2, {"x": 2.0}), (2, {"x": 3.0})]
    other = log(tmp_path / "wandb" / "run-3-b" / "run-b.wandb", history(_step=2, x=3))
    refused(FORMAT, FORMAT.find(tmp_path), "3 W&B runs: .*run-a.*run-b.*Give the file of one")
    refused(FORMAT, [log(other, b"\x12\x7f", sized(3, b""))], "holds no step of a history")


def test_an_export_comes_back_number_by_number():
    steps, notes = read(FORMAT, EXPORT)
    with EXPORT.open() as file:
        expected = [(int(row[0]), {"lm_loss": float(row[1])}) for row in list(csv.reader(file))[1:]]
    assert plain(steps) == expected and notes == []
    assert len(steps) == 2270 and (steps[0].step, steps[-1].step) == (4, 42509)
    assert steps[-1].metrics == {"lm_loss": 2.329497814178467}


def exported(path, *lines: str):
    path.write_text("".join(line + "\n" for line in lines))
    return path


HEADER = '"Step","my - run - loss","my - run - loss__MIN","my - run - loss__MAX"'


def test_an_export_with_gaps_and_odd_rows(tmp_path):
    path = exported(
        tmp_path / "x.csv",
        HEADER + ',"my - run - _step","my - run - _step__MIN","my - run - _step__MAX"',
        '"1","0.5","0.5","0.5","1","1","1"',
        '"2","","","","2","2","2"',
        '"x","1","1","1","","",""',
        '"3","NaN","NaN","NaN","3","3","3"',
        '"4","2","1","3","4","4","4"',
        '"5","2"',
    )
    steps, notes = read(FORMAT, path)
    assert [s.step for s in steps] == [1, 3, 4] and all(s.metrics.keys() == {"loss"} for s in steps)
    assert math.isnan(steps[1].metrics["loss"]) and steps[2].metrics == {"loss": 2.0}
    assert [note.split(" (")[0] for note in notes] == [
        "A row has no step and is left out",
        "A row stands for several steps; its mean is taken, minimum and maximum are left out",
        "A row has another number of cells than the header and is left out",
    ]


def test_an_export_of_several_runs_or_by_time_is_refused(tmp_path):
    two = exported(tmp_path / "x.csv", HEADER + ',"b - loss","b - loss__MIN","b - loss__MAX"', "1,1,1,1,1,1,1")
    assert FORMAT.find(two) == [two]
    refused(FORMAT, [two], r"holds 2 runs \('my - run', 'b'\), allowed is one. Export the chart of one run")
    refused(
        FORMAT, [exported(tmp_path / "y.csv", HEADER.replace("Step", "Relative Time"), "1,1,1,1")], "Set the x axis"
    )
    refused(FORMAT, [exported(tmp_path / "z.csv", HEADER)], "holds no step")


def test_other_files_are_left_alone(tmp_path):
    for name, text in {
        "a.csv": "Step,loss\n1,2\n",
        "b.csv": "Step,a - b\n1,2\n",
        "c.wandb": "text",
        "d.csv": "",
        "e.jsonl": '{"_step": 1}',
    }.items():
        (tmp_path / name).write_text(text)
        assert FORMAT.find(tmp_path / name) == []
    assert FORMAT.find(tmp_path) == FORMAT.find(tmp_path / "absent") == []
