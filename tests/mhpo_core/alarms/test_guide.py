"""The guide names every rule, family, weight and signal as they are, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

from mhpo_core import alarms
from mhpo_core.alarms.rules import RULES
from mhpo_core.alarms.signals import FAMILIES, SIGNALS

GUIDE = (Path(alarms.__file__).parent / "README.md").read_text("utf-8")


def test_the_guide_names_every_rule_family_and_signal() -> None:
    rows = dict(re.findall(r"^\| `([a-z]+)` \| ([0-9.]+) \|", GUIDE, flags=re.MULTILINE))
    assert rows == {name: f"{family.weight:.1f}" for name, family in FAMILIES.items()}
    for name in (*(rule.name for rule in RULES), *SIGNALS):
        assert f"`{name}" in GUIDE, name


def test_the_guide_says_what_is_healthy_as_the_signals_do() -> None:
    for signal in SIGNALS.values():
        assert f"| `{signal.name}` | {signal.label} | {signal.healthy} | {signal.source} |" in GUIDE, signal.name


def test_the_example_of_the_guide_alarms(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "critical Step 13: gradient norm is 800" in capsys.readouterr().out
