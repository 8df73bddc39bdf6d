"""What a user may type into a console: one query over known tables, with no effect and no reach beyond them.

An allow-list over DuckDB's own syntax tree: kinds of nodes, tables and table functions that are not named here are
refused, so that the statements that a later DuckDB learns are refused too. Other functions are allowed by their kind:
those that compute a value and that DuckDB does not mark as having side effects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

import duckdb

from mhpo_core.errors import StoreError

_QUERIES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE"}
_RELATIONS = {
    "BASE_TABLE", "EMPTY", "EXPRESSION_LIST", "JOIN", "PIVOT", "SHOW_REF", "SUBQUERY", "TABLE_FUNCTION",
}  # fmt: skip
_SCANNED = {"BASE_TABLE", "SUBQUERY", "TABLE_FUNCTION"}
_MODIFIERS = {"DISTINCT_MODIFIER", "LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER", "ORDER_MODIFIER"}
_ORDERS = {"ORDER_DEFAULT", "ASCENDING", "DESCENDING"}
_NODES = _QUERIES | _RELATIONS | _MODIFIERS | _ORDERS
_EXPRESSIONS = {
    "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION", "LAMBDA",
    "OPERATOR", "POSITIONAL_REFERENCE", "STAR", "SUBQUERY", "TYPE", "WINDOW",
}  # fmt: skip
_SHOWN = {"DESCRIBE", "SUMMARY"}

TABLE_FUNCTIONS = frozenset({"generate_series", "json_each", "json_tree", "range", "repeat", "unnest"})
# they bind like functions and are in no catalogue
_SYNTAX_FUNCTIONS = {"->", "unnest", "unlist"}
DENIED_FUNCTIONS = frozenset({
    # settings and the log of the process
    "current_setting", "parse_duckdb_log_message", "write_log",
    # state that outlives the query
    "currval", "nextval", "setseed", "setval",
    # a thread that does nothing until the time is up
    "pg_sleep", "sleep_ms",
    # SQL in a string: it is bound, which opens the files it names
    "json_deserialize_sql", "json_serialize_plan", "json_serialize_sql",
    # the catalogue, with the tables that are not public
    "format_type", "get_block_size", "index_key", "pg_get_constraintdef", "pg_get_viewdef",
    # raw bytes of internal layouts
    "combine", "combine_aggr", "finalize", "to_aggregate_state", "variant_bytes_to_variant",
})  # fmt: skip
# all others that DuckDB marks as having side effects are denied
VOLATILE_FUNCTIONS = frozenset({"error", "gen_random_uuid", "random", "uuid", "uuidv4", "uuidv7"})
_INTERNAL = "__"
_FUNCTIONS = """SELECT function_name, function_type, coalesce(bool_or(has_side_effects), false)
    FROM duckdb_functions() GROUP BY ALL"""

_EXPLAIN = re.compile(r"\s*EXPLAIN(\s+ANALYZE)?\s+", re.IGNORECASE)
_SHOW_TABLES = '"tables"'
_PLACE = re.compile(r"\n+\s*LINE \d+:")
_ALLOWED = "SELECT, WITH, FROM, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES and EXPLAIN"

# binding and join ordering cannot be interrupted everywhere and take time that grows with these, some of it
# exponentially: 40 nested lambdas took 24 GB, 400 joins more than 100 s
_MAX_CHARACTERS = 20_000
_MAX_RELATIONS = 50
_MAX_NAME_PARTS = 16
_MAX_EXPANSIONS = 10
_MAX_MESSAGE = 600


class SelectOnly:
    """Refuses every text but one query over the given tables.

    Args:
        tables: names that a query may refer to.
        parser: a connection to a locked, empty database; used by one thread at a time.
    """

    def __init__(self, tables: Iterable[str], parser: duckdb.DuckDBPyConnection) -> None:
        self._tables = sorted(tables)
        self._public = {_folded(name) for name in self._tables}
        self._parser = parser
        kinds = parser.execute(_FUNCTIONS).fetchall()
        unsafe = DENIED_FUNCTIONS | {name for name, _, effect in kinds if effect} - VOLATILE_FUNCTIONS
        scalars = {_folded(name) for name, kind, _ in kinds if kind in ("scalar", "aggregate", "window", "macro")}
        self._functions = {n for n in scalars - unsafe if not n.startswith(_INTERNAL)} | _SYNTAX_FUNCTIONS
        self._macros = {_folded(name) for name, kind, _ in kinds if kind == "macro"}
        types = parser.execute("SELECT DISTINCT type_name FROM duckdb_types()").fetchall()
        self._types = {_folded(name) for (name,) in types}
        self._relations = 0

    def statement(self, sql: str) -> str:
        """The SQL to run for what was typed.

        Raises:
            StoreError: it is no query, more than one, or reaches beyond the tables.
        """
        if len(sql) > _MAX_CHARACTERS:
            raise StoreError(f"query: {len(sql):,} characters given, allowed are {_MAX_CHARACTERS:,}. Shorten it.")
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in sql):  # a reader of C strings would stop at NUL
            raise StoreError("query: a NUL character or half of a surrogate pair given, allowed is text. Remove it.")
        explained = _EXPLAIN.match(sql)
        try:
            node = self._parse(sql[explained.end() :] if explained else sql)
            if _shows_tables(node):
                return self._list_of_tables()
            self._relations = 0
            self._visit(node, frozenset(), 0)
        except RecursionError:
            raise StoreError("query: nested too deeply. Split it with WITH, or use IN for a list of values.") from None
        except (LookupError, TypeError) as error:  # another DuckDB draws its tree differently
            reason = f"the syntax tree of DuckDB {duckdb.__version__} is not known here ({error!r})"
            raise StoreError(f"query: {reason}, allowed is what it can tell. Write it another way.") from None
        return sql

    def _parse(self, sql: str) -> Any:
        parsed = json.loads(self._parser.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0][0])
        if parsed["error"] and parsed["error_type"] == "not implemented":
            advice = "List the values of PIVOT with IN (…)" if "PIVOT" in sql.upper() else "Type one of these"
            raise StoreError(f"query: not a query, allowed are {_ALLOWED}. {advice}.")
        if parsed["error"]:
            raise StoreError(f"query: {one_line(parsed['error_message'])}")
        if len(parsed["statements"]) != 1:
            given = len(parsed["statements"])
            raise StoreError(f"query: {given} statements given, allowed is one of {_ALLOWED}. Run them one by one.")
        return parsed["statements"][0]

    def _visit(self, value: Any, names: frozenset[str], expansions: int) -> None:
        """Check a part of the tree that sees these WITH names, inside that many nested lambdas and macros."""
        if isinstance(value, list):
            for item in value:
                self._visit(item, names, expansions)
        elif isinstance(value, dict):
            for defined in value.get("cte_map", {}).get("map", ()):
                self._visit(defined["value"], names, expansions)
                names = names | {_folded(defined["key"])}
            self._vet(value, names)
            expansions += self._expands(value)
            for key, child in _children(value):
                self._visit(child, names | _own_name(value, key), expansions)
            if expansions > _MAX_EXPANSIONS:
                raise StoreError(f"query: more than {_MAX_EXPANSIONS} nested lambdas and macros. Split it with WITH.")

    def _vet(self, node: dict[str, Any], names: frozenset[str]) -> None:
        """Refuse the node by itself, whatever is in it."""
        if "class" in node:
            self._vet_expression(node)
        elif isinstance(node.get("type"), str):
            self._vet_node(node, names)
        if node.get("named_param_map"):
            raise StoreError("query: ? and $ stand for values, allowed are the values themselves. Write them out.")

    def _vet_expression(self, node: dict[str, Any]) -> None:
        kind = node["class"]
        if kind not in _EXPRESSIONS:
            raise StoreError(f"query: {kind} is not allowed, allowed are columns, values and functions. Use those.")
        if kind == "TYPE":
            _expect(node["qualified_name"]["path"], self._types, "type")
        elif kind in ("FUNCTION", "WINDOW"):
            # whatever stands before the name is a column that the function is called on, or a schema
            _expect(node["qualified_name"]["path"][-1:], self._functions, "function")
        elif len(node.get("column_names", ())) > _MAX_NAME_PARTS:
            raise StoreError(f"query: a name has more than {_MAX_NAME_PARTS} parts, allowed are fewer. Shorten it.")

    def _vet_node(self, node: dict[str, Any], names: frozenset[str]) -> None:
        kind = node["type"]
        if kind not in _NODES:
            raise StoreError(
                f"query: {kind.removesuffix('_QUERY_NODE')} given, allowed are {_ALLOWED}. Use one of them."
            )
        self._relations += kind in _SCANNED
        if self._relations > _MAX_RELATIONS:
            raise StoreError(f"query: more than {_MAX_RELATIONS} tables and subqueries, allowed are fewer. Shorten it.")
        if kind == "BASE_TABLE":
            _expect(node["qualified_name"]["path"], self._public | names, "table", self._tables)
        if kind == "TABLE_FUNCTION":
            path = node["function"]["qualified_name"]["path"]
            _expect(path, TABLE_FUNCTIONS, "table function", sorted(TABLE_FUNCTIONS))
        if kind == "SHOW_REF" and node["show_type"] == "SHOW":  # of a name that is no table it shows a setting
            _expect(node["qualified_name"]["path"], self._public, "table", self._tables)
        elif kind == "SHOW_REF" and (node["show_type"] not in _SHOWN or not node["query"]):
            raise StoreError("query: SHOW of this is not known, allowed is SHOW TABLES alone. Use it, or DESCRIBE.")

    def _expands(self, node: dict[str, Any]) -> bool:
        kind = node.get("class")
        return kind == "LAMBDA" or kind == "FUNCTION" and _folded(node["qualified_name"]["path"][-1]) in self._macros

    def _list_of_tables(self) -> str:
        rows = ", ".join("('" + name.replace("'", "''") + "')" for name in self._tables)
        return f"SELECT name FROM (VALUES {rows}) AS tables(name)"


def one_line(text: str) -> str:
    """A message of DuckDB without its drawing of the place, without control characters and not longer than a screen."""
    text = " ".join(_PLACE.split(text, maxsplit=1)[0].split())
    text = "".join(c if c.isprintable() else f"⟨{ord(c):x}⟩" for c in text)
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"


def _children(node: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, child in node.items():
        if key == "function" and node.get("type") == "TABLE_FUNCTION":
            yield from child.items()  # the function itself is none of an expression
        elif key != "cte_map":
            yield key, child


def _own_name(node: dict[str, Any], key: str) -> frozenset[str]:
    """The name of a recursive query in its second part; the first part cannot see it."""
    recursive = node.get("type") == "RECURSIVE_CTE_NODE" and key == "right"
    return frozenset({_folded(node["cte_name"])}) if recursive else frozenset()


def _folded(name: str) -> str:
    """As DuckDB compares names: letters of ASCII alone have no case."""
    return name.encode().lower().decode()


def _expect(path: list[str], known: Collection[str], what: str, listed: list[str] | None = None) -> None:
    # "a.csv" in quotes is one name and a.csv is two: only the first can be that of a WITH
    if len(path) == 1 and _folded(path[0]) in known:
        return
    given = one_line(".".join(path))
    close = get_close_matches(_folded(given), sorted(known), n=2)
    allowed = ", ".join(listed) if listed else f"{what}s of DuckDB that have no effect"
    advice = f"Did you mean {' or '.join(close)}?" if close else "Use one of them."
    raise StoreError(f"query: {what} {given!r} is not available, allowed are {allowed}. {advice}")


def _shows_tables(statement: dict[str, Any]) -> bool:
    shown = statement["node"].get("from_table") or {}
    return shown.get("show_type") == "SHOW_SPECIAL" and shown["qualified_name"]["path"] == [_SHOW_TABLES]
