"""The names on disk: listing while files come and go, coverage, damaged manifests."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path

import pytest

from collectors import StoreError, open_run
from collectors.layout import (
    SCHEMA_VERSION,
    Coverage,
    EventFile,
    StepFile,
    event_name,
    file_name,
    list_events,
    list_hot,
    list_table,
    parse_event,
    parse_name,
    read_manifest,
)
from collectors.reader import Run
from collectors.storage import LocalStorage
from tests.collectors.support import column, record_steps, step_files
from tests.collectors.writer import PROCESSES

DATA = b"PAR1 and so on"
CRC = f"{zlib.crc32(DATA):08x}"


@pytest.mark.parametrize(
    "key", [(0, 0, 0, 0), (7, 7, 2, 0), (3, 9, 1, 12), (12_345_678_901, 12_345_678_902, 1234, 1000)]
)
@pytest.mark.parametrize("data", [DATA, b""])
def test_names_say_which_steps_a_file_holds_and_what_its_bytes_are(key, data):
    name = file_name(*key, data)
    assert parse_name("d", name) == StepFile(*key, f"{zlib.crc32(data):08x}", f"d/{name}", len(data))
    assert parse_name("d", name).base == name


def test_names_are_those_of_the_readme():
    assert file_name(123, 123, 0, 0, DATA) == f"s000000123.a000.r000.{CRC}.14.parquet"
    assert file_name(0, 255, 0, 0, DATA) == f"s000000000-000000255.a000.r000.{CRC}.14.parquet"
    assert event_name(7, 0, DATA) == f"e000000007.r000.{CRC}.14.parquet"
    assert parse_event(event_name(7, 3, DATA)) == EventFile(7, 3, CRC, "events/" + event_name(7, 3, DATA), 14)


def test_strangers_have_no_steps():
    name = file_name(1, 1, 0, 0, DATA)
    backwards = file_name(9, 3, 0, 0, DATA)
    older = "s000000001.a000.r000.parquet"
    upper = name.replace(CRC, CRC.upper())
    assert upper != name
    for stranger in (name + ".77.tmp", "." + name, backwards, older, upper, name + "\n", event_name(1, 0, DATA), ""):
        assert parse_name("d", stranger) is None
    for stranger in (name, event_name(1, 0, DATA) + ".77.tmp", "e0-1.parquet", ""):
        assert parse_event(stranger) is None


def step_file(first: int, last: int, attempt: int, rank: int = 0) -> StepFile:
    return StepFile(first, last, attempt, rank, CRC, "", 0)


def test_coverage_is_by_attempt_and_rank_and_by_both_ends():
    """A merged file of the ring can begin in one file of rollup and end in another."""
    held = {(0, 0): [*range(10), 20], (1, 0): [5, 6], (0, 1): [*range(10, 20)]}
    cover = Coverage([step_file(0, 9, 0), step_file(20, 20, 0), step_file(5, 6, 1), step_file(10, 19, 0, rank=1)])
    for first, last, attempt, rank in itertools.product(range(-1, 23), range(-1, 23), (0, 1, 2), (0, 1)):
        if first <= last:
            steps = held.get((attempt, rank), [])
            inside = first in steps and last in steps
            assert cover.holds(step_file(first, last, attempt, rank)) == inside, (first, last, attempt, rank)


def write(
    folder: Path, first: int, last: int | None = None, attempt: int = 0, rank: int = 0, data: bytes = DATA
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(first, first if last is None else last, attempt, rank, data)
    (folder / name).write_bytes(data)
    return name


def test_a_step_that_is_both_hot_and_sealed_is_listed_once(tmp_path):
    rollup = tmp_path / "rollup"
    for step, attempt in ((0, 0), (1, 0)):
        write(rollup / "hot", step, attempt=attempt)
    other_attempt, later = write(rollup / "hot", 1, attempt=1), write(rollup / "hot", 2)
    other_rank = write(rollup / "hot", 1, rank=1)
    sealed = write(rollup / "sealed", 0, 1)
    write(rollup / "sealed", 1, 1)  # as hot as it is sealed, and inside the other
    found = [f.name for f in list_table(LocalStorage(tmp_path), "rollup")]
    hot = [f"rollup/hot/{name}" for name in (other_rank, other_attempt, later)]
    assert found == [f"rollup/sealed/{sealed}", *hot]


def test_a_file_of_another_size_than_its_name_tells_is_damaged_and_hides_no_other(tmp_path):
    """A truncated sealed file must not cover the whole files of the same steps."""
    rollup = tmp_path / "rollup"
    steps = [write(rollup / "hot", step) for step in range(3)]
    sealed = write(rollup / "sealed", 0, 2)
    for content in (b"", DATA[:-1], DATA + b"x"):
        (rollup / "sealed" / sealed).write_bytes(content)
        (rollup / "hot" / steps[1]).write_bytes(content)
        damaged: list[StepFile] = []
        listed = list_table(LocalStorage(tmp_path), "rollup", damaged)
        assert [f.base for f in listed] == [steps[0], steps[2]]
        assert {f.base for f in damaged} == {sealed, steps[1]}
    events = tmp_path / "events"
    events.mkdir()
    names = [event_name(number, rank, DATA) for number, rank in ((9, 0), (10, 0), (9, 1))]
    for name in names:
        (events / name).write_bytes(DATA)
    assert [e.name for e in list_events(LocalStorage(tmp_path))] == [f"events/{names[i]}" for i in (0, 2, 1)]
    (events / names[0]).write_bytes(b"")
    odd: list[EventFile] = []
    assert [e.name for e in list_events(LocalStorage(tmp_path), odd)] == [f"events/{names[i]}" for i in (2, 1)]
    assert [e.name for e in odd] == [f"events/{names[0]}"]


def commit_forever(folder: Path, first: int) -> None:
    for step in range(first, 20_000):
        name = file_name(step, step, 0, 0, b"")
        temporary = folder / (name + ".1.tmp")
        temporary.touch()
        temporary.replace(folder / name)


def test_a_listing_never_shows_a_step_and_hides_the_one_before(tmp_path):
    # on ext4 one reading of a busy folder misses files that were renamed into it while it was read
    folder = tmp_path / "rollup" / "hot"
    for step in range(300):
        write(folder, step, data=b"")
    process = PROCESSES.Process(target=commit_forever, args=(folder, 300), daemon=True)
    process.start()
    newest = 299
    try:
        while newest < 2500:
            steps = sorted(f.first for f in list_hot(LocalStorage(tmp_path), "rollup"))
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
    late = [path for step in (2, 3) for path in step_files(run, "rollup", "hot", step)]
    for path in late:
        path.rename(run / path.name)
    arrived = []

    def list_then_commit(storage, table, damaged=None):
        found = list_table(storage, table, damaged)
        if table == "rollup" and not arrived:
            arrived.extend((run / path.name).rename(path) for path in late)
        return found

    monkeypatch.setattr("collectors.layout.list_table", list_then_commit)
    with Run(LocalStorage(run)) as opened:
        for table in ("steps", "tokens", "sequences"):
            found = opened.connection.sql(f"SELECT DISTINCT step FROM {table} ORDER BY 1").fetchall()
            # the second listing of rollup has them
            assert found == [(step,) for step in range(4)]
    assert len(arrived) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b'{"schema_version": 1', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[1]", "no schema_version"),
        (b'{"schema_version": "1"}', "no schema_version"),
        (b'{"objective": {}}', "no schema_version"),
        (b'{"schema_version": 3, "objective": "mhpo"}', "objective"),
        (b'{"schema_version": 3, "store": [1]}', "store"),
    ],
)
def test_a_damaged_manifest_is_one_clear_line(tmp_path, content, says):
    record_steps(tmp_path / "run", range(1))
    (tmp_path / "run" / "run.json").write_bytes(content)
    with pytest.raises(StoreError, match=says) as raised:
        open_run(tmp_path / "run")
    assert "\n" not in str(raised.value) and "Restore it" in str(raised.value)


@pytest.mark.parametrize("version", range(SCHEMA_VERSION))
def test_an_older_schema_is_one_clear_line(tmp_path, version):
    run = tmp_path / "run"
    record_steps(run, range(1))
    (run / "run.json").write_text(json.dumps({"schema_version": version}))
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    for use in (open_run, lambda path: record_steps(path, range(1, 2))):
        with pytest.raises(StoreError, match=rf"schema version {version}, .*Upgrade it with `mhpo compact") as raised:
            use(run)
        assert "\n" not in str(raised.value) and str(run) in str(raised.value)
    assert sorted(p.relative_to(run) for p in run.rglob("*")) == before


def test_a_newer_schema_and_a_folder_that_is_no_run_are_refused(tmp_path):
    record_steps(tmp_path / "run", range(1))
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(StoreError, match=f"schema version {SCHEMA_VERSION + 1}.*newer version of mhpo"):
        open_run(tmp_path / "run")
    for stranger in (tmp_path, tmp_path / "nothing", tmp_path / "run" / "run.json"):
        with pytest.raises(StoreError, match="open_run: .* is not a run folder"):
            read_manifest(LocalStorage(stranger))
        with pytest.raises(StoreError, match="open_run: .* is not a run folder"):
            open_run(stranger)


def test_a_manifest_without_hyperparameters_still_opens(tmp_path):
    record_steps(tmp_path / "run", range(1))
    for objective in ({"name": "mhpo"}, {}, None, {"name": "gspo", "hyperparameters": {"text": "x", "flag": True}}):
        (tmp_path / "run" / "run.json").write_text(
            json.dumps({"schema_version": SCHEMA_VERSION, "objective": objective})
        )
        assert set(column(tmp_path / "run", "SELECT modulated_log_ratio FROM tokens")) == {None}
