"""Untrusted text and numbers made readable."""

import pytest

from app.figures.encode import label
from app.text import human_bytes, human_duration, visible


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain – ünïcödé 日本", "plain – ünïcödé 日本"),
        ("\x1b[31mred", "⟨1b⟩[31mred"),
        ("a\u202eb\u200bc", "a⟨202e⟩b⟨200b⟩c"),
        ("two\nlines\x00", "two⟨a⟩lines⟨0⟩"),
        ("\ud800", "⟨d800⟩"),
    ],
)
def test_hidden_characters_are_shown(given: str, shown: str) -> None:
    assert visible(given) == shown


def test_long_text_is_cut() -> None:
    assert visible("x" * 1_000_000, 10) == "x" * 9 + "…"
    assert visible("x" * 10, 10) == "x" * 10


def test_a_label_is_no_markup() -> None:
    assert label("<b>&amp;</b>") == "&lt;b&gt;&amp;amp;&lt;/b&gt;"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (250_000, "250 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")],
)
def test_bytes(size: float, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (59, "59 s"), (75, "1 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text
