"""Alarms of a recorded run: live and afterwards the same, stored, kept apart from the trainer's own metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from collectors import alarms, open_run
from collectors.recorder import Recorder
from mhpo_core.alarms import Alarm, Settings
from tests.collectors.support import column, new_recorder, rows, token_batch

HEALTHY, STEPS = 20, 32


def scalars(step: int) -> dict[str, float]:
    """Noise that has a pattern, and from step 20 on a gradient that explodes and a reward that falls."""
    wave = 1 + 0.1 * math.sin(step)
    broken = step >= HEALTHY
    return {"grad_norm": wave * (900 if broken else 1), "reward": 0.05 * broken + 0.5 * wave * (not broken)}


def record(writer: Recorder, step: int, n_sequences: int = 4) -> None:
    now = scalars(step)
    writer.record(
        step, token_batch(step, n_sequences), loss=0.1, grad_norm=now["grad_norm"], metrics={"reward": now["reward"]},
        gradient_norms={"layers.0": now["grad_norm"] / 2, "head": 0.1},
    )  # fmt: skip


def record_all(path: Path, **options: object) -> list[Alarm]:
    told: list[Alarm] = []
    with new_recorder(path, on_alarm=told.append, **options) as writer:
        for step in range(STEPS):
            record(writer, step)
    return told


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Alarm]]:
    path = tmp_path_factory.mktemp("watched") / "run"
    return path, record_all(path)


def told_text(alarm: Alarm) -> str:
    return json.dumps(alarm.to_dict(), sort_keys=True)


def test_live_and_afterwards_the_same_alarms(watched: tuple[Path, list[Alarm]]) -> None:
    path, live = watched
    assert [a.severity for a in live].count("critical")
    with open_run(path) as run:
        again, engine = alarms.check(run)
        stored = rows(run, "SELECT id, rule, mode, severity, step, onset_step, message FROM alarms")
    assert [told_text(a) for a in again] == [told_text(a) for a in live]
    assert stored == [(a.id, a.rule, a.mode, a.severity, a.step, a.onset_step, a.message) for a in live]
    assert "mismatch_largest" not in engine.missing
    first = next(a for a in live if a.rule == "gradient-explosion")
    assert first.onset_step == HEALTHY and first.evidence["layers"][0]["layer"] == "layers.0"


def test_every_evaluation_is_stored_and_the_trainers_metrics_stay_alone(watched: tuple[Path, list[Alarm]]) -> None:
    with open_run(watched[0]) as run:
        assert column(run, "SELECT step FROM evaluations WHERE signal = 'level' ORDER BY step") == list(range(STEPS))
        levels = column(run, "SELECT score FROM evaluations WHERE signal = 'level' ORDER BY step")
        assert column(run, "SELECT DISTINCT name FROM metrics ORDER BY name") == ["reward"]
    assert max(levels[:HEALTHY]) < 2 and levels[HEALTHY + 4] == 2


def test_the_same_across_a_restart_and_a_rewind(tmp_path: Path, watched: tuple[Path, list[Alarm]]) -> None:
    whole, pieces = watched[1], list[Alarm]()
    for steps in (range(12), range(12, 26), range(16, STEPS)):  # ended, continued, rewound by ten steps
        with new_recorder(tmp_path / "pieces", on_alarm=pieces.append) as writer:
            for step in steps:
                record(writer, step)
    with open_run(tmp_path / "pieces") as run:
        again, _ = alarms.check(run)
        stored = column(run, "SELECT id FROM alarms")
    assert [told_text(a) for a in again] == [told_text(a) for a in whole]
    assert stored == [a.id for a in whole]
    assert len(pieces) > len(whole), "what the steps that were given up had raised was told too"


def test_rewound_within_one_process(tmp_path: Path, watched: tuple[Path, list[Alarm]]) -> None:
    whole = watched[1]
    with new_recorder(tmp_path / "run") as writer:
        for step in (*range(26), *range(16, STEPS)):
            record(writer, step)
    assert rows(tmp_path / "run", "SELECT id, step FROM alarms") == [(a.id, a.step) for a in whole]


def test_nobody_watches_if_asked_not_to(tmp_path: Path) -> None:
    assert record_all(tmp_path / "run", alarms=None) == []
    with open_run(tmp_path / "run") as run:
        assert rows(run, "FROM alarms") == [] and rows(run, "FROM evaluations") == []
        assert alarms.check(run)[0], "the numbers are there, so they can be looked at later"


def test_thresholds_are_the_recorders_to_set(tmp_path: Path) -> None:
    record_all(tmp_path / "run", alarms=Settings(gradient_factor=1e6, critical=99, warning=99))
    assert column(tmp_path / "run", "SELECT DISTINCT severity FROM alarms") == []


def test_a_listener_that_fails_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(alarm: Alarm) -> None:
        raise RuntimeError("the pager is broken")

    with new_recorder(tmp_path / "run", on_alarm=fails) as writer:
        for step in range(STEPS):
            record(writer, step)
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT count(*) FROM steps") == [STEPS]
        assert column(run, "SELECT id FROM alarms") == [a.id for a in alarms.check(run)[0]]
    assert "the pager is broken" in caplog.text


def test_a_critical_alarm_pins_the_ring(tmp_path: Path) -> None:
    with new_recorder(tmp_path / "run", tokens="flight:8") as writer:
        for step in range(STEPS):
            record(writer, step, n_sequences=64)
    first = rows(tmp_path / "run", "SELECT min(step) FROM alarms WHERE severity = 'critical'")[0][0]
    pinned = column(tmp_path / "run", "SELECT DISTINCT step FROM tokens WHERE kept_because = 'pinned' ORDER BY step")
    assert first - 1 in pinned and first in pinned


def test_alarms_are_damaged_files_like_any_other(tmp_path: Path) -> None:
    raised = record_all(tmp_path / "run")
    file = sorted((tmp_path / "run" / "alarms").iterdir())[0]
    file.write_bytes(file.read_bytes()[:-7])
    with open_run(tmp_path / "run") as run:
        assert column(run, "SELECT id FROM alarms") == [a.id for a in raised[1:]]
        assert run.damaged == (f"alarms/{file.name}",)


def test_two_ranks_are_watched_from_rank_0(tmp_path: Path) -> None:
    told: list[Alarm] = []
    options = {"world_size": 2, "launch": "one"}
    with new_recorder(tmp_path / "run", rank=0, on_alarm=told.append, **options) as first:
        with new_recorder(tmp_path / "run", rank=1, **options) as second:
            for step in range(STEPS):
                for writer in (first, second):
                    record(writer, step)
        assert first.flush(30)
    with open_run(tmp_path / "run") as run:
        again, _ = alarms.check(run)
        stored = column(run, "SELECT id FROM alarms")
    assert again and stored == [a.id for a in again] == [a.id for a in told]
    assert [told_text(a) for a in again] == [told_text(a) for a in told]


def test_a_step_waits_for_a_rank_that_is_behind(tmp_path: Path) -> None:
    options = {"world_size": 2, "launch": "one"}
    with new_recorder(tmp_path / "run", rank=0, **options) as first:
        for step in range(8):
            record(first, step)
    assert first._watch._ranks is not None and first._watch._ranks._last == -1
    with new_recorder(tmp_path / "run", rank=1, **options) as second:
        for step in range(6):
            record(second, step)
    first._watch._ranks._poll()
    assert first._watch._ranks._last == 5


def test_watching_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(rows: object) -> None:
        raise ValueError("a row of another kind")

    monkeypatch.setattr("collectors.rank_alarms.merge_ranks", fails)
    with new_recorder(tmp_path / "run", rank=0, world_size=2, launch="one") as writer:
        for step in range(3):
            record(writer, step)
    assert "cannot be watched" in caplog.text and "a row of another kind" in caplog.text
    assert rows(tmp_path / "run", "SELECT kind FROM events")[-1] == ("finished",)
