"""`mhpo verify` names every file that is not as it was written, with its steps; the rest of the run stays readable."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from app.cli import main
from collectors import Recorder, layout, open_run, store
from collectors.encoding import encode
from collectors.integrity import Verification, _check, verify
from collectors.reader import list_run
from collectors.storage import LocalStorage
from mhpo_core import Sequences
from tests.collectors.processes import start
from tests.collectors.support import TABLES, column, everything, rows, token_batch

STEPS, WIDE = 8, 30


def record(path: Path, steps=range(STEPS), seed: int = 0, **options) -> None:
    with Recorder(
        path, objective="mhpo", fsync=False, vocabulary={i: f"token {i}" for i in range(50)}, **options
    ) as recorder:
        for step in steps:
            texts = Sequences(prompt=["p"] * WIDE, completion=[f"c {i}" for i in range(WIDE)], reward=[1.0] * WIDE)
            recorder.record(step, token_batch(step + seed, WIDE), sequences=texts, gradient_norms={"a": 1.0})
            if step == 3:
                recorder.pin("a test", after=0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with files of every kind: single steps, sealed, ring, pinned, events, vocabulary."""
    path, before = tmp_path_factory.mktemp("verify") / "run", store.SEAL_AFTER_STEPS
    store.SEAL_AFTER_STEPS = 3
    record(path, tokens="flight:3")
    record(path, [STEPS], tokens="flight:3")
    store.SEAL_AFTER_STEPS = before
    for table in layout.STEP_TABLES:
        levels = {f.parent.name for f in path.glob(f"{table}/*/*.parquet")}
        assert levels >= {"hot", "sealed"} | ({"ring", "pinned"} if table == "tokens" else set())
    assert found(path) == []
    return path


