"""The console reads what it was given, within its limits, and nothing else, whatever is typed."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from collectors.console import Console
from collectors.select_only import DENIED_FUNCTIONS, TABLE_FUNCTIONS, VOLATILE_FUNCTIONS, SelectOnly
from mhpo_core.errors import StoreError
from tests.collectors.console_attempts import IN_MEMORY, OTHERS, REAL

MARK = "zq7_nobody_may_read_this"
STEPS = pa.table({
    "step": [0, 1, 2, 3], "x": pa.array([0.5, float("nan"), None, float("inf")]), "s": ["a", "b", None, "a"],
    "l": [[1, 2], [3], [], None], "h": [[{"q": "a", "n": 1}], [], None, [{"q": "b", "n": 2}, {"q": "c", "n": 3}]],
})  # fmt: skip
VIEWS = [
    "CREATE OR REPLACE TEMP VIEW hidden AS SELECT * FROM files",
    "CREATE OR REPLACE TEMP VIEW steps AS SELECT step, x, s FROM hidden",
    "CREATE OR REPLACE TEMP VIEW nested AS SELECT step, l, h FROM hidden",
]
ENDLESS = "WITH RECURSIVE r AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM r) SELECT count(*) FROM r"
GUARDS = {"both": {}, "lock": {"_checked": False}, "check": {"_locked": False}}


class Place:
    """A folder with a run and a secret, and consoles over the run with one guard, the other, or both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        secret = folder / "secret"
        self.names = {"{secret}": str(secret), "{run}": str(folder / "run"), "{mark}": MARK}
        for name in ("secret", "run", "home", "work"):
            (folder / name).mkdir()
        pq.write_table(STEPS, folder / "run" / "a.parquet")
        (secret / f"{MARK}.txt").touch()
        (secret / "secret.csv").write_text(f"{MARK},b\n{MARK},1\n")
        (secret / "secret.json").write_text(f'{{"a": "{MARK}"}}\n')
        table = pa.table({MARK: [MARK]}).replace_schema_metadata({"k": MARK})
        pq.write_table(table, secret / "secret.parquet")
        with duckdb.connect(str(secret / "secret.db")) as database:
            database.execute("CREATE TABLE t AS SELECT ? AS a", [MARK])
        self.before = self.files()

    def console(self, guards: dict[str, bool], **limits: Any) -> Console:
        data = pads.dataset(self.folder / "run" / "a.parquet")
        return Console({"files": data}, VIEWS, ["steps", "nested"], **guards, **limits)

    def files(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(self.folder.rglob("*"))}

    def told(self, console: Console, attempt: str) -> str:
        """What comes out, data or error."""
        for name, value in self.names.items():
            attempt = attempt.replace(name, value)
        try:
            return str(console.query(attempt).to_pylist())
        except StoreError as error:
            assert "\n" not in str(error)
            return f"refused: {error}"

    def harmed(self, told: str) -> bool:
        return MARK in told or self.files() != self.before


def prepared(folder: Path, patch: pytest.MonkeyPatch) -> Place:
    place = Place(folder)
    patch.setenv("HOME", str(folder / "home"))
    patch.setenv("MHPO_TEST_SECRET", MARK)
    patch.chdir(folder / "work")
    # variables that the function which calls DuckDB can see
    patch.setattr("collectors.console.frame", pd.DataFrame({"a": [MARK]}), raising=False)
    patch.setattr("collectors.console.arrow_table", pa.table({"a": [MARK]}), raising=False)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield prepared(tmp_path_factory.mktemp("console"), patch)


@pytest.fixture(scope="module")
def consoles(place: Place) -> Iterator[dict[str, Console]]:
    opened = {name: place.console(guards) for name, guards in GUARDS.items()}
    yield opened
    for console in opened.values():
        console.close()


@pytest.fixture
def console(place: Place) -> Iterator[Console]:
    with place.console({}) as opened:
        yield opened


def settings(console: Console) -> list[Any]:
    return console._connection.execute("SELECT name, value FROM duckdb_settings() ORDER BY name").fetchall()


def refusal(console: Console, sql: str) -> str:
    with pytest.raises(StoreError) as caught:
        console.query(sql)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and message.startswith("query: "), message
    return message


# --- no way out


