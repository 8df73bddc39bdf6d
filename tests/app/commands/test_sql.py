"""`mhpo sql`: every format, whatever a model wrote, and one line for what is wrong."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from app.cli import main
from app.commands import sql
from tests.app.runs import record_run

ODD = "SELECT 1 AS n, 0.1::FLOAT AS f, 'nan'::DOUBLE AS nan, 'inf'::FLOAT AS high, '-inf'::DOUBLE AS low, NULL AS none"
HOSTILE = "chr(27) || '[2J' || chr(155) || '31m' || chr(8238) || chr(10) || chr(7) || 'x'"


class Captured:
    """What a command wrote."""

    def __init__(self, capture: pytest.CaptureFixture[bytes], run: Path) -> None:
        self._capture, self._run = capture, run

    def __call__(self, query: str, *more: str, status: int = 0) -> str:
        return self.bytes(query, *more, status=status).decode()

    def bytes(self, query: str, *more: str, status: int = 0) -> bytes:
        assert main(["sql", str(self._run), query, *more]) == status
        out, err = self._capture.readouterr()
        if status:
            assert err.count(b"\n") == 1 and err.startswith(b"mhpo sql: ") and err.decode().strip().isprintable(), err
            return err
        assert err == b""
        return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sql") / "run"
    record_run(path, 3)
    return path


@pytest.fixture
def told(capfdbinary: pytest.CaptureFixture[bytes], run: Path) -> Captured:
    return Captured(capfdbinary, run)


def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


# --- table


def test_a_table_is_aligned(told: Captured) -> None:
    lines = told("SELECT * FROM (VALUES (1, 'a', 0.5), (100, '日本', NULL)) AS t(step, text, x)").splitlines()
    assert lines == [
        "step  text     x",
        "   1  a      0.5",
        " 100  日本  NULL",
    ]


def test_a_table_tells_null_from_nan(told: Captured) -> None:
    header, row = told(ODD).splitlines()
    assert header.split() == ["n", "f", "nan", "high", "low", "none"]
    assert row.split() == ["1", "0.1", "nan", "inf", "-inf", "NULL"]


@pytest.mark.parametrize(
    "query", [f'SELECT {HOSTILE} AS "a\x1b[31mb"', f"SELECT [{HOSTILE}] AS l, {{'k': {HOSTILE}}} AS s"]
)
def test_a_table_executes_nothing(told: Captured, query: str) -> None:
    shown = told(query)
    assert all(line.isprintable() for line in shown.splitlines()) and len(shown.splitlines()) == 2
    assert "[2J" in shown


def test_a_long_text_is_cut(told: Captured) -> None:
    assert told("SELECT repeat('x', 1000) AS t, 1 AS n").splitlines()[1] == "x" * 79 + "…  1"


def test_a_long_table_says_how_much_is_missing(told: Captured) -> None:
    lines = told("FROM range(212345)").splitlines()
    assert lines[0].strip() == "range" and lines[10_000].strip() == "9999"
    assert lines[10_001:] == ["… 202,345 more rows. Add a LIMIT, or --format csv for all of them."]
    assert len(told("FROM range(10000)").splitlines()) == 10_001


def test_a_table_that_takes_too_long_to_count(told: Captured) -> None:
    last = told("FROM range(1000000000000)", "--limit-seconds", "2").splitlines()[-1]
    assert last.startswith("… many more rows.")


def test_an_empty_table(told: Captured) -> None:
    assert told("SELECT step, loss FROM steps WHERE false") == "step  loss\n"


def test_a_plan_is_drawn(told: Captured) -> None:
    plan = told(f"EXPLAIN SELECT {HOSTILE} || s FROM (VALUES ('\x1b[31m')) AS t(s)")
    assert len(plan.splitlines()) > 3 and all(line.isprintable() for line in plan.splitlines())


def test_the_tables_of_a_run(told: Captured) -> None:
    assert {"steps", "tokens", "events"} <= set(told("SHOW TABLES").split())
    assert told("SELECT count(*) AS n FROM steps").split() == ["n", "3"]
    assert told("DESCRIBE steps").splitlines()[1].split()[:2] == ["step", "BIGINT"]


# --- csv


def test_csv_comes_back(told: Captured) -> None:
    texts = ["plain", 'with "quotes"', "a,b", "two\nlines", "\r", "", " ", "日本", "\x1b[31m"]
    values = ", ".join("('" + t + "')" for t in texts)
    written = told(f'SELECT t AS "a,b", 1 AS n FROM (VALUES {values}) AS v(t)', "--format", "csv")
    assert written.startswith('"a,b",n\r\nplain,1\r\n"with ""quotes""",1\r\n')
    assert list(csv.reader(io.StringIO(written, newline=""))) == [["a,b", "n"], *([t, "1"] for t in texts)]


