"""The house: app → collectors → mhpo_core, never back."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("mhpo_core", "collectors", "app")
FORBIDDEN = {
    "mhpo_core": {"collectors", "app", "streamlit", "plotly", "duckdb", "pyarrow", "pandas"},
    "collectors": {"app", "streamlit", "plotly", "pandas", "transformers"},
    "app": set(),
}
FRAMEWORKS = {"trl", "verl", "openrlhf", "ray", "vllm"}
ADAPTERS = ROOT / "collectors" / "adapters"


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    files = sources(layer)
    assert files
    for path in files:
        forbidden = FORBIDDEN[layer] - {"transformers"} if path.parent == ADAPTERS else FORBIDDEN[layer]
        wrong = imported(path) & (forbidden | {"tests"})
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("layer", LAYERS)
def test_trainer_frameworks_stay_in_their_adapters(layer: str) -> None:
    for path in sources(layer):
        if path.parent != ADAPTERS:
            assert not imported(path) & FRAMEWORKS, path


@pytest.mark.parametrize("layer", LAYERS)
def test_files_fit_in_a_head(layer: str) -> None:
    for path in sources(layer):
        assert len(path.read_text("utf-8").splitlines()) <= 400, path


def test_nothing_is_read_from_outside_the_repository() -> None:
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts:
            assert "/".join(["..", "shared"]) not in path.read_text("utf-8"), path


def test_the_wheel_carries_every_file_that_is_not_python() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    shipped = {p for package, globs in declared.items() for glob in globs for p in (ROOT / package).glob(glob)}
    present = {
        p for layer in LAYERS for p in (ROOT / layer).rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc") and not p.name.startswith(".")
    }  # fmt: skip
    assert present == shipped
