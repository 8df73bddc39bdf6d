"""Tables of metrics: CSV, JSON lines and Parquet, plain and gzip'd, whole and damaged."""

from __future__ import annotations

import csv
import gzip
import json
import math
import tracemalloc
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.importers import packed
from collectors.importers.steps import Notes
from collectors.importers.tables import FORMAT
from tests.collectors.importers.reading import DATA, read, refused, same


def csv_file(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding, newline="")
    return path


def plain(steps):
    return [(s.step, s.metrics) for s in steps]


EXPECTED = [(1, {"loss": 0.5, "reward": -1.0}), (2, {"loss": 0.25}), (10, {"loss": 0.125, "reward": 3.0})]
CSV = "step,loss,reward,note\n1,0.5,-1,begin\n2,0.25,,\n10,1.25e-1,3,end\n"


@pytest.mark.parametrize(
    "text",
    [
        CSV,
        CSV.replace(",", ";"),
        CSV.replace(",", "\t"),
        CSV.replace("\n", "\r\n"),
        CSV.replace("\n", "\r"),
        CSV.replace(",", ";").replace(".", ","),
        "# made by x\n\n" + CSV,
        CSV.replace("step", "Step"),
        CSV.replace("step", '" _step"'),
        CSV.replace("step", "global_step"),
        CSV.replace("begin", '"a, b\n""c"""'),
        CSV.rstrip(),
        CSV.replace("2,0.25,,", "2,0.25,null,"),
    ],
)
def test_a_csv_comes_back_however_it_is_written(tmp_path, text):
    steps, notes = read(FORMAT, csv_file(tmp_path / "x.csv", text))
    assert plain(steps) == EXPECTED and all(s.wall_time is None for s in steps)
    assert notes == ["A column holds what is no number, and that is left out (first: 'note')."]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("packing", [bytes, gzip.compress])
def test_encodings_and_gzip(tmp_path, encoding, packing):
    (tmp_path / "x").write_bytes(packing(CSV.replace("end", "fin é").encode(encoding)))
    steps, notes = read(FORMAT, tmp_path / "x")
    assert plain(steps) == EXPECTED and len(notes) == 1 + (encoding == "latin-1")


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2**53), st.floats(), st.one_of(st.none(), st.floats(allow_nan=False))),
        min_size=1,
        max_size=20,
        unique_by=lambda row: row[0],
    ),
)
def test_every_number_comes_back_from_every_kind_of_file(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "a", "b"], *[[s, a, "" if b is None else repr(b)] for s, a, b in rows]])
    (folder / "x.jsonl").write_text("".join(json.dumps({"step": s, "a": a, "b": b}) + "\n" for s, a, b in rows))
    steps, a, b = (list(column) for column in zip(*rows, strict=True))
    pq.write_table(
        pa.table({"step": steps, "a": a, "b": pa.array(b, pa.float64())}), folder / "x.parquet", row_group_size=3
    )
    for name in ("x.csv", "x.jsonl", "x.parquet"):
        found, notes = read(FORMAT, folder / name)
        assert [s.step for s in found] == steps and notes == []
        for one, (_, x, y) in zip(found, rows, strict=True):
            assert same(one.metrics, {"a": x} | ({} if y is None else {"b": y}))


def test_numbers_and_truth_of_a_csv(tmp_path):
    cells = {
        "NaN": math.nan,
        "nan": math.nan,
        "inf": math.inf,
        "-Infinity": -math.inf,
        "True": 1.0,
        "false": 0.0,
        " 7 ": 7.0,
        "'3'": 3.0,
        "1e400": math.inf,
    }
    text = "step,a,b\n" + "".join(f"{i},{cell},1\n" for i, cell in enumerate(cells))
    steps, notes = read(FORMAT, csv_file(tmp_path / "x.csv", text))
    assert notes == [] and all(same(s.metrics, {"a": v, "b": 1.0}) for s, v in zip(steps, cells.values(), strict=True))