def test_csv_of_odd_numbers(told: Captured) -> None:
    assert told(ODD, "--format", "csv") == "n,f,nan,high,low,none\r\n1,0.1,NaN,Infinity,-Infinity,\r\n"


def test_csv_of_null_and_of_nothing(told: Captured) -> None:
    assert told("SELECT NULL AS a, '' AS b, true AS c", "--format", "csv") == 'a,b,c\r\n,"",true\r\n'
    assert told("VALUES (NULL), (1)", "--format", "csv") == 'col0\r\n""\r\n1\r\n'
    assert told("SELECT 1 AS a WHERE false", "--format", "csv") == "a\r\n"


def test_csv_on_a_terminal_executes_nothing(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(monkeypatch)
    assert main(["sql", str(run), f"SELECT {HOSTILE} AS a, repeat('x', 1000) AS b", "--format", "csv"]) == 0
    out = capsys.readouterr().out
    assert out.replace("\r\n", "").isprintable() and "x" * 1000 in out


# --- json


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict(told: Captured) -> None:
    row = {"n": 1, "f": 0.1, "nan": "NaN", "high": "Infinity", "low": "-Infinity", "none": None}
    assert strict(told(ODD, "--format", "json")) == [row]
    nested = "SELECT [1, 'nan'::DOUBLE, NULL] AS l, {'a': 'inf'::DOUBLE, 'b': [true]} AS s"
    assert strict(told(nested, "--format", "json")) == [{"l": [1.0, "NaN", None], "s": {"a": "Infinity", "b": [True]}}]


def test_json_keeps_numbers_and_text(told: Captured) -> None:
    query = f"SELECT sum(n_tokens) AS total, 2^62::BIGINT AS big, 1.50 AS d, {HOSTILE} AS t FROM steps"
    [row] = strict(told(query, "--format", "json"))
    assert isinstance(row["total"], int) and row["big"] == 2**62 and row["d"] == 1.5
    assert row["t"] == "\x1b[2J\x9b31m\u202e\n\x07x"
    assert strict(told("SELECT 12345678901234567890.123 AS d", "--format", "json")) == [
        {"d": "12345678901234567890.123"}
    ]


def test_json_is_printable_as_it_is(told: Captured) -> None:
    assert told(f"SELECT {HOSTILE} AS t", "--format", "json").replace("\n", "").isprintable()


def test_json_of_several_rows_and_of_none(told: Captured) -> None:
    assert strict(told("FROM range(3)", "--format", "json")) == [{"range": 0}, {"range": 1}, {"range": 2}]
    assert strict(told("FROM range(0)", "--format", "json")) == []


def test_json_names_are_distinct(told: Captured) -> None:
    assert strict(told("SELECT 1 AS a, 2 AS a, 3 AS a_1", "--format", "json")) == [{"a": 1, "a_1": 2, "a_1_1": 3}]
    assert strict(told("SELECT 1 AS a, 2 AS a, 3 AS a", "--format", "json")) == [{"a": 1, "a_1": 2, "a_2": 3}]


# --- parquet


def test_parquet_comes_back(told: Captured) -> None:
    written = told.bytes("SELECT step, loss, NULL AS a, 'nan'::FLOAT AS a FROM steps", "--format", "parquet")
    table = pq.read_table(io.BytesIO(written))
    assert table.schema.names == ["step", "loss", "a", "a_1"]
    assert table.column("step").to_pylist() == [0, 1, 2] and str(table.column("a_1")[0]) == "nan"
    empty = pq.read_table(io.BytesIO(told.bytes("FROM steps WHERE false", "--format", "parquet")))
    assert empty.num_rows == 0 and "step" in empty.schema.names


def test_parquet_of_what_it_has_no_type_for(told: Captured) -> None:
    assert "Cast it to VARCHAR" in told("SELECT INTERVAL 1 MONTH AS i", "--format", "parquet", status=2)


def test_parquet_does_not_go_to_a_terminal(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(monkeypatch)
    assert main(["sql", str(run), "FROM steps", "--format", "parquet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Add > FILE.parquet" in err


# --- every type

TYPES = [
    "1::TINYINT", "1::UBIGINT", "1::HUGEINT", "1::UHUGEINT", "1.5::DECIMAL(4, 2)", "1e-9::DECIMAL(20, 10)", "true",
    "date '2020-01-01'", "'infinity'::DATE", "time '10:00'", "timetz '10:00:00+01'", "timestamp '2020-01-01 10:00'",
    "timestamp_s '2020-01-01'", "timestamp_ns '2020-01-01 00:00:00.000000001'", "'infinity'::TIMESTAMP", "now()",
    "'294246-01-01'::TIMESTAMP", "to_timestamp(0)", "INTERVAL '1 year 2 days 3 seconds'", "'\\xAB'::BLOB", "'101'::BIT",
    "uuid()", "'a'::ENUM('a')", "union_value(a := 1)", "map {'a': 1.5::FLOAT, 'b': 'nan'}", "[[1], NULL]",
    "{'a': {'b': [now()]}}", "[1, 2]::INT[2]", "'{\"a\": 1}'::JSON", "{'a': 1}::VARIANT", "1::BIGNUM", "NULL",
]  # fmt: skip


EVERY_TYPE = "SELECT " + ", ".join(f"{value} AS c{i}" for i, value in enumerate(TYPES)) + " FROM range(2)"


def test_every_type_is_shown(told: Captured) -> None:
    assert len(told(EVERY_TYPE).splitlines()) == 3
    rows = list(csv.reader(io.StringIO(told(EVERY_TYPE, "--format", "csv"), newline="")))
    assert [len(row) for row in rows] == [len(TYPES)] * 3
    assert [len(row) for row in strict(told(EVERY_TYPE, "--format", "json"))] == [len(TYPES)] * 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("timestamp '2020-01-01 10:00'", "2020-01-01 10:00:00"), ("to_timestamp(0)", "1970-01-01 00:00:00+00:00"),
        ("1e-9::DECIMAL(20, 10)", "0.0000000010"), ("true", "true"), ("'\\xAB'::BLOB", "ab"), ("0.1::FLOAT", "0.1"),
        ("['é', NULL]", '"[""é"", null]"'), ("{'a': 'nan'::FLOAT}", '"{""a"": ""NaN""}"'), ("1e300", "1e+300"),
        ("'infinity'::DATE", "infinity"), ("'-infinity'::TIMESTAMP", "-infinity"),
        ("'294246-01-01'::TIMESTAMP", "out of range"), ("['infinity'::DATE]", "out of range"),
    ],
)  # fmt: skip
def test_values_in_csv(told: Captured, value: str, shown: str) -> None:
    assert told(f"SELECT {value} AS v", "--format", "csv") == f"v\r\n{shown}\r\n"


# --- input and errors


def test_the_query_from_standard_input(told: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 1 AS one\n;\n"))
    assert told("-").split() == ["one", "1"]


def test_standard_input_that_is_no_text(told: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"SELECT '\xff'"), "utf-8"))
    assert "is not UTF-8" in told("-", status=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["selec"], 'syntax error at or near "selec"'),
        (["SELECT y FROM steps"], 'Referenced column "y" not found'),
        (["FROM nonsense"], "allowed are "),
        (["FROM stesp"], "Did you mean steps"),
        (["COPY steps TO 'x.csv'"], "allowed are SELECT"),
        (["SELECT 1; SELECT 2"], "2 statements"),
        ([""], "0 statements"),
        (["FROM '/etc/passwd'"], "table '/etc/passwd' is not available, allowed are "),
        (["SELECT 1", "--memory", "lots"], "allowed is a size such as 1GB"),
        (["SELECT 1", "--limit-seconds", "0"], "allowed are numbers above 0"),
        (["SELECT list(range) FROM range(1000000000)", "--memory", "50MB"], "50MB, the memory allowed"),
        (["SELECT error(chr(27) || '[31m')"], "⟨1b⟩[31m"),
    ],
)
@pytest.mark.parametrize("kind", sorted(sql._WRITERS))
def test_what_is_wrong_is_one_line_and_status_2(told: Captured, arguments: list[str], said: str, kind: str) -> None:
    assert said in told(*arguments, "--format", kind, status=2)


def test_the_time_limit(told: Captured) -> None:
    endless = "WITH RECURSIVE r AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM r) SELECT count(*) FROM r"
    assert "took longer than 0.5 s" in told(endless, "--limit-seconds", "0.5", status=2)


@pytest.mark.parametrize("more", [["--format", "xml"], ["--limit-seconds", "soon"], []])
def test_bad_usage_is_one_line(run: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sql", str(run), *(["SELECT 1", *more] if more else [])])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sql", str(tmp_path), "SELECT 1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["table", "csv"])
def test_a_closed_pipe_ends_quietly(run: Path, kind: str) -> None:
    command = [sys.executable, "-m", "app.cli", "sql", str(run), "FROM range(100000000)", "--format", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
