"""Formulas over the columns of a table, written once: as SQL for views, or computed by Arrow for rows at hand.

Both go by SQL: what is computed from NULL is NULL, and a condition that is NULL chooses what comes after ELSE. Both
call the mathematical functions of the C library, so that they agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_LARGEST = 3.4028234663852886e38


@dataclass(frozen=True)
class Expression:
    """A function of other expressions; its leaves are columns and numbers.

    Args:
        function: of _FUNCTIONS, "column" or "number".
        operands: expressions, or the one name or number.
    """

    function: str
    operands: tuple[Any, ...]

    def __add__(self, other: Operand) -> Expression:
        return _call("add", self, other)

    def __radd__(self, other: Operand) -> Expression:
        return _call("add", other, self)

    def __sub__(self, other: Operand) -> Expression:
        return _call("subtract", self, other)

    def __mul__(self, other: Operand) -> Expression:
        return _call("multiply", self, other)

    def __rmul__(self, other: Operand) -> Expression:
        return _call("multiply", other, self)

    def __truediv__(self, other: Operand) -> Expression:
        return _call("divide", self, other)

    def __neg__(self) -> Expression:
        return _call("negate", self)

    def __lt__(self, other: Operand) -> Expression:
        return _call("less", self, other)

    def sql(self) -> str:
        """DuckDB's SQL of it."""
        if self.function == "column":
            return str(self.operands[0])
        if self.function == "number":
            return f"{self.operands[0]!r}::DOUBLE"
        return _FUNCTIONS[self.function][0].format(*(operand.sql() for operand in self.operands))

    def of(self, columns: Mapping[str, Any]) -> Any:
        """The values of its column, an Arrow array, or a scalar where it holds no column."""
        if self.function == "column":
            return columns[self.operands[0]]
        if self.function == "number":
            return pa.scalar(self.operands[0], pa.float64())
        return _FUNCTIONS[self.function][1](*(operand.of(columns) for operand in self.operands))


Operand = Expression | float


def column(name: str) -> Expression:
    """The column as it is stored; a sum or difference of float32 columns is rounded to float32."""
    return Expression("column", (name,))


def double(name: str) -> Expression:
    """The column as float64."""
    return _call("double", column(name))


def tanh(x: Operand) -> Expression:
    return _call("tanh", x)


def atanh(x: Operand) -> Expression:
    return _call("atanh", x)


def exp(x: Operand) -> Expression:
    return _call("exp", x)


def ln(x: Operand) -> Expression:
    return _call("ln", x)


def power(x: Operand, exponent: Operand) -> Expression:
    return _call("power", x, exponent)


def absolute(x: Operand) -> Expression:
    return _call("absolute", x)


def sign(x: Operand) -> Expression:
    return _call("sign", x)


def is_infinite(x: Operand) -> Expression:
    return _call("is_infinite", x)


def is_zero(x: Operand) -> Expression:
    return _call("is_zero", x)


def coalesce(x: Operand, otherwise: Operand) -> Expression:
    """x, or the other where x is NULL."""
    return _call("coalesce", x, otherwise)


def where(condition: Expression, x: Operand, otherwise: Operand) -> Expression:
    """x where the condition is true, the other where it is false or NULL."""
    return _call("where", condition, x, otherwise)


def as_float(x: Operand) -> Expression:
    """The float64 as float32; a finite value beyond its range becomes its largest one, as in `Objective.terms`.

    A plain cast of such a value fails in SQL, and with it the query.
    """
    return _call("as_float", x)


def _call(function: str, *operands: Operand) -> Expression:
    return Expression(function, tuple(o if isinstance(o, Expression) else _number(o) for o in operands))


def _number(value: float) -> Expression:
    return Expression("number", (float(value),))


def _where(condition: Any, x: Any, otherwise: Any) -> Any:
    return pc.if_else(pc.fill_null(condition, False), x, otherwise)


def _as_float(x: Any) -> Any:
    inside = pc.min_element_wise(pc.max_element_wise(x, -_LARGEST), _LARGEST)
    return pc.cast(_where(pc.is_finite(x), inside, x), pa.float32())


# NaN is the largest number in DuckDB and compares false in Arrow: formulas must not depend on it
_FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "add": ("({} + {})", pc.add),
    "subtract": ("({} - {})", pc.subtract),
    "multiply": ("({} * {})", pc.multiply),
    "divide": ("({} / {})", pc.divide),
    "negate": ("(-{})", pc.negate),
    "less": ("({} < {})", pc.less),
    "double": ("{}::DOUBLE", lambda x: pc.cast(x, pa.float64())),
    "tanh": ("tanh({})", pc.tanh),
    "atanh": ("atanh({})", pc.atanh),
    "exp": ("exp({})", pc.exp),
    "ln": ("ln({})", pc.ln),
    "power": ("pow({}, {})", pc.power),
    "absolute": ("abs({})", pc.abs),
    "sign": ("sign({})::DOUBLE", pc.sign),
    "is_infinite": ("isinf({})", pc.is_inf),
    "is_zero": ("({} = 0)", lambda x: pc.equal(x, 0)),
    "coalesce": ("coalesce({}, {})", pc.coalesce),
    "where": ("(CASE WHEN {} THEN {} ELSE {} END)", _where),
    "as_float": (
        "(CASE WHEN isfinite({0}) THEN "
        f"least(greatest({{0}}, -{_LARGEST!r}::DOUBLE), {_LARGEST!r}::DOUBLE) ELSE {{0}} END)::FLOAT",
        _as_float,
    ),
}
