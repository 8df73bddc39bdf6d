"""The names on disk: listing while files come and go, coverage, damaged manifests."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from collectors import StoreError, open_run
from collectors.layout import (
    SCHEMA_VERSION,
    Coverage,
    StepFile,
    hot_name,
    list_hot,
    list_table,
    parse_name,
    read_manifest,
    sealed_name,
)
from collectors.reader import Run
from tests.collectors.support import column, record_steps
from tests.collectors.writer import PROCESSES


def test_names_say_which_steps_a_file_holds():
    assert parse_name("d", hot_name(7, 2)) == StepFile(7, 7, 2, 0, "d/" + hot_name(7, 2))
    assert parse_name("d", hot_name(12_345_678_901, 1234)) == StepFile(
        12_345_678_901, 12_345_678_901, 1234, 0, "d/" + hot_name(12_345_678_901, 1234)
    )
    assert parse_name("d", sealed_name(3, 9, 1)) == StepFile(3, 9, 1, 0, "d/" + sealed_name(3, 9, 1))
    for stranger in (hot_name(1, 0) + ".77.tmp", "." + hot_name(1, 0), "s1.a0.r0.parquet", "x.parquet", ""):
        assert parse_name("d", stranger) is None


def test_coverage_is_by_attempt_and_by_whole_file():
    cover = Coverage([StepFile(0, 9, 0, 0, ""), StepFile(20, 20, 0, 0, ""), StepFile(5, 6, 1, 0, "")])
    for first, last, attempt in itertools.product((0, 3, 5, 9, 10, 20), (0, 6, 7, 9, 10, 20), (0, 1, 2)):
        if first <= last:
            inside = (attempt == 0 and (last <= 9 or first == 20)) or (attempt == 1 and first >= 5 and last <= 6)
            assert cover.holds(StepFile(first, last, attempt, 0, "")) == inside, (first, last, attempt)


def test_a_step_that_is_both_hot_and_sealed_is_listed_once(tmp_path):
    for level in ("hot", "sealed"):
        (tmp_path / "rollup" / level).mkdir(parents=True)
    names = ["hot/" + hot_name(s, a) for s, a in ((0, 0), (1, 0), (2, 0), (1, 1))] + ["sealed/" + sealed_name(0, 1, 0)]
    for name in names:
        (tmp_path / "rollup" / name).touch()
    found = [os.path.relpath(f.path, tmp_path / "rollup") for f in list_table(tmp_path, "rollup")]
    assert found == [names[4], names[3], names[2]]


def commit_forever(folder: Path, first: int) -> None:
    for step in range(first, 20_000):
        temporary = folder / (hot_name(step, 0) + ".1.tmp")
        temporary.touch()
        temporary.replace(folder / hot_name(step, 0))


def test_a_listing_never_shows_a_step_and_hides_the_one_before(tmp_path):
    # on ext4 one reading of a busy folder misses files that were renamed into it while it was read
    for step in range(300):
        (tmp_path / hot_name(step, 0)).touch()
    process = PROCESSES.Process(target=commit_forever, args=(tmp_path, 300), daemon=True)
    process.start()
    newest = 299
    try:
        while newest < 2500:
            steps = sorted(f.first for f in list_hot(tmp_path))
            assert steps == list(range(len(steps))) and steps[-1] >= newest
            newest = steps[-1]
    finally:
        process.kill()
        process.join()


def test_rows_of_a_step_that_is_not_yet_in_the_listing_of_steps_stay_out(tmp_path, monkeypatch, seal_after):
    """A reader lists rollup, then steps 2 and 3 are committed and sealed, then it lists tokens."""
    seal_after(4)
    run = tmp_path / "run"
    record_steps(run, range(4))
    for path in list((run / "rollup" / "sealed").iterdir()):
        path.rename(run / path.name)
    late = [run / "rollup" / "hot" / hot_name(s, 0) for s in (2, 3)]
    for path in late:
        path.rename(run / path.name)
    arrived = []

    def list_then_commit(folder, table):
        found = list_table(folder, table)
        if table == "rollup" and not arrived:
            arrived.extend((run / path.name).rename(path) for path in late)
        return found

    monkeypatch.setattr("collectors.layout.list_table", list_then_commit)
    with Run(run) as opened:
        steps = "SELECT DISTINCT step FROM {} ORDER BY 1"
        assert (
            opened.connection.sql(steps.format("tokens")).fetchall()
            == opened.connection.sql(steps.format("steps")).fetchall()
        )
    assert arrived


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b'{"schema_version": 1', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[1]", "no schema_version"),
        (b'{"schema_version": "1"}', "no schema_version"),
        (b'{"schema_version": 2, "objective": "mhpo"}', "objective"),
    ],
)
def test_a_damaged_manifest_is_one_clear_line(tmp_path, content, says):
    record_steps(tmp_path / "run", range(1))
    (tmp_path / "run" / "run.json").write_bytes(content)
    with pytest.raises(StoreError, match=says) as raised:
        open_run(tmp_path / "run")
    assert "\n" not in str(raised.value) and "Restore it" in str(raised.value)


def test_an_older_schema_is_one_clear_line(tmp_path):
    record_steps(tmp_path / "run", range(1))
    (tmp_path / "run" / "run.json").write_text('{"schema_version": 1}')
    with pytest.raises(StoreError, match=r"schema version 1, of a version of mhpo that was never released.*again"):
        open_run(tmp_path / "run")
    with pytest.raises(StoreError, match="schema version 1"):
        record_steps(tmp_path / "run", range(1, 2))


def test_a_newer_schema_and_a_folder_that_is_no_run_are_refused(tmp_path):
    record_steps(tmp_path / "run", range(1))
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(StoreError, match=f"schema version {SCHEMA_VERSION + 1}.*newer version of mhpo"):
        open_run(tmp_path / "run")
    for stranger in (tmp_path, tmp_path / "nothing", tmp_path / "run" / "run.json"):
        with pytest.raises(StoreError, match="open_run: "):
            read_manifest(stranger)


def test_a_manifest_without_hyperparameters_still_opens(tmp_path):
    record_steps(tmp_path / "run", range(1))
    for objective in ({"name": "mhpo"}, {}, None, {"name": "gspo", "hyperparameters": {"text": "x", "flag": True}}):
        (tmp_path / "run" / "run.json").write_text(
            json.dumps({"schema_version": SCHEMA_VERSION, "objective": objective})
        )
        assert set(column(tmp_path / "run", "SELECT modulated_log_ratio FROM tokens")) == {None}