@pytest.mark.parametrize("attempt", REAL)
def test_the_attempts_are_real(attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = prepared(tmp_path, monkeypatch)
    with place.console({"_locked": False, "_checked": False}) as console:
        told = place.told(console, attempt)
    assert place.harmed(told), f"{attempt} does nothing even without guards: {told}"


@pytest.mark.parametrize("guards", GUARDS)
@pytest.mark.parametrize("attempt", [*REAL, *OTHERS])
def test_each_guard_alone_stops_every_attempt(
    attempt: str, guards: str, place: Place, consoles: dict[str, Console]
) -> None:
    console = consoles[guards]
    before = settings(console)
    told = place.told(console, attempt)
    assert not place.harmed(told), told
    assert told.startswith("refused: query: ") or guards == "lock", told
    assert settings(console) == before
    if guards != "lock":  # which has no say over what is in memory
        assert console.query("SELECT count(*) AS n FROM steps").to_pylist() == [{"n": 4}]


@pytest.mark.parametrize("attempt", IN_MEMORY)
def test_the_database_in_memory_stays_as_it_is(attempt: str, consoles: dict[str, Console]) -> None:
    console = consoles["both"]
    told = refusal(console, attempt)
    assert "allowed are SELECT" in told or "syntax error" in told, told
    assert console.query("SHOW TABLES").column(0).to_pylist() == ["nested", "steps"]
    assert console.query("SELECT count(*) AS n FROM steps").to_pylist() == [{"n": 4}]


def test_a_with_name_does_not_reach_into_a_view(console: Console) -> None:
    names = "WITH hidden AS (SELECT 9 AS step, 9 AS x, 'z' AS s), files AS (SELECT 8 AS step)"
    assert console.query(f"{names} SELECT max(step) AS m FROM steps").to_pylist() == [{"m": 3}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM (WITH hidden AS (SELECT 1) FROM hidden), hidden",
        "WITH a AS (FROM b), b AS (SELECT 1) FROM a",
        "WITH hidden AS (FROM hidden) FROM hidden",
        "WITH a AS (SELECT 1), hidden AS (FROM hidden) FROM a",
        "WITH RECURSIVE hidden AS (FROM hidden UNION ALL FROM hidden) FROM hidden",
        'WITH "a.csv" AS (SELECT 1) FROM a.csv',
        "FROM \N{LATIN SMALL LETTER LONG S}teps",  # its capital is an S too, but not to DuckDB
    ],
)
def test_a_with_name_ends_with_its_query(sql: str, console: Console) -> None:
    assert "is not available, allowed are nested, steps." in refusal(console, sql)


def test_names_are_compared_as_duckdb_does(console: Console) -> None:
    assert console.query("WITH A AS (SELECT 1 AS k), b AS (FROM a) SELECT k FROM (FROM B)").to_pylist() == [{"k": 1}]
    assert console.query("SELECT count(*) AS n FROM STEPS").to_pylist() == [{"n": 4}]


# --- functions


def test_the_lists_name_functions_that_exist() -> None:
    rows = duckdb.execute("SELECT DISTINCT function_name, function_type FROM duckdb_functions()").fetchall()
    assert {name for name, _ in rows} >= DENIED_FUNCTIONS | VOLATILE_FUNCTIONS
    assert {name for name, kind in rows if kind == "table"} >= TABLE_FUNCTIONS


def test_functions_with_side_effects_and_internal_ones_are_refused() -> None:
    with duckdb.connect() as parser:
        check = SelectOnly([], parser)
        marked = (
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE has_side_effects OR function_name[:2] = '__'"
        )
        names = {name for (name,) in parser.execute(marked).fetchall()} - VOLATILE_FUNCTIONS
        assert len(names) > 30
        for name in names:
            with pytest.raises(StoreError, match="function .* is not available"):
                check.statement(f"SELECT {name}(1)")
        for name in VOLATILE_FUNCTIONS:
            check.statement(f"SELECT {name}()")


def test_every_other_table_function_is_refused() -> None:
    with duckdb.connect() as parser:
        check = SelectOnly(["steps"], parser)
        names = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type IN ('table', 'table_macro')"
        others = {name for (name,) in parser.execute(names).fetchall()} - TABLE_FUNCTIONS
        assert len(others) > 90
        for name in others:
            for sql in (f"FROM {name}()", f"FROM steps, LATERAL {name}(step)", f"FROM main.{name}('a', b := 1)"):
                with pytest.raises(StoreError, match="table function .* is not available"):
                    check.statement(sql)


