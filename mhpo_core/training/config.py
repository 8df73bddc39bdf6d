"""The training configuration: frozen dataclasses, TOML files, presets and `key=value` overrides."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from mhpo_core.errors import ConfigError
from mhpo_core.training.faults import FAULTS, NoFault
from mhpo_core.training.sections import (
    CheckpointConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    WarmStartConfig,
)
from mhpo_core.training.tasks import TASKS, DigitSum, TaskConfig
from mhpo_core.training.validation import (
    Section,
    closest,
    from_table,
    require_known,
    require_table,
    setting,
    variant_from_table,
)

PRESET_FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Config(Section):
    """A whole run. Two equal configurations give the same run bit for bit on the same CPU and thread count.

    Args:
        name: of the run, shown to people.
        seed: of initialisation, prompts, sampling and faults.
        iterations: rollouts; optimizer steps are iterations · updates_per_iteration.
    """

    section: ClassVar[str] = "top level"
    name: str = setting("run")
    seed: int = setting(0, low=0)
    iterations: int = setting(300, low=1)
    model: ModelConfig = ModelConfig()
    task: TaskConfig = DigitSum()
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    fault: NoFault = NoFault()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout.completions % self.optimizer.minibatches:
            raise ConfigError(
                f"[optimizer]: minibatches = {self.optimizer.minibatches} for {self.rollout.completions} completions "
                "per iteration, allowed are its divisors. Change minibatches, or prompts and group_size in [rollout]."
            )

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps per rollout, epochs · minibatches."""
        return self.optimizer.epochs * self.optimizer.minibatches

    def to_dict(self) -> dict[str, Any]:
        """Nested tables; `from_dict` of it gives an equal configuration."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.to_dict() if isinstance(v, Section) else v for k, v in values.items()}


def from_dict(table: Mapping[str, Any]) -> Config:
    """A configuration from nested tables; what is left out keeps its default.

    Raises:
        ConfigError: unknown key, wrong type or value out of range; the message names the section.
        ObjectiveError: the same for the objective's hyperparameters.
    """
    require_known(Config.section, table, [f.name for f in fields(Config)])
    built = {name: _READERS[name](value) if name in _READERS else value for name, value in table.items()}
    return Config(**built)


def load_config(path: str | Path | None = None, *, preset: str | None = None, overrides: Iterable[str] = ()) -> Config:
    """The preset, overlaid with the TOML file, overlaid with the overrides; each of them may be left out.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds something that `from_dict` rejects.
    """
    table = _read_toml(_preset_path(preset)) if preset else {}
    if path is not None:
        table = _overlay(table, _read_toml(Path(path)))
    return from_dict(apply_overrides(table, overrides))


def load_preset(name: str, overrides: Iterable[str] = ()) -> Config:
    """The preset of that name with overrides; `list_presets` lists them."""
    return load_config(preset=name, overrides=overrides)


def list_presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(p.stem for p in PRESET_FOLDER.glob("*.toml"))


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the tables with each `section.key=value` set.

    The value is read as TOML (`1e-4`, `true`, `"text"`) and as plain text where that fails (`grpo`). Another `name`
    for the task, objective or fault drops the settings of the one it replaces.

    Raises:
        ConfigError: an override without `=` or without a key.
    """
    result = deepcopy(dict(table))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        *sections, key = (part.strip() for part in dotted.split("."))
        if not equals or not all([*sections, key]) or len(sections) > 1:
            raise ConfigError(
                f"override: got {override!r}, allowed is key=value or section.key=value. "
                "Write for instance optimizer.lr=1e-4."
            )
        change: dict[str, Any] = {key: _parse_value(text.strip())}
        result = _overlay(result, {sections[0]: change} if sections else change)
    return result


def to_toml(config: Config) -> str:
    """The configuration as TOML text that `load_config` reads back."""
    tables = config.to_dict()
    scalars = {k: v for k, v in tables.items() if not isinstance(v, dict)}
    blocks = [_toml_lines(scalars)]
    blocks += [f"[{k}]\n{_toml_lines(v)}" for k, v in tables.items() if isinstance(v, dict)]
    return "\n\n".join(blocks) + "\n"


def _objective_from_table(table: object) -> ObjectiveConfig:
    rows = dict(require_table(ObjectiveConfig.section, table))
    named = {key: rows.pop(key) for key in ("name", "aggregation") if key in rows}
    return ObjectiveConfig(**named, hyperparameters=rows)


_READERS: dict[str, Callable[[object], Any]] = {
    "model": lambda t: from_table(ModelConfig, t),
    "task": lambda t: variant_from_table(TASKS, t, DigitSum.name, "[task]"),
    "warm_start": lambda t: from_table(WarmStartConfig, t),
    "rollout": lambda t: from_table(RolloutConfig, t),
    "objective": _objective_from_table,
    "optimizer": lambda t: from_table(OptimizerConfig, t),
    "fault": lambda t: variant_from_table(FAULTS, t, NoFault.name, "[fault]"),
    "checkpoint": lambda t: from_table(CheckpointConfig, t),
}
# Keys that keep their meaning when another task, objective or fault is selected.
_SHARED_KEYS = {"task": (), "objective": ("aggregation",), "fault": ()}


def _overlay(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            if key in _SHARED_KEYS and "name" in value and value["name"] != old.get("name"):
                old = {k: v for k, v in old.items() if k in _SHARED_KEYS[key]}
            value = {**old, **value}
        result[key] = value
    return result


def _preset_path(name: str) -> Path:
    if name not in list_presets():
        raise ConfigError(
            f"preset: got {name!r}, allowed are {', '.join(list_presets())}.{closest(name, list_presets())} "
            "Pick one of them, or give a TOML file."
        )
    return PRESET_FOLDER / f"{name}.toml"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror}). Give an existing TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid TOML ({error}). Correct that place.") from error


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _toml_lines(table: Mapping[str, Any]) -> str:
    # TOML has no null: a key that is None is left out
    return "\n".join(f"{key} = {_toml_value(value)}" for key, value in table.items() if value is not None)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    # JSON writes bools, numbers, strings and lists of them the way TOML reads them
    return json.dumps(value, ensure_ascii=False)
