"""`verify` finds every file that is not what was written and says which steps it held; everything else opens."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.cli import main
from collectors import open_run
from collectors.encoding import encode
from collectors.integrity import Finding, verify
from collectors.layout import file_name, parse_name
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from tests.collectors.support import column, record_steps, token_batch
from tests.collectors.writer import writing

STEPS = range(5)
FLIPS = 150


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    record_steps(run, STEPS, vocabulary={1: "one"})
    for name in ("sealed", "x8"):  # one file per step is what is damaged here
        shutil.rmtree(run / "rollup" / name, ignore_errors=True)
    shutil.rmtree(run / "tokens" / "sealed")
    shutil.rmtree(run / "sequences" / "sealed")
    return run


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


def findings(run: Path) -> list[Finding]:
    return verify(LocalStorage(run)).findings


def step_of(path: Path) -> int | None:
    found = parse_name("", path.name)
    return found.first if found else None


def stored(run: Path) -> list[Path]:
    return sorted(p for p in run.rglob("*.parquet"))


def check_opens(run: Path, damaged: set[Path]) -> None:
    """Every step whose own files are whole is there, and no query fails."""
    lost = {step_of(p) for p in damaged if "rollup" in p.parts}
    with open_run(run) as opened:
        assert column(opened, "SELECT step FROM steps") == [s for s in STEPS if s not in lost]
        for table in ("tokens", "sequences"):
            gone = lost | {step_of(p) for p in damaged if table in p.parts}
            steps = column(opened, f"SELECT DISTINCT step FROM {table} ORDER BY 1")
            assert steps == [s for s in STEPS if s not in gone]
        assert set(opened.damaged) == {str(p.relative_to(run)) for p in damaged if "vocabulary" not in p.name}


def test_a_run_as_it_was_written_has_no_finding(run):
    found = verify(LocalStorage(run))
    assert found.findings == [] and found.leftovers == []
    assert found.steps == len(STEPS) and found.tokens == sum(int(token_batch(s).mask.sum()) for s in STEPS)


@pytest.mark.parametrize("table", ["rollup", "tokens", "sequences"])
def test_a_file_cut_at_every_hundredth_of_its_length_is_named_and_left_out(run, table):
    path = sorted((run / table / "hot").iterdir())[2]
    content = path.read_bytes()
    for percent in range(100):
        path.write_bytes(content[: len(content) * percent // 100])
        (found, *others) = [f for f in findings(run) if f.kind != "missing"]
        assert not others and found.name == str(path.relative_to(run)) and found.steps == (2, 2)
        assert found.kind == ("empty" if percent == 0 else "truncated")
        if percent % 10 == 0:
            check_opens(run, {path})
    tail = RunTail(run, ["loss"])
    tail.poll()
    assert tail.n_steps == len(STEPS) - (table == "rollup")


def test_every_flipped_bit_is_found(run):
    chance = random.Random(0)
    files = [p for p in stored(run) if p.name != "vocabulary.parquet"]
    for _ in range(FLIPS):
        path = chance.choice(files)
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        before = path.read_bytes()
        path.write_bytes(content)
        assert [f.name for f in findings(run) if f.kind == "damaged"] == [str(path.relative_to(run))]
        tail = RunTail(run, ["loss"])  # what it cannot trust it leaves out, and says so
        tail.poll()
        assert tail.n_steps == len(STEPS) - ("rollup" in path.parts)
        assert bool(tail.damaged) == ("rollup" in path.parts)
        path.write_bytes(before)
    assert findings(run) == []


def test_strangers_doubles_and_holes_are_told_apart(run):
    (run / "notes.txt").write_text("mine")
    (run / "tokens" / "hot" / "part-0.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"x": [1]}), run / "rollup" / "hot" / "s000000003.a000.r000.00000000.99999.parquet")
    hot = sorted(p for p in (run / "tokens" / "hot").iterdir() if step_of(p) is not None)
    table = pq.read_table(pa.OSFile(str(hot[1])))
    data = encode(table.slice(0, 3), "tokens")
    (run / "tokens" / "hot" / file_name(1, 1, 0, 0, data)).write_bytes(data)
    hot[4].unlink()
    found = {(f.kind, f.steps) for f in findings(run)}
    assert found == {
        ("foreign", None), ("truncated", (3, 3)), ("doubled", (1, 1)), ("missing", (4, 4))
    }  # fmt: skip
    with open_run(run) as opened:
        assert column(opened, "SELECT step FROM steps") == list(STEPS)
        assert column(opened, "SELECT count(*) FROM tokens WHERE step = 1") in ([3], [table.num_rows])


def test_the_command_says_it_in_lines_json_and_exit_status(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.startswith("Intact: ")
    path = sorted((run / "tokens" / "hot").iterdir())[0]
    os.truncate(path, 100)
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("truncated  tokens/hot/s000000000") and "step 0: 100 of " in out
    assert main(["verify", str(run), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["kind"] == "truncated" and report["findings"][0]["first_step"] == 0
    assert main(["verify", str(run.parent)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not a run folder" in error


def test_a_live_run_has_no_finding(tmp_path):
    with writing(tmp_path / "run", seal_after=5) as writer:
        for _ in range(4):
            writer.wait_for_steps(6)
            assert findings(tmp_path / "run") == []
