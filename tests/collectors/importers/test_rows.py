"""Which rows make one step, and which number counts the steps."""

from __future__ import annotations

from pathlib import Path

from collectors.importers.rows import StepOf, joined, natural, side_by_side, wall_time
from collectors.importers.steps import ImportedStep, Notes

NAN = float("nan")


def rows(*given: tuple[int, dict[str, float]]) -> list[ImportedStep]:
    return [ImportedStep(step, dict(metrics)) for step, metrics in given]


def plain(steps) -> list[tuple[int, dict[str, float]]]:
    return [(one.step, one.metrics) for one in steps]


def test_neighbours_that_complement_one_another_are_one_step():
    notes = Notes()
    given = rows((1, {"a": 1.0, "n": NAN}), (1, {"b": 2.0, "n": NAN}), (2, {"a": 3.0}), (1, {"c": 4.0}))
    found = list(joined(iter(given), notes))
    assert [one.step for one in found] == [1, 2, 1] and list(notes) == []
    assert set(found[0].metrics) == {"a", "b", "n"} and found[2].metrics == {"c": 4.0}


def test_what_contradicts_or_repeats_stays_an_attempt():
    notes = Notes()
    given = rows((1, {"a": 1.0}), (1, {"a": 2.0, "b": 1.0}), (2, {"a": 1.0}), (2, {"a": 1.0}))
    assert plain(joined(iter(given), notes)) == [(one.step, one.metrics) for one in given]
    assert list(notes) == [
        "A step has several rows beside each other and each is kept as an attempt, 2 times (first: step 1)."
    ]


def test_the_wall_time_of_a_step_is_its_first():
    given = [
        ImportedStep(1, {"a": 1.0}),
        ImportedStep(1, {"b": 1.0}, wall_time=5.0),
        ImportedStep(1, {"c": 1.0}, wall_time=6.0),
    ]
    assert [one.wall_time for one in joined(iter(given), Notes())] == [5.0]


def test_writers_side_by_side_go_by_step_and_keep_their_rewinds():
    one = rows((1, {"a": 1.0}), (2, {"a": 2.0}), (1, {"a": 9.0}))
    two = rows((2, {"b": 2.5}), (5, {"b": 5.5}))
    found = plain(side_by_side([iter(one), iter(two), iter([])], Notes()))
    assert found == [(1, {"a": 1.0}), (2, {"a": 2.0, "b": 2.5}), (1, {"a": 9.0}), (5, {"b": 5.5})]


def test_the_surest_count_of_steps_wins():
    step_of = StepOf()
    assert step_of({"_step": 3.0}) == 3  # nothing else is known yet
    assert step_of({"_step": 4.0, "train/global_step": 40.0}) == 40
    assert step_of({"_step": 5.0}) is None  # the two are known to differ
    assert step_of({"_step": 6.0, "train/global_step": "50"}) == 50
    same = StepOf()
    assert [same({"_step": 1, "training/global_step": 1}), same({"_step": 2})] == [1, 2]
    assert StepOf()({"step": -1}) is None and StepOf()({"step": 1.5, "_step": 2}) == 2 and StepOf()({}) is None


def test_a_duration_is_no_time_of_day():
    assert wall_time({"time": 12.5}) == (None, None)
    assert wall_time({"time": 12.5, "_timestamp": 1.7e9}) == ("_timestamp", 1.7e9)
    assert wall_time({"timestamp": 1.7e12}) == (None, None)  # milliseconds


def test_numbers_in_names_are_numbers():
    names = ["step_10", "step_2", "a", "step_2.b", "10", "9", "step_" + "9" * 5000]
    ordered = [p.name for p in sorted(map(Path, names), key=natural)]
    assert ordered.index("step_2") < ordered.index("step_10") and ordered.index("9") < ordered.index("10")