@pytest.mark.parametrize("name", sorted(DENIED_FUNCTIONS))
def test_denied_functions_are_refused_however_they_are_called(name: str, console: Console) -> None:
    for sql in (
        f"SELECT {name}(1)", f"SELECT {name.upper()}('a', 'b')", f'SELECT "{name}"(step) FROM steps',
        f"SELECT step.{name}() FROM steps", f"SELECT (1).{name}()", f"SELECT system.main.{name}(1)",
        f"SELECT {name}(step) OVER () FROM steps", f"SELECT list_transform([1], lambda x: {name}(x))",
        f"SELECT 1 ORDER BY {name}(1)", f"FROM range({name}(1))", f"EXPLAIN SELECT {name}(1)",
    ):  # fmt: skip
        assert "is not available" in refusal(console, sql), sql


def test_no_macro_hides_what_is_denied() -> None:
    with duckdb.connect() as parser:
        check = SelectOnly([], parser)
        macros = "SELECT function_name, macro_definition FROM duckdb_functions() WHERE function_type = 'macro'"
        for name, definition in parser.execute(macros).fetchall():
            try:
                check.statement(f"SELECT {definition}")
            except StoreError:
                with pytest.raises(StoreError, match="is not available"):
                    check.statement(f"SELECT {name}()")