@pytest.fixture
def run(written, tmp_path):
    """A copy that may be broken."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def found(path: Path) -> list[tuple[str, str, tuple[int, int] | None]]:
    return [(f.kind, f.name, f.steps) for f in verify(LocalStorage(path)).findings]


def kinds(path: Path) -> set[str]:
    return {kind for kind, _, _ in found(path)}


def steps_of(path: Path, run: Path) -> tuple[int, int] | None:
    file = layout.parse_name(str(path.parent.relative_to(run)), path.name)
    return (file.first, file.last) if file else None


def files_of(run: Path, pattern: str = "*/*/*.parquet") -> list[Path]:
    return sorted(p for p in run.glob(pattern) if "left" not in p.parts)


def one(run: Path, pattern: str, place: int = 0) -> Path:
    return files_of(run, pattern)[place]


def answers(run: Path) -> dict[str, int]:
    """Rows of every table; raises if one cannot be read."""
    return {name: len(rows) for name, rows in everything(run).items()}


# One file broken


def test_a_file_truncated_anywhere_is_named_with_its_steps(run):
    storage = LocalStorage(run)
    checked = 0
    for path in [*files_of(run), *files_of(run, "events/*.parquet")]:
        whole, name = path.read_bytes(), str(path.relative_to(run))
        lengths = sorted({len(whole) * percent // 100 for percent in range(100)})
        for length in lengths:
            path.write_bytes(whole[:length])
            alone = Verification()
            _check(storage, name, length, alone)
            (finding,) = alone.findings
            assert (finding.kind, finding.name) == ("truncated" if length else "empty", name)
            assert finding.steps == steps_of(path, run)
            if length in lengths[::40]:
                assert name in list_run(storage).damaged, "a listing shows it"
            checked += 1
        path.write_bytes(whole)
    assert checked > 2000 and found(run) == []


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_with_a_truncated_file_opens_and_answers(run, share):
    whole_answers = answers(run)
    of_each_kind = {path.parent: path for path in [*files_of(run), *files_of(run, "events/*.parquet")]}
    assert len(of_each_kind) >= 11
    for path in of_each_kind.values():
        whole, name = path.read_bytes(), str(path.relative_to(run))
        path.write_bytes(whole[: int(len(whole) * share)])
        kind = "truncated" if int(len(whole) * share) else "empty"
        assert (kind, name, steps_of(path, run)) in found(run)
        now = answers(run)
        assert all(now[table] <= whole_answers[table] for table in TABLES)
        assert all(now[table] for table in TABLES if whole_answers[table]), "one file is never all"
        with open_run(run) as opened:
            assert name in opened.damaged
        path.write_bytes(whole)
    assert answers(run) == whole_answers


def test_steps_of_a_truncated_sealed_file_come_from_their_single_files_while_these_are_there(run):
    before = everything(run)
    path = one(run, "tokens/sealed/*")
    path.write_bytes(path.read_bytes()[:-1])
    assert everything(run) == before
    assert [kind for kind, _, _ in found(run)] == ["truncated"]


def test_every_flipped_byte_is_named(run):
    """Two hundred bytes of all files; DuckDB reads some of them as other values, and chokes on others."""
    chance, seen = random.Random(0), {"the same": 0, "other values": 0, "an error": 0}
    before = everything(run)
    paths = [*files_of(run), *files_of(run, "events/*.parquet")]
    for number in range(200):
        path = chance.choice(paths)
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        alone = Verification()
        _check(LocalStorage(run), str(path.relative_to(run)), len(whole), alone)
        assert [(f.kind, f.steps) for f in alone.findings] == [("damaged", steps_of(path, run))]
        if number < 40:  # one of the tables may not be read then: nobody but verify looks at every byte
            assert found(run) == [("damaged", str(path.relative_to(run)), steps_of(path, run))]
            try:
                seen["the same" if everything(run) == before else "other values"] += 1
            except (duckdb.Error, pa.ArrowException, UnicodeDecodeError) as error:
                assert str(error)
                seen["an error"] += 1
        path.write_bytes(whole)
    assert all(seen.values()), seen
    assert found(run) == [] and everything(run) == before


def test_a_damaged_file_that_is_moved_away_leaves_the_rest_readable(run):
    """What to do about the error above."""
    before = answers(run)
    path = one(run, "tokens/pinned/*")
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(duckdb.Error), open_run(run) as opened:
        opened.sql("FROM tokens").fetchall()
    assert found(run) == [("damaged", str(path.relative_to(run)), steps_of(path, run))]
    path.rename(run.parent / path.name)
    assert found(run) == []
    now = answers(run)
    assert now["steps"] == before["steps"] and 0 < now["tokens"] < before["tokens"]


def test_the_vocabulary_is_checked_by_its_pages(run):
    path, chance = run / "vocabulary.parquet", random.Random(1)
    whole, named = path.read_bytes(), 0
    for _ in range(40):
        broken = bytearray(whole)
        broken[chance.randrange(4, len(whole) // 2)] ^= 0xFF
        path.write_bytes(broken)
        named += found(run) == [("damaged", "vocabulary.parquet", None)]
    assert named >= 36  # a byte of a page's header may be one that nothing depends on
    path.write_bytes(whole[:100])
    assert found(run) == [("damaged", "vocabulary.parquet", None)]


# Files that do not belong, or have got another name


def test_a_foreign_file_is_named_and_passed_over(run):
    before = everything(run)
    for name in (
        "notes.txt",
        "tokens/hot/readme.md",
        "tokens/cold/x.parquet",
        "rollup/hot/s1.parquet",
        "events/e.parquet",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"hello")
        assert found(run) == [("foreign", name, None)]
        assert everything(run) == before
        (run / name).unlink()
    for name in ("checkpoint/model.bin", "tokens/hot/s000000001.parquet.17.tmp"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"hello")
        assert found(run) == []
    assert verify(LocalStorage(run)).leftovers == ["tokens/hot/s000000001.parquet.17.tmp"]


def test_a_foreign_parquet_file_under_a_name_of_the_run(run):
    before = everything(run)
    foreign = encode(pa.table({"x": [1, 2, 3]})).to_pybytes()
    name = one(run, "tokens/sealed/*").name.replace("s000000000-000000002", "s000000700-000000702")
    (run / "tokens" / "sealed" / name).write_bytes(foreign)
    assert found(run) == [("truncated", f"tokens/sealed/{name}", (700, 702))]
    assert everything(run) == before, "its size shows that it is none of the run"
    (run / "tokens" / "sealed" / name).unlink()
    name = layout.file_name(700, 702, 0, 0, foreign)  # somebody took the trouble
    (run / "tokens" / "sealed" / name).write_bytes(foreign)
    assert ("foreign", f"tokens/sealed/{name}", (700, 702)) in found(run)


@pytest.mark.parametrize("table", layout.STEP_TABLES)
@pytest.mark.parametrize("level", ["hot", "sealed"])
def test_a_renamed_file_is_named(run, table, level):
    path = one(run, f"{table}/{level}/*", -1)
    other = path.with_name("s000000500" + path.name[path.name.index(".a") :])
    path.rename(other)
    name = str(other.relative_to(run))
    assert ("renamed", name, (500, 500)) in found(run)
    path = other.rename(other.with_name(other.name.replace(".a000.", ".a007.")))
    assert ("renamed", str(path.relative_to(run)), (500, 500)) in found(run)


def test_a_file_in_the_folder_of_another_table_is_named(run):
    path = one(run, "sequences/sealed/*")
    shutil.copy(path, run / "events" / path.name)
    shutil.copy(path, run / "rollup" / "x8" / path.name) if (run / "rollup" / "x8").exists() else None
    assert found(run) == [("foreign", f"events/{path.name}", None)]


def test_a_step_that_two_processes_wrote_is_named(run, tmp_path):
    record(tmp_path / "other", [STEPS], seed=50, tokens="all")
    (ours,) = [p for p in files_of(run, f"tokens/hot/s{STEPS:09d}.*")]
    (theirs,) = files_of(tmp_path / "other", f"tokens/hot/s{STEPS:09d}.*")
    shutil.copy(theirs, ours.parent / theirs.name)
    doubled = [(kind, steps) for kind, name, steps in found(run) if name.startswith("tokens/hot")]
    assert doubled == [("doubled", (STEPS, STEPS))]
    with open_run(run) as opened:
        assert column(opened, f"SELECT count(*) FROM steps WHERE step = {STEPS}") == [1]
        ids = rows(opened, f"SELECT count(*), count(DISTINCT (sequence_id, position)) FROM tokens WHERE step = {STEPS}")
        assert ids[0][0] == ids[0][1], "each token once"


def test_deleted_files_are_missed(run):
    answered = answers(run)
    (sealed,) = files_of(run, "tokens/sealed/s000000003-000000005.*")
    sealed.unlink()
    assert found(run) == [], "the single steps are there still"
    for path in files_of(run, "tokens/hot/*"):
        if steps_of(path, run)[0] in (4, 5):
            path.unlink()
    assert found(run) == [("missing", "tokens", (4, 4)), ("missing", "tokens", (5, 5))]
    now = answers(run)
    assert now["tokens"] < answered["tokens"] and now["steps"] == answered["steps"]


def test_summaries_that_were_deleted_are_missed(run):
    for path in files_of(run, "rollup/*/*"):
        if steps_of(path, run)[0] in range(3, 6):
            path.unlink()
    assert set(found(run)) == {("missing", "rollup", (3, 5))}
    assert answers(run)["steps"] == STEPS + 1 - 3


def test_what_is_counted_can_be_read(run):
    result = verify(LocalStorage(run))
    with open_run(run) as opened:
        assert result.steps == column(opened, "SELECT count(*) FROM steps_all")[0]
        kept = column(opened, "SELECT count(*) FROM tokens WHERE kept_because NOT IN ('ring', 'pinned')")[0]
    assert result.tokens == kept
    on_disk = [p.stat().st_size for p in run.rglob("*") if p.is_file() and p.parent.name not in ("attempts", "writers")]
    left = len(list(run.glob("*/left/*")))
    assert result.files == len(on_disk) - left and result.size == sum(on_disk)


# The command


def test_the_command_says_what_it_found(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.startswith("Intact: ")
    path = one(run, "tokens/pinned/*")
    first = steps_of(path, run)[0]
    path.write_bytes(b"")
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"tokens/pinned/{path.name}" in out and f"step {first}: 0 of" in out
    assert main(["verify", str(run), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(f["kind"], f["file"], f["first_step"], f["last_step"]) for f in told["findings"]] == [
        ("empty", f"tokens/pinned/{path.name}", first, first)
    ]
    path.unlink()
    assert main(["verify", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", '{"schema_version": 99}', '{"schema_version": "3"}'])
def test_what_is_no_run_is_bad_input(tmp_path, capsys, manifest):
    run = tmp_path / "run"
    run.mkdir()
    if manifest is not None:
        (run / "run.json").write_text(manifest)
    assert main(["verify", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mhpo verify: ") and error.count("\n") == 1
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["verify"])
    assert stopped.value.code == 2


def test_a_hostile_name_is_printed_harmlessly(run, capsys):
    (run / "tokens" / "hot" / "\x1b[31mred\nline").write_bytes(b"x")
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("\n") == 3


# A live run


def _write_for_a_while(path, seconds):
    import time

    store.SEAL_AFTER_STEPS, store.GRACE_SECONDS = 5, 0.05
    end, batches = time.monotonic() + seconds, [token_batch(seed, WIDE) for seed in range(5)]
    with Recorder(path, objective="mhpo", fsync=False, tokens="flight:7") as recorder:
        step = 0
        while time.monotonic() < end:
            recorder.record(step, batches[step % 5])
            if step % 40 == 20:
                recorder.pin("now and then", after=3)
            step += 1
            time.sleep(0.004)


def test_a_live_run_verifies_clean(tmp_path):
    run = tmp_path / "run"
    writer = start(_write_for_a_while, run, 1.5)
    reads = 0
    while writer.is_alive():
        if (run / "run.json").exists():
            assert found(run) == []
            reads += 1
    writer.join()
    assert writer.exitcode == 0 and reads >= 2 and found(run) == []
