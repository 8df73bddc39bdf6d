"""Checkpoints: a resumed run is the uninterrupted one, and a bad file is an error and not a traceback."""

from __future__ import annotations

import pytest
import torch

from mhpo_core.errors import ConfigError, StoreError
from mhpo_core.training import train
from mhpo_core.training.checkpoint import FILE_NAME


def load(folder):
    return torch.load(folder / FILE_NAME, weights_only=True)


@pytest.fixture
def config(tiny):
    return tiny(
        iterations=6,
        optimizer={"epochs": 2, "lr_final": 0.1, "lr_warmup": 7},
        warm_start={"steps": 3, "batch_size": 8},
        fault={"name": "mismatch", "at": 2, "share": 0.2},
        checkpoint={"every": 3},
    )


@pytest.mark.parametrize("steps", [12, 14])  # at the checkpoint, and in the middle of the iteration after it
def test_six_iterations_equal_three_and_three_resumed(config, tmp_path, sink, steps):
    other = type(sink)()
    whole = train(config, sink, "cpu", checkpoint=tmp_path / "whole")
    cut = train(config, other, "cpu", checkpoint=tmp_path / "cut", stop=lambda: len(other.steps) >= steps)
    assert cut.stopped and cut.steps == steps
    resumed = train(config, other, "cpu", checkpoint=tmp_path / "cut", resume=tmp_path / "cut")
    assert resumed.rewards == whole.rewards and resumed.steps == whole.steps == 24
    one, two = load(tmp_path / "whole"), load(tmp_path / "cut")
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    again = other.steps[steps:]
    assert [row["step"] for row in again] == list(range(12, 24))
    for row in again:
        assert row["loss"] == sink.steps[row["step"]]["loss"]
        assert row["metrics"] == sink.steps[row["step"]]["metrics"]
    assert other.events[-1] == ("resumed", "from the checkpoint before step 12")


def test_saving_leaves_one_file_and_the_last_iteration_is_saved(tiny, tmp_path, sink):
    folder = tmp_path / "run" / "checkpoint"
    train(tiny(checkpoint={"every": 0}), sink, "cpu", checkpoint=folder)
    assert [p.name for p in folder.iterdir()] == [FILE_NAME]
    assert load(folder)["position"]["iteration"] == 2


def test_a_finished_run_can_be_made_longer(tiny, tmp_path, sink):
    train(tiny(), sink, "cpu", checkpoint=tmp_path)
    summary = train(tiny(iterations=3, name="longer"), sink, "cpu", resume=tmp_path)
    assert summary.iterations == 3 and [row["step"] for row in sink.steps] == list(range(6))


def test_other_settings_are_refused(tiny, tmp_path, sink):
    train(tiny(), sink, "cpu", checkpoint=tmp_path)
    with pytest.raises(ConfigError, match=r"resume: seed, optimizer differ from the checkpoint's"):
        train(tiny(seed=1, optimizer={"lr": 0.5}), sink, "cpu", resume=tmp_path)


def test_a_missing_damaged_or_foreign_checkpoint_is_refused(tiny, tmp_path, sink):
    with pytest.raises(StoreError, match=r"cannot be read \(.*No such file"):
        train(tiny(), sink, "cpu", resume=tmp_path)
    train(tiny(), sink, "cpu", checkpoint=tmp_path)
    whole = (tmp_path / FILE_NAME).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        (tmp_path / FILE_NAME).write_bytes(content)
        with pytest.raises(StoreError, match=r"checkpoint\.pt: cannot be read"):
            train(tiny(), sink, "cpu", resume=tmp_path)
    torch.save({"something": 1}, tmp_path / FILE_NAME)
    with pytest.raises(StoreError, match=r"checkpoint\.pt: cannot be read"):
        train(tiny(), sink, "cpu", resume=tmp_path)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_cannot_run_code(tiny, tmp_path, sink):
    torch.save({"config": Malicious(tmp_path / "harm")}, tmp_path / FILE_NAME)
    with pytest.raises(StoreError, match=r"checkpoint\.pt: cannot be read"):
        train(tiny(), sink, "cpu", resume=tmp_path)
    assert not (tmp_path / "harm").exists()


def test_a_folder_that_cannot_be_written_is_refused(tiny, tmp_path, sink):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match=r"file: cannot be written"):
        train(tiny(), sink, "cpu", checkpoint=tmp_path / "file")
