"""The recorder's threads leave the trainer its cores."""

from __future__ import annotations

import threading

import pytest
import torch

from collectors import Recorder, pipeline
from collectors.store import StoreWriter
from tests.collectors.support import token_batch


def test_the_trainer_keeps_its_threads_and_the_recorders_have_one_each(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def spied(action):
        def spy(*arguments):
            seen[threading.current_thread().name] = torch.get_num_threads()
            return action(*arguments)

        return spy

    monkeypatch.setattr(pipeline, "prepare", spied(pipeline.prepare))
    monkeypatch.setattr(StoreWriter, "commit_step", spied(StoreWriter.commit_step))
    before, earlier = torch.get_num_threads(), set(threading.enumerate())
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
    assert seen == {"mhpo-measure": 1, "mhpo-store": 1, "late": 2}
    assert not [t.name for t in threading.enumerate() if t not in earlier], "close ends both"