class OtherDuckDB:
    """A parser that draws its tree in another way."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree
        self._real = duckdb.connect()

    def execute(self, sql: str, values: list[str] | None = None) -> Any:
        told = json.dumps({"error": False, "statements": [{"node": self._tree}]})
        return self._real.execute("SELECT ?", [told]) if values else self._real.execute(sql)


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "SELECT_NODE", "from_table": {"type": "BASE_TABLE"}},
        {"type": "SELECT_NODE", "from_table": {"type": "BASE_TABLE", "qualified_name": {"path": []}}},
        {"type": "SELECT_NODE", "from_table": {"type": "FILE_TABLE", "name": "steps"}},
        {"type": "SELECT_NODE", "from_table": {"type": "TABLE_FUNCTION", "function": None}},
        {"type": "SELECT_NODE", "from_table": {"type": "SHOW_REF", "show_type": "DESCRIBE", "query": None}},
        {"type": "SELECT_NODE", "select_list": [{"class": "FUNCTION", "type": "FUNCTION"}]},
        {"type": "SELECT_NODE", "select_list": [{"class": "SHELL", "type": "SHELL"}]},
        {"type": "SELECT_NODE", "cte_map": {"map": [{"value": {}}]}},
        {"type": "MERGE_QUERY_NODE"},
    ],
)
def test_a_tree_that_is_not_known_is_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="^query: "):
        SelectOnly(["steps"], OtherDuckDB(tree)).statement("FROM steps")  # type: ignore[arg-type]


# --- limits


def test_time_is_limited_and_the_console_goes_on(place: Place) -> None:
    with place.console({}, seconds=0.5) as console:
        for sql in (
            ENDLESS,
            ENDLESS.replace("count(*)", "*"),
            "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range * b.range % 7 = 3",
            f"EXPLAIN ANALYZE {ENDLESS}",
        ):
            started = time.monotonic()
            assert "took longer than 0.5 s, the time allowed" in refusal(console, sql)
            assert time.monotonic() - started < 15, "with room for a busy machine"
            assert console.query("SELECT 1 AS a").to_pylist() == [{"a": 1}]


def test_time_is_limited_before_the_query_has_begun(place: Place) -> None:
    with place.console({}, seconds=1e-6) as console:
        assert "took longer" in refusal(console, ENDLESS)


def test_time_is_limited_while_a_stream_is_read(place: Place) -> None:
    with place.console({}, seconds=0.5) as console:
        reader = console.stream("SELECT * FROM range(1000000000000)")
        assert reader.read_next_batch().num_rows > 0
        with pytest.raises(StoreError, match="took longer than 0.5 s"):
            for _ in reader:
                pass
        assert console.query("SELECT 1 AS a").to_pylist() == [{"a": 1}]


def test_whoever_reads_a_stream_may_take_their_time(place: Place) -> None:
    with place.console({}, seconds=2) as console:
        reader = console.stream("SELECT * FROM range(10)", rows=5)
        time.sleep(2.5)
        assert reader.read_all().num_rows == 10


def test_memory_is_limited_and_the_console_goes_on(place: Place) -> None:
    with place.console({}, memory="50MB") as console:
        for sql in (
            "SELECT list(range) FROM range(1000000000)",
            "SELECT quantile_cont(range, 0.5) FROM range(1000000000)",
            "SELECT * FROM range(100000000) ORDER BY hash(range)",
            "SELECT * FROM range(1000000000)",
        ):
            assert "50MB, the memory allowed" in refusal(console, sql)
            assert console.query("SELECT count(*) AS n FROM steps").to_pylist() == [{"n": 4}]
        with pytest.raises(StoreError, match="50MB, the memory allowed"):
            console.stream("SELECT * FROM range(100000000) ORDER BY hash(range)").read_all()
        frame = "ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW"
        reader = console.stream(f"SELECT count(DISTINCT hash(range)) OVER ({frame}) FROM range(100000000)", rows=2048)
        assert reader.read_next_batch().num_rows > 0
        with pytest.raises(StoreError, match="50MB, the memory allowed"):
            reader.read_all()
    assert place.files() == place.before, "nothing is spilled to disk"


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("SELECT " + "list_transform([1], lambda x: " * 40 + "1" + ")" * 40, "nested lambdas and macros"),
        ("SELECT " + "nullif(" * 40 + "1" + ", 2)" * 40, "nested lambdas and macros"),
        ("SELECT 1 FROM steps" + ", steps" * 400, "more than 50 tables"),
        ("SELECT " + ".".join("a" * 5000), "more than 16 parts"),
        ("SELECT " + "(SELECT " * 900 + "1" + ")" * 900, "nested too deeply"),
        ("SELECT * FROM " + "(SELECT * FROM " * 400 + "steps" + ")" * 400, "nested too deeply"),
        ("SELECT " + "(" * 6000 + "1" + ")" * 6000, "depth"),
        ("SELECT " + "1 + " * 6000 + "1", "20,000"),
        ("SELECT '\ud800'", "half of a surrogate pair"),
        ("SELECT '\0'", "a NUL character"),
    ],
)
def test_what_cannot_be_interrupted_is_refused(sql: str, told: str, console: Console) -> None:
    started = time.monotonic()
    assert told in refusal(console, sql)
    assert time.monotonic() - started < 5


def test_rows_are_limited_on_request(console: Console) -> None:
    assert console.query("FROM range(10)", max_rows=10).num_rows == 10
    with pytest.raises(StoreError, match="more than 10 rows, allowed are 10"):
        console.query("FROM range(11)", max_rows=10)


@pytest.mark.parametrize(
    "limits",
    [
        {"seconds": 0}, {"seconds": -1}, {"seconds": float("nan")}, {"seconds": float("inf")}, {"threads": 0},
        {"memory": ""}, {"memory": "1"}, {"memory": "-1GB"}, {"memory": "1GB; x"}, {"memory": "1KB"}, {"memory": "50%"},
    ],
)  # fmt: skip
def test_limits_out_of_range_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="^Console: .* allowed "):
        Console({}, [], [], **limits)


@pytest.mark.parametrize("memory", ["100MB", "1.5 GiB", "100mb", "1tb"])
def test_sizes_as_duckdb_writes_them(memory: str) -> None:
    with Console({}, [], [], memory=memory) as console:
        assert console.query("SELECT 1 AS a").num_rows == 1


# --- one at a time


def test_threads_take_turns(console: Console) -> None:
    found: list[int] = []

    def ask(number: int) -> None:
        for _ in range(5):
            with suppress(StoreError):
                console.query("SELECT nonsense FROM steps")
            sql = f"SELECT count(*) + {number} AS n FROM range(100000) WHERE range % 2 = 0"
            found.append(console.query(sql).column(0)[0].as_py() - number)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [50_000] * 40


def test_a_query_ends_the_stream_before_it(console: Console) -> None:
    reader = console.stream("SELECT * FROM range(1000000000)", rows=1000)
    assert reader.read_next_batch().num_rows <= 1000
    assert console.query("SELECT 1 AS a").to_pylist() == [{"a": 1}]
    with pytest.raises(StoreError, match="a later query ended it"):
        reader.read_next_batch()
    done = console.stream("SELECT * FROM range(3)")
    assert done.read_all().num_rows == 3
    assert console.query("SELECT 1 AS a").to_pylist() == [{"a": 1}]


def test_a_stream_that_nobody_reads_blocks_nobody(console: Console) -> None:
    unread = [console.stream("SELECT * FROM range(1000000000)") for _ in range(3)]
    assert console.query("SELECT 1 AS a").to_pylist() == [{"a": 1}]
    del unread


def test_waiting_for_ones_turn_ends(place: Place) -> None:
    with place.console({}, seconds=0.5) as console:
        with console._lock:
            assert "the console is busy, waited 0.5 s" in refusal(console, "SELECT 1")
        assert console.query("SELECT 1 AS a").to_pylist() == [{"a": 1}]


def test_closing_stops_what_is_running(place: Place) -> None:
    console = place.console({})
    refused: list[str] = []
    thread = threading.Thread(target=lambda: refused.append(refusal(console, ENDLESS)))
    thread.start()
    time.sleep(0.5)
    console.close()
    thread.join(15)
    assert not thread.is_alive() and refused
    assert "the console is closed" in refusal(console, "SELECT 1")
    console.close()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As a shell leaves it to a command in the foreground; one in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_what_is_running(console: Console) -> None:
    timer = threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        console.query(ENDLESS)
    assert time.monotonic() - started < 15
    assert console.query("SELECT 1 AS a").to_pylist() == [{"a": 1}]


# --- what people type

QUERIES = {
    "FROM steps": 4,
    "table steps;": 4,
    "  -- a comment\n FROM steps /* and another */ ;  ": 4,
    "SHOW TABLES": 2,
    "DESCRIBE steps": 3,
    "DESCRIBE SELECT 1 AS a": 1,
    "SHOW steps": 3,
    "SUMMARIZE steps": 3,
    "FROM (DESCRIBE steps) SELECT column_name": 3,
    "EXPLAIN SELECT * FROM steps WHERE step > 1": 1,
    "explain analyze FROM steps": 1,
    "VALUES (1, 'a'), (2, 'b')": 2,
    "FROM steps SELECT step WHERE step > 1": 2,
    "SELECT * EXCLUDE (x) REPLACE (step + 1 AS step) RENAME (s AS text) FROM steps ORDER BY ALL LIMIT 2 OFFSET 1": 2,
    "SELECT COLUMNS('s.*') FROM steps": 4,
    "SELECT COLUMNS(lambda c: c LIKE 's%') FROM steps": 4,
    "SELECT step, lag(x) OVER w FROM steps WINDOW w AS (ORDER BY step) QUALIFY row_number() OVER w < 3": 2,
    "SELECT rank() OVER (PARTITION BY s ORDER BY x), ntile(2) OVER (), first_value(s) OVER () FROM steps": 4,
    "SELECT sum(step) OVER (ORDER BY step ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) FROM steps": 4,
    "SELECT quantile_cont(x, [0.1, 0.5]), percentile_cont(0.5) WITHIN GROUP (ORDER BY x), median(x) FROM steps": 1,
    "SELECT arg_max(step, x), list(s ORDER BY step), string_agg(s, ',') FILTER (s IS NOT NULL), mode(s) FROM steps": 1,
    "SELECT histogram(step), approx_quantile(x, 0.5), corr(step, x), count(DISTINCT s), entropy(step) FROM steps": 1,
    "SELECT step % 2 AS g, count(*), grouping(g) FROM steps GROUP BY ROLLUP (g) HAVING count(*) > 0": 3,
    "SELECT DISTINCT ON (s) * FROM steps": 3,
    "WITH a AS (FROM steps), b AS MATERIALIZED (FROM a) FROM a JOIN b USING (step) LEFT JOIN steps s USING (step)": 4,
    "WITH RECURSIVE r AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM r WHERE a < 5) FROM r": 5,
    "SELECT step FROM steps UNION ALL BY NAME SELECT 9 AS step EXCEPT SELECT 1": 4,
    "SELECT step FROM steps INTERSECT SELECT unnest([1, 2])": 2,
    "PIVOT steps ON step IN (1, 2) USING first(x) GROUP BY s": 3,
    "FROM steps PIVOT (first(x) FOR step IN (1, 2) GROUP BY s)": 3,
    "UNPIVOT (SELECT step, x FROM steps) ON step, x INTO NAME n VALUE v": 7,
    "SELECT step, unnest(l) FROM nested": 3,
    "SELECT step, u.n.q FROM nested, unnest(h) AS u(n)": 3,
    "SELECT list_transform(l, lambda v: v * 2), [v + 1 FOR v IN l IF v > 1], list_sum(l), l[1], l[1:2] FROM nested": 4,
    "SELECT h[1].q, {'a': 1, 'b': [1]}, map {'k': 1}, struct_pack(a := 1) FROM nested": 4,
    "SELECT list_filter(l, lambda v: v > 1) FROM nested": 4,
    "SELECT range(3), generate_series(1, 3), r.* FROM range(3) AS r": 3,
    "FROM steps ASOF JOIN (SELECT 2 AS step) b ON steps.step >= b.step": 2,
    "FROM steps, LATERAL (SELECT steps.step + 1 AS k)": 4,
    "SELECT a.step FROM steps a POSITIONAL JOIN nested b": 4,
    "SELECT (SELECT max(step) FROM steps), EXISTS (FROM nested), 1 IN (SELECT step FROM steps)": 1,
    "SELECT CASE WHEN x > 0 THEN 'p' ELSE 'n' END, x IS NULL, x BETWEEN 0 AND 1, coalesce(x, 0) FROM steps": 4,
    "SELECT if(step > 1, 1, 0), nullif(step, 1), x::FLOAT, try_cast(s AS INT), CAST(step AS DECIMAL) FROM steps": 4,
    "SELECT 'a' || s, s.upper(), s ILIKE 'A', s SIMILAR TO 'a', regexp_extract(s, '(.)'), s[1:1] FROM steps": 4,
    "SELECT date '2020-01-01' + INTERVAL 1 DAY, now() > timestamp '2020-01-01', extract(year FROM today())": 1,
    "SELECT isnan(x), isfinite(x), 'nan'::FLOAT, 1 / 0, exp(1), tanh(x), greatest(1, 2), 5 // 2, 2 ** 3 FROM steps": 4,
    "SELECT '{\"a\": 1}'->'a', '{\"a\": 1}'->>'$.a', json_object('a', 1)": 1,
    "FROM json_each('{\"a\": 1, \"b\": 2}')": 2,
    "SELECT * FROM range(100) USING SAMPLE 10 ROWS": 10,
    "SELECT x: 1, 2 AS \"y z\"": 1,
    "SELECT 1 WHERE false": 0,
}  # fmt: skip


@pytest.mark.parametrize("sql", QUERIES)
def test_ordinary_sql_works(sql: str, consoles: dict[str, Console]) -> None:
    assert consoles["both"].query(sql).num_rows == QUERIES[sql]


def test_the_guards_change_no_answer(place: Place, consoles: dict[str, Console]) -> None:
    fixed = [sql for sql in QUERIES if not any(word in sql.upper() for word in ("SAMPLE", "EXPLAIN", "SHOW TABLES"))]
    with place.console({"_locked": False, "_checked": False}) as plain:
        for sql in fixed:
            mine, theirs = (sorted(map(str, c.query(sql).to_pylist())) for c in (consoles["both"], plain))
            assert mine == theirs, sql


def test_a_stream_has_the_batches_asked_for(console: Console) -> None:
    reader = console.stream("SELECT * FROM range(10)", rows=4)
    assert reader.schema.names == ["range"]
    batches = list(reader)
    assert [b.num_rows for b in batches] == [4, 4, 2]


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("selec", 'syntax error at or near "selec"'),
        ("SELECT y FROM steps", 'query: Referenced column "y" not found in FROM clause! Candidate bindings: "s"'),
        ("FROM stesp", "table 'stesp' is not available, allowed are nested, steps. Did you mean steps?"),
        ("FROM hidden", "table 'hidden' is not available, allowed are nested, steps. Use one of them."),
        ("SELECT quantile_con(x) FROM steps", "Did you mean quantile_cont or quantile_disc?"),
        ("SELECT sum(s) FROM steps", "No function matches the given name and argument types 'sum(VARCHAR)'"),
        ("SELECT s::INT FROM steps", "Could not convert string 'a' to INT32"),
        ("SELECT error(chr(27) || '[31m' || chr(10) || 'x')", "⟨1b⟩[31m x"),
        ('FROM "\x1b[31m"', "⟨1b⟩[31m"),
        ("PIVOT steps ON s USING sum(x)", "List the values of PIVOT with IN (…)."),
        ("WITH c AS (COPY steps TO 'x') FROM c", "COPY given, allowed are SELECT, WITH, FROM, VALUES, DESCRIBE"),
        ("SELECT 1; SELECT 2", "2 statements given"),
        ("SELECT ?", "? and $ stand for values"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(sql: str, told: str, console: Console) -> None:
    assert told in refusal(console, sql)


def test_a_file_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = prepared(tmp_path, monkeypatch)
    with place.console({}) as console:
        (tmp_path / "run" / "a.parquet").unlink()
        assert "a.parquet" in refusal(console, "FROM steps")