def test_a_parquet_file_gives_its_columns_of_numbers(tmp_path):
    table = pa.table(
        {
            "_step": pa.array([3, 1, None], pa.int32()),
            "f": pa.array([0.5, math.nan, 1.0], pa.float32()),
            "u": pa.array([1, None, 2], pa.uint8()),
            "b": [True, False, None],
            "d": [Decimal("1.5"), None, None],
            "text": ["a", "b", "c"],
            "list": [[1.0], [2.0], []],
            "_timestamp": [1.7e9, 1.7e9 + 1, 0.0],
            "_runtime": [1.0, 2.0, 3.0],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    steps, notes = read(FORMAT, tmp_path / "x.parquet")
    assert [(s.step, s.wall_time) for s in steps] == [(3, 1.7e9), (1, 1.7e9 + 1)]
    assert steps[0].metrics == {"f": 0.5, "u": 1.0, "b": 1.0, "d": 1.5} and same(
        steps[1].metrics, {"f": math.nan, "b": 0.0}
    )
    assert notes == [
        "A column holds what is no number, and that is left out, 2 times (first: 'text').",
        "A row has no step and is left out (first: row 3 of x.parquet).",
    ]
    data = (tmp_path / "x.parquet").read_bytes()
    for broken in (data[:-1], data[:200], b"PAR1", data[: len(data) // 2] + data[-300:]):
        (tmp_path / "y.parquet").write_bytes(broken)
        assert FORMAT.find(tmp_path / "y.parquet") in ([], [tmp_path / "y.parquet"])
        refused(FORMAT, [tmp_path / "y.parquet"], "is no whole Parquet file")


def test_json_lines_with_odd_ones_between(tmp_path):
    lines = [
        '{"step": 1, "loss": 0.5, "inner": {"a": [2], "b": null}, "text": "x", "list": [1, 2], "time": 1700000000.5}',
        "no json",
        '[{"step": 2}]',
        '{"loss": 1}',
        '{"step": 2, "text": "x"}',
        '{"step": 3, "loss": NaN, "time": 12}',
        '{"step": 4, "lo',
    ]
    steps, notes = read(FORMAT, csv_file(tmp_path / "x.jsonl", "\n".join(lines)))
    assert (steps[0].step, steps[0].metrics, steps[0].wall_time) == (1, {"loss": 0.5, "inner/a": 2.0}, 1700000000.5)
    assert (
        steps[1].step == 3 and same(steps[1].metrics, {"loss": math.nan, "time": 12.0}) and steps[1].wall_time is None
    )
    assert len(steps) == 2 and [note.split(" (")[0] for note in notes] == [
        "A column holds what is no number, and that is left out, 2 times",
        "A line is no JSON object and is left out, 2 times",
        "A row has no step and is left out",
        "A row has no number but its step and is left out",
        "The last line is cut off and is left out",
    ]


def test_odd_rows_of_a_csv_cost_themselves_alone(tmp_path):
    huge = '3,"' + "x" * 200_000 + '",1\n'  # more than a cell may have
    text = "step,loss,b\n1,0.5,1\n,1,1\n-1,1,1\n1.5,1,1\nx,1,1\n2,7\n3,1,1,1\n" + huge + "4,0.25,1\n5,,\n6,0."
    steps, notes = read(FORMAT, csv_file(tmp_path / "x.csv", text))
    assert plain(steps) == [(1, {"loss": 0.5, "b": 1.0}), (4, {"loss": 0.25, "b": 1.0})]
    assert [note.split(" (")[0] for note in notes] == [
        "A row has no step and is left out, 4 times",
        "A column holds what is no number, and that is left out",
        "A row has another number of cells than the header and is left out, 3 times",
        "A row cannot be read and is left out",
        "A row has no number but its step and is left out",
    ]


def test_rows_that_complement_one_another_are_one_step_and_rewinds_are_kept(tmp_path):
    text = "step,a,b\n1,1,\n1,,2\n2,3,\n1,4,\n1,5,\n"
    steps, notes = read(FORMAT, csv_file(tmp_path / "x.csv", text))
    assert plain(steps) == [(1, {"a": 1.0, "b": 2.0}), (2, {"a": 3.0}), (1, {"a": 4.0}), (1, {"a": 5.0})]
    assert len(notes) == 1 and "attempt" in notes[0]


def test_the_training_step_wins_over_the_loggers(tmp_path):
    text = "_step,train/global_step,loss\n0,10,1\n1,20,2\n2,,3\n"
    steps, notes = read(FORMAT, csv_file(tmp_path / "x.csv", text))
    assert plain(steps) == [(10, {"loss": 1.0}), (20, {"loss": 2.0})] and len(notes) == 1


def test_tables_of_a_folder_are_those_named_after_metrics(tmp_path):
    csv_file(tmp_path / "metrics.csv", "step,a\n1,1\n3,3\n")
    (tmp_path / "eval_metrics.jsonl.gz").write_bytes(gzip.compress(b'{"step": 3, "b": 2}\n'))
    csv_file(tmp_path / "tokens.csv", "step,logp\n1,1\n1,2\n")
    csv_file(tmp_path / "metrics.md", "step,a\n1,1\n")
    assert [p.name for p in FORMAT.find(tmp_path)] == ["eval_metrics.jsonl.gz", "metrics.csv"]
    assert plain(read(FORMAT, tmp_path)[0]) == [(1, {"a": 1.0}), (3, {"b": 2.0, "a": 3.0})]


def test_what_has_no_step_is_no_table(tmp_path):
    for name, content in {
        "a.csv": b"epoch,loss\n1,2\n",
        "b.csv": b"",
        "c.csv": b"step\n1\n",
        "d.jsonl": b'{"loss": 1}',
        "e.txt": b"step 1 loss 2\n",
        "f.csv": b"\x00" * 50,
        "g.gz": gzip.compress(b"step,a\n1,1\n")[:12],
        "h.gz": b"\x1f\x8b" + b"x" * 50,
        "i.jsonl": b'{"step": 1',
        "j.parquet": b"PAR1",
        "k.csv": b"\n" * 500,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert FORMAT.find(tmp_path / name) == [], name
    assert FORMAT.find(tmp_path) == FORMAT.find(tmp_path / "absent") == []
    for name in ("verl/real_verl_steps_142_143_145.log", "tensorboard", "verl", "wandb"):
        assert FORMAT.find(DATA / name) == []
    refused(
        FORMAT, [csv_file(tmp_path / "x.csv", "step,a\n")], "holds no row with a step and a number.*Check its header"
    )
    refused(FORMAT, [csv_file(tmp_path / "y.csv", "step,a\n1,x\n")], "holds no row")
    refused(FORMAT, [tmp_path / "absent"], "cannot be read")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_cut_archive_gives_the_rows_before_the_cut(tmp_path_factory, data):
    text = "step,a\n" + "".join(f"{i},{i * 0.37}\n" for i in range(500))
    packed_text = gzip.compress(text.encode())
    cut = data.draw(st.integers(20, len(packed_text) - 1))
    path = tmp_path_factory.mktemp("cut") / "x.csv.gz"
    path.write_bytes(packed_text[:cut])
    notes, found = Notes(), []
    try:
        found = list(FORMAT.steps([path], notes))
    except Exception as error:
        assert "holds no row" in str(error)
    for step, one in enumerate(found[:-1]):  # the last line may be cut
        assert (one.step, one.metrics) == (step, {"a": step * 0.37})
    assert [note for note in notes if "damaged or cut off" in note]


def test_an_archive_bomb_is_refused_in_little_memory(tmp_path):
    with gzip.open(tmp_path / "x.csv.gz", "wb", 9) as file:
        file.write(b"step,a\n1,1\n")
        for _ in range(200):
            file.write(b"0" * (1 << 20))
    assert (tmp_path / "x.csv.gz").stat().st_size < 300_000
    tracemalloc.start()
    refused(FORMAT, FORMAT.find(tmp_path / "x.csv.gz"), "line 3 of .* is longer than 16,777,216 characters")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * packed.LONGEST  # of 200 MB


def test_memory_does_not_grow_with_the_table(tmp_path):
    def peak(rows: int) -> int:
        with gzip.open(tmp_path / "x.csv.gz", "wt", 1) as file:
            file.write("step,a,b,text\n")
            file.writelines(f"{i},{i}.5,1,{'x' * 200}\n" for i in range(rows))
        tracemalloc.start()
        count = sum(1 for _ in FORMAT.steps([tmp_path / "x.csv.gz"], Notes()))
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == rows
        return found

    peak(10)
    assert peak(20_000) < peak(1_000) + 200_000
