"""The live reader over files of every kind: coarser levels, ones that a listing hides, ones in a bucket."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from collectors import tail as tail_module
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from mhpo_core.errors import StoreError
from tests.collectors.rollups import (
    NAMES,
    Counting,
    Written,
    assert_same_bins,
    make_run,
    store_attempt,
    whole_rows,
    write_rows,
    zoom_writer,
)
from tests.collectors.tails import check_windows, followed, settle, small_windows


@pytest.fixture
def small(monkeypatch):
    small_windows(monkeypatch)


HISTORIES = [
    [[*range(700)]],
    [[*range(300)], [*range(290, 400)], [*range(100, 520)]],
    [[*range(0, 3000, 7)], [*range(1500, 1600)]],
    [[*range(50), *range(2**20, 2**20 + 100)]],
]


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("history", HISTORIES)
def test_a_run_that_was_followed_looks_like_one_that_was_opened(tmp_path, small, history, width):
    run = tmp_path / "run"
    storage = make_run(run, updates_per_iteration=width)
    written = Written(storage, [])
    tail, random = RunTail(storage, NAMES), np.random.default_rng(width)
    for attempt, steps in enumerate(history):
        table = whole_rows(steps, attempt=attempt)
        writer, done = zoom_writer(storage, attempt), 0
        while done < len(steps):
            size = int(random.integers(1, 40))
            piece = table.slice(done, size)
            for row in range(piece.num_rows if random.random() < 0.3 else 0):
                write_rows(storage, piece.slice(row, 1))
            write_rows(storage, piece)
            writer.add(piece)
            written.attempts[attempt:] = [table.slice(0, done + piece.num_rows)]
            done += piece.num_rows
            if random.random() < 0.3:
                assert tail.poll() and not tail.poll()
                check_windows(tail, written, width=width)
    tail.poll()
    check_windows(tail, written, width=width)
    check_windows(followed(storage), written, width=width)


def test_a_refresh_reads_the_new_step_alone_however_long_the_run(tmp_path, small):
    for length in (3, 700):
        run = tmp_path / str(length)
        table = whole_rows(list(range(length + 20)))
        store_attempt(make_run(run), table.slice(0, length), repeat(17), repeat(False))
        storage = Counting(run)
        tail = followed(storage)
        for step in range(length, length + 20):
            settle(run)
            tail.poll()
            storage.names.clear()
            storage.folders.clear()
            name = write_rows(storage, table.slice(step, 1))
            assert tail.poll() and tail.n_steps == step + 1
            assert storage.names == [name] and storage.folders == ["hot"]
        settle(run)
        tail.poll()
        storage.folders.clear()
        assert not tail.poll() and storage.folders == []


def test_opening_a_long_run_reads_few_files(tmp_path, small):
    counts = []
    for length in (2000, 8000):
        storage = Counting(make_run(tmp_path / str(length)).local)
        store_attempt(storage, whole_rows(list(range(length))), repeat(200), repeat(False))
        storage.names.clear()
        assert followed(storage).n_steps == length
        counts.append(len(storage.names))
        assert len(set(storage.names)) >= len(storage.names) - 1, "hardly a file is read twice"
    assert counts[1] <= counts[0] + 3


class Hiding(Counting):
    """A folder that changes while it is listed: the file committed just before the newest one is not seen."""

    hidden = ""

    def list(self, folder: str) -> dict[str, int]:
        found = super().list(folder)
        if self.hidden and folder == "rollup/hot":
            del found[self.hidden.rsplit("/", 1)[-1]]
            self.hidden = ""
        return found


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_step_that_a_listing_hides_is_not_lost(tmp_path, attempt):
    storage = Hiding(make_run(tmp_path / "run").local)
    table = whole_rows(list(range(5)))
    for row in range(5):
        write_rows(storage, table.slice(row, 1))
    tail = followed(storage)
    later = whole_rows(list(range(5 - 2 * attempt, 9)), attempt=attempt)
    names = [write_rows(storage, later.slice(row, 1)) for row in range(2)]
    storage.hidden = names[0]
    tail.poll()
    assert not storage.hidden
    wanted = [table, later.slice(0, 2)] if attempt else [pa.concat_tables([table, later.slice(0, 2)])]
    check_windows(tail, Written(storage, wanted))


def test_many_new_files_are_read_from_the_coarser_levels(tmp_path, small, monkeypatch):
    monkeypatch.setattr(tail_module, "_REOPEN_AFTER_STEPS", 500)
    storage = Counting(make_run(tmp_path / "run").local)
    table = whole_rows(list(range(1200)))
    store_attempt(storage, table.slice(0, 100), repeat(10), repeat(False))
    tail = followed(storage)
    writer = zoom_writer(storage, resume=True)
    for first in range(100, 1200, 10):
        write_rows(storage, table.slice(first, 10))
        writer.add(table.slice(first, 10))
    storage.names.clear()
    tail.poll()
    check_windows(tail, Written(storage, [table]))
    assert {"x8", "x64"} & set(storage.levels())


class Remote(LocalStorage):
    """A bucket: no folder, no time stamps, no locks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder, self.local, self.url = folder, None, "s3://bucket/runs/one/"  # type: ignore[assignment]

    def location(self, name: str) -> str:
        return str(self._folder / name)

    def stamp(self, folder: str) -> None:
        return None


def test_a_run_in_a_bucket(tmp_path):
    run = tmp_path / "run"
    table = whole_rows(list(range(300)))
    store_attempt(make_run(run), table.slice(0, 290), repeat(29), repeat(False))
    for row in range(290, 299):
        write_rows(LocalStorage(run), table.slice(row, 1))
    tail = followed(Remote(run))
    assert tail.name == "one" and not tail.poll()
    write_rows(LocalStorage(run), table.slice(299, 1))
    assert tail.poll()
    check_windows(tail, Written(LocalStorage(run), [table]))


def test_any_range_of_steps_can_be_looked_at_and_is_followed(tmp_path, small):
    storage = Counting(make_run(tmp_path / "run").local)
    written = Written(storage, [whole_rows(list(range(600))), whole_rows(list(range(400, 900)), attempt=1)])
    store_attempt(storage, written.attempts[0], repeat(50), repeat(False))
    tail = RunTail(storage, NAMES)
    ranges = [(0, 899, 2000), (-9, 899, 100), (350, 450, 30), (890, 2**40, 5)]
    wanted = Written(storage, written.attempts[:1])

    def check() -> None:
        for asked in ranges:
            assert_same_bins(tail.zoom(*asked).bins.select(NAMES, list("abc")), wanted.direct(*asked))

    check()
    for row in range(0, 500, 50):
        write_rows(storage, written.attempts[1].slice(row, 50))
        tail.poll()
        wanted.attempts = [written.attempts[0], written.attempts[1].slice(0, row + 50)]
        storage.names.clear()
        check()
        assert row == 0 or not storage.names, "a range that was asked for is not read again"
    # what is not taken yet is not shown either, or it would be added twice
    more = whole_rows(list(range(900, 910)), attempt=1)
    write_rows(storage, more)
    tail.zoom(880, 999)
    tail.poll()
    wanted.attempts.append(pa.concat_tables([wanted.attempts.pop(), more]))
    assert_same_bins(tail.zoom(880, 999).bins.select(NAMES, list("abc")), wanted.direct(880, 999, 2000))
    assert len(tail._zooms) == 4


def test_an_unknown_metric_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no metric is called 'lost'"):
        RunTail(make_run(tmp_path / "run"), ["lost"])
