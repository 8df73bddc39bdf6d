"""What an alarm may have the loop do: end, save aside, halve the learning rate; nothing else changes."""

from __future__ import annotations

import pytest
import torch

from mhpo_core.errors import ConfigError, StoreError
from mhpo_core.training import Intervention, checkpoint, train
from mhpo_core.training.checkpoint import FILE_NAME


def at(sink, action, *steps):
    """Asks for the action once before each of these steps."""
    waiting = list(steps)

    def intervene():
        if waiting and len(sink.steps) >= waiting[0]:
            waiting.pop(0)
            return Intervention(action, "alarm x")
        return None

    return intervene


def rates(sink):
    return [row["metrics"]["lr"] for row in sink.steps]


def test_stop_ends_the_run_before_the_next_step_and_says_why(tiny, sink):
    summary = train(tiny(iterations=3), sink, "cpu", intervene=at(sink, "stop", 3))
    assert summary.stopped and summary.steps == len(sink.steps) == 3 and summary.reason == "alarm x"
    assert sink.events == [("alarm_action", "stop before step 3, alarm x: the run ends")]


def test_without_an_intervention_there_is_no_reason(tiny, sink):
    assert train(tiny(), sink, "cpu", intervene=lambda: None).reason == ""
    assert train(tiny(), sink, "cpu", stop=lambda: True).reason == ""
    assert sink.events == []


def test_lower_lr_halves_it_each_time(tiny, sink):
    train(tiny(iterations=3), sink, "cpu", intervene=at(sink, "lower-lr", 1, 4))
    assert rates(sink) == [1e-3] + [5e-4] * 3 + [2.5e-4] * 2
    assert [kind for kind, _ in sink.events] == ["alarm_action"] * 2
    assert "times 0.25 from now on" in sink.events[1][1]


def test_the_factor_survives_a_checkpoint(tiny, sink, tmp_path):
    train(tiny(), sink, "cpu", checkpoint=tmp_path, intervene=at(sink, "lower-lr", 1))
    train(tiny(iterations=3), sink, "cpu", resume=tmp_path)
    assert rates(sink)[-2:] == [5e-4] * 2 and [row["step"] for row in sink.steps][-2:] == [4, 5]


def test_a_checkpoint_of_before_there_was_a_factor_has_factor_one(tiny, sink, tmp_path):
    train(tiny(), sink, "cpu", checkpoint=tmp_path)
    state = torch.load(tmp_path / FILE_NAME, weights_only=True)
    del state["position"]["lr_factor"]
    torch.save(state, tmp_path / FILE_NAME)
    train(tiny(iterations=3), sink, "cpu", resume=tmp_path)
    assert rates(sink)[-1] == 1e-3


@pytest.mark.parametrize(("step", "saved"), [(3, 4), (4, 4)])  # within an iteration, between two
def test_a_checkpoint_is_saved_aside_and_can_be_continued_from(tiny, sink, tmp_path, step, saved):
    folder, config = tmp_path / "checkpoint", tiny(iterations=4, checkpoint={"every": 1})
    train(config, sink, "cpu", checkpoint=folder, intervene=at(sink, "checkpoint", step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", f"checkpoint-alarm-{saved}"]
    assert len(sink.steps) == 8, "it goes on"
    assert sink.events[-1] == ("alarm_action", f"checkpoint, alarm x: saved as checkpoint-alarm-{saved}")
    other = type(sink)()
    train(config, other, "cpu", resume=tmp_path / f"checkpoint-alarm-{saved}")
    assert [row["loss"] for row in other.steps] == [row["loss"] for row in sink.steps[saved:]]


def test_a_checkpoint_asked_for_in_the_last_iteration(tiny, sink, tmp_path):
    train(tiny(), sink, "cpu", checkpoint=tmp_path / "c", intervene=at(sink, "checkpoint", 3))
    assert (tmp_path / "c-alarm-4" / FILE_NAME).exists()


def test_no_checkpoint_is_overwritten(tiny, sink, tmp_path):
    there = tmp_path / "c-alarm-2" / FILE_NAME
    there.parent.mkdir()
    there.write_text("of before")
    train(tiny(), sink, "cpu", checkpoint=tmp_path / "c", intervene=at(sink, "checkpoint", 2))
    assert there.read_text() == "of before" and "is there already and stays" in sink.events[-1][1]


def test_a_checkpoint_that_cannot_be_saved_aside_harms_nothing(tiny, sink, tmp_path, monkeypatch):
    def full(*_):
        raise StoreError("checkpoint: cannot be written")

    monkeypatch.setattr(checkpoint, "save", full)
    train(tiny(), sink, "cpu", intervene=at(sink, "checkpoint", 2))
    assert "nothing is saved, this run writes no checkpoints" in sink.events[-1][1]
    other = type(sink)()
    with pytest.raises(StoreError):  # the run's own at its end is another matter
        train(tiny(), other, "cpu", checkpoint=tmp_path / "c", intervene=at(other, "checkpoint", 2))
    assert "cannot be written" in other.events[-1][1] and len(other.steps) == 4


def test_an_action_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="allowed are stop, checkpoint, lower-lr"):
        Intervention("panic", "x")
