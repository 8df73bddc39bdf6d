"""What every table of a training configuration shares: type and range checks, and errors that list what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from mhpo_core.errors import ConfigError

SectionT = TypeVar("SectionT", bound="Section")
VariantT = TypeVar("VariantT", bound="Variant")


def setting(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Iterable[str] | None = None,
) -> Any:
    """A dataclass field that `Section` checks: its type is the default's, its range is given here.

    Args:
        default: value used when the key is left out.
        low, high: inclusive bounds.
        above: exclusive lower bound.
        choices: the only strings allowed.
    """
    limits = {"low": low, "above": above, "high": high, "choices": tuple(choices) if choices is not None else None}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Section:
    """One table of the configuration; every field is checked when it is made, in Python as well as from TOML.

    Raises:
        ConfigError: a value has another type than the default, or is out of range.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for spec in fields(self):
            if spec.metadata:
                object.__setattr__(self, spec.name, _checked(self.section, spec, getattr(self, spec.name)))

    def to_dict(self) -> dict[str, Any]:
        """Keys and values as they would stand in TOML."""
        return asdict(self)


@dataclass(frozen=True)
class Variant(Section):
    """A table whose `name` key selects the class, for instance the task; the other keys are that class's fields."""

    name: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Keys and values as they would stand in TOML, the name first."""
        return {"name": self.name} | asdict(self)


def from_table(cls: type[SectionT], table: object) -> SectionT:
    """A section from its TOML table.

    Raises:
        ConfigError: not a table, an unknown key, or a value that the section rejects.
    """
    rows = require_table(cls.section, table)
    require_known(cls.section, rows, [f.name for f in fields(cls)])
    return cls(**rows)


def variant_from_table(variants: Mapping[str, type[VariantT]], table: object, default: str, section: str) -> VariantT:
    """The variant that the table's `name` selects.

    Raises:
        ConfigError: unknown name, or what `from_table` raises.
    """
    rows = dict(require_table(section, table))
    name = rows.pop("name", default)
    if name not in variants:
        raise ConfigError(
            f"{section}: name = {name!r}, allowed are {', '.join(variants)}.{closest(name, variants)} Pick one of them."
        )
    cls = variants[name]
    require_known(section, rows, [f.name for f in fields(cls)], fixed=["name"])
    return cls(**rows)


def require_table(section: str, table: object) -> Mapping[str, Any]:
    """The table itself, or ConfigError when the key holds something else."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{section}: got {table!r}, allowed is a table of keys. Write {section} above its keys.")
    return table


def require_known(section: str, keys: Iterable[str], known: Iterable[str], fixed: Iterable[str] = ()) -> None:
    """Raise ConfigError for the first key that is not known, with the valid ones and the nearest match."""
    valid = [*fixed, *known]
    for key in keys:
        if key not in valid:
            raise ConfigError(
                f"{section}: unknown key {key!r}, valid are {', '.join(valid) or 'none'}.{closest(key, valid)} "
                "Correct or remove it."
            )


def closest(given: object, valid: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no valid name is near."""
    match = get_close_matches(str(given), list(valid), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _checked(section: str, spec: Field[Any], value: object) -> Any:
    kind = type(spec.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or not _in_range(value, spec.metadata):
        raise ConfigError(
            f"{section}: {spec.name} = {value!r}, allowed {_describe(kind, spec.metadata)}. Change it in {section}."
        )
    return value


def _in_range(value: Any, limits: Mapping[str, Any]) -> bool:
    if limits["choices"] is not None:
        return value in limits["choices"]
    if isinstance(value, str | bool):
        return True
    low, above, high = limits["low"], limits["above"], limits["high"]
    return (
        math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
    )


def _describe(kind: type, limits: Mapping[str, Any]) -> str:
    if limits["choices"] is not None:
        return "are " + ", ".join(limits["choices"])
    words = {int: "is a whole number", float: "is a finite number", bool: "is true or false", str: "is a text"}[kind]
    signs = {"low": "≥", "above": ">", "high": "≤"}
    bounds = [f"{sign} {limits[key]:g}" for key, sign in signs.items() if limits[key] is not None]
    return " ".join([words, " and ".join(bounds)]).strip()
