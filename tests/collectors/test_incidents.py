"""An incident is told once: not every alarm, not again after a restart, again after quiet or a day."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from collectors.incidents import Incidents
from mhpo_core.alarms import CRITICAL, WARNING, Alarm, Evaluation, Settings
from tests.collectors.support import new_recorder, token_batch
from tests.collectors.test_alarms import HEALTHY, STEPS, record, record_all

CLEAR = 3


def alarm(step: int, severity: str = CRITICAL) -> Alarm:
    return Alarm(f"rule@{step}", "rule", "unknown", severity, step, step, 1.0, 1.0, "", {}, [])


def evaluation(step: int, text: str) -> Evaluation:
    """A: a critical alarm is raised; c: one holds; w: a warning is raised; l: it is not back; else: quiet."""
    level = {"A": CRITICAL, "c": CRITICAL, "w": WARNING}.get(text, "")
    alarms = {"A": (alarm(step), alarm(step)), "w": (alarm(step, WARNING),)}.get(text, ())
    return Evaluation(step, level, 0.0, {}, alarms, lasting=text == "l")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("....", []),
        ("wwww", []),
        ("A", [0]),
        (".AcAcA", [1]),
        ("A..A", [0]),
        ("A...A", [0, 4]),
        ("Acc..A..A...A", [0, 12]),
        ("AwwwA...A", [0, 8]),
        ("wA..A.w.A", [1]),
        ("AllllAllll...A", [0, 13]),
    ],
)
def test_an_incident_ends_with_quiet_rows(rows: str, told: list[int]) -> None:
    found: list[int] = []
    incidents = Incidents(CLEAR, lambda a: found.append(a.step))
    for step, text in enumerate(rows):
        incidents.observe(evaluation(step, text))
    assert found == told


def test_a_long_one_is_told_again_after_a_day() -> None:
    found, now = [], 0.0
    incidents = Incidents(CLEAR, lambda a: found.append(a.step), again_after=86_400, clock=lambda: now)
    for step in range(5):
        incidents.observe(evaluation(step, "A"))
        now += 30_000
    assert found == [0, 3]


def test_what_is_past_is_known_and_not_told() -> None:
    found: list[int] = []
    incidents = Incidents(CLEAR, lambda a: found.append(a.step))
    incidents.observe(evaluation(0, "A"), past=True)
    incidents.observe(evaluation(1, "A"))
    assert found == []
    incidents.restart()
    incidents.observe(evaluation(1, "A"))
    assert found == [1]


def test_a_listener_that_fails_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: Alarm) -> None:
        raise RuntimeError("no")

    Incidents(CLEAR, fails).observe(evaluation(0, "A"))
    assert "training goes on" in caplog.text


def test_a_loop_takes_each_incident_once(tmp_path: Path) -> None:
    with new_recorder(tmp_path / "run") as writer:
        assert writer.watched and writer.take_critical() is None
        taken = []
        for step in range(STEPS):
            record(writer, step)
            assert writer.flush(30)
            taken.append(writer.take_critical())
    first = next(a for a in taken if a)
    assert [a for a in taken if a] == [first] and first.severity == CRITICAL
    assert HEALTHY <= first.step == taken.index(first), "known before the next step"


def test_a_restart_does_not_begin_the_incident_anew(tmp_path: Path) -> None:
    first = next(a.step for a in record_all(tmp_path / "whole") if a.severity == CRITICAL)
    raised: list[Alarm] = []
    taken = []
    for steps in (range(first + 1), range(first + 1, first + 2)):
        with new_recorder(tmp_path / "run", alarms=Settings(nonfinite_rows=1), on_alarm=raised.append) as writer:
            for step in steps:
                if step <= first:
                    record(writer, step)
                else:  # another rule becomes critical
                    writer.record(step, token_batch(step), grad_norm=math.nan)
            assert writer.flush(30)
            taken.append(writer.take_critical())
    assert [a.step for a in raised if a.severity == CRITICAL] == [first, first + 1]
    assert taken[0] is not None and taken[0].step == first and taken[1] is None


def test_nobody_watches_if_asked_not_to(tmp_path: Path) -> None:
    with new_recorder(tmp_path / "run", alarms=None) as writer:
        assert not writer.watched and writer.take_critical() is None
