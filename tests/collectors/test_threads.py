"""The writer thread leaves the trainer its cores."""

from __future__ import annotations

import threading

import pytest
import torch

from collectors import recorder as recorder_module
from collectors.recorder import Recorder
from tests.collectors.support import token_batch


def test_the_trainer_keeps_its_threads_and_the_writer_has_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    measure = recorder_module.measure

    def spy(*arguments):
        seen[threading.current_thread().name] = torch.get_num_threads()
        return measure(*arguments)

    monkeypatch.setattr(recorder_module, "measure", spy)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with Recorder(tmp_path / "run", objective="mhpo") as recorder:
            recorder.record(0, token_batch(0))
            assert torch.get_num_threads() == 2
        late = threading.Thread(target=lambda: seen.update(late=torch.get_num_threads()))
        late.start()
        late.join()
    finally:
        torch.set_num_threads(before)
    assert seen == {"mhpo-recorder": 1, "late": 2}
