"""The README is true: its example runs, its paths and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from app.cli import COMMANDS
from mhpo_core.objectives import AGGREGATIONS, ALIASES, OBJECTIVES, RECIPES
from mhpo_core.training import list_presets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
OBJECTIVE_GUIDE = (ROOT / "mhpo_core" / "objectives" / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs_as_it_stands(tmp_path: Path) -> None:
    examples = blocks("python")
    assert examples
    for example in examples:
        done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_path_in_the_tree_exists() -> None:
    (tree,) = [b for b in blocks("text") if "mhpo_core/" in b]
    names = re.findall(r"^([\w./-]+)(?=\s{2,}|$)", tree, flags=re.MULTILINE)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name


def test_every_linked_file_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_command_and_preset_is_named() -> None:
    for name in [f"mhpo {command}" for command in COMMANDS] + [f"`{preset}`" for preset in list_presets()]:
        assert name in README, name


def test_the_guide_to_objectives_names_every_one() -> None:
    for name in [*OBJECTIVES, *ALIASES, *AGGREGATIONS]:
        assert f"`{name}`" in OBJECTIVE_GUIDE, name
    recipes = OBJECTIVE_GUIDE.split("published with:")[1].split("`[objective]")[0]
    assert re.findall(r"\w+", recipes) == list(RECIPES)


def test_the_guides_own_objective_is_one() -> None:
    (_, example) = re.findall(r"```python\n(.*?)```", OBJECTIVE_GUIDE, flags=re.DOTALL)
    head = (
        "import torch\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from mhpo_core import TokenBatch, objectives\nfrom mhpo_core.objectives import AutogradObjective\n"
    )
    tail = (
        "\nx = torch.full((2, 3), 0.1)\nbatch = TokenBatch(x, 0 * x, torch.ones(2), torch.ones(2, 3))\n"
        "ppo = objectives.create('ppo_clip').loss(batch, 'token-mean')\n"
        "assert torch.allclose(MyObjective().loss(batch), ppo)\n"
    )
    done = subprocess.run([sys.executable, "-c", head + example + tail], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
