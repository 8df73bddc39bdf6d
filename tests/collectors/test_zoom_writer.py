"""What a recorder leaves of the coarser levels, whatever happens to it."""

from __future__ import annotations

from itertools import cycle

import pyarrow as pa
import pytest

from collectors import layout, zoom
from collectors.zoom import ZoomWriter, read_range
from tests.collectors.rollups import (
    LEVELS,
    NAMES,
    Counting,
    Written,
    assert_same_bins,
    long_run,
    make_run,
    store_attempt,
    whole_rows,
    write_rows,
    zoom_writer,
)
from tests.collectors.tails import small_windows


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_windows(monkeypatch)


def test_a_restarted_writer_leaves_the_same_files(tmp_path):
    table = whole_rows(list(range(2200)))
    runs = [make_run(tmp_path / name) for name in ("one", "many")]
    store_attempt(runs[0], table, iter(lambda: 16, 0), iter(lambda: False, None))
    store_attempt(runs[1], table, iter(lambda: 16, 0), cycle([False, False, True, False, True]))
    for level, name in layout.ZOOM.items():
        one, many = (layout.list_level(run, layout.ROLLUP, name) for run in runs)
        assert {f.base for f in one} == {f.base for f in many}
        assert len(one) == 2200 // (4 * level), "a window that is not over has no file"
        assert all(f.first % (4 * level) == 0 and f.last == f.first + 4 * level - 1 for f in one)


def test_a_window_that_a_dead_writer_left_is_made_up_for(tmp_path):
    written = long_run(tmp_path / "run", 80)
    names = {f.name for f in layout.list_level(written.storage, layout.ROLLUP, "x8")}
    newest = max(names)
    written.storage.delete(newest)
    writer = zoom_writer(written.storage, resume=True)
    writer.add(whole_rows([80, 81]))
    assert {f.name for f in layout.list_level(written.storage, layout.ROLLUP, "x8")} == names


def test_a_run_without_coarser_levels_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(zoom, "_PARTS_AT_START", 3)
    written = Written(make_run(tmp_path / "run"), [whole_rows(list(range(400)))])
    for first in range(0, 400, 16):
        write_rows(written.storage, written.attempts[0].slice(first, 16))
    storage = Counting(tmp_path / "run")
    writer = ZoomWriter.resume(storage, 0, 0, zoom_writer(written.storage)._write)
    assert len(storage.names) <= 6
    more = whole_rows(list(range(400, 800)))
    for first in range(0, 400, 16):
        write_rows(written.storage, more.slice(first, 16))
        writer.add(more.slice(first, 16))
    written.attempts = [pa.concat_tables([written.attempts[0], more])]
    assert len(layout.list_level(written.storage, layout.ROLLUP, "x64")) == 1, "only of windows it saw from the start"
    for max_points in (13, 100):
        assert_same_bins(read_range(written.storage, 0, 799, max_points, NAMES), written.direct(0, 799, max_points))


def test_missing_levels_can_be_written_later(tmp_path):
    written = long_run(tmp_path / "run", 2500)
    names = {level: {f.name for f in layout.list_level(written.storage, layout.ROLLUP, level)} for level in LEVELS}
    write = zoom_writer(written.storage)._write
    for gone in (["x8"], ["x64", "x512"], LEVELS):
        for name in [name for level in gone for name in names[level]]:
            written.storage.delete(name)
        zoom.write_missing(written.storage, write)
        for level in LEVELS:
            assert {f.name for f in layout.list_level(written.storage, layout.ROLLUP, level)} == names[level]
    zoom.write_missing(written.storage, lambda *_: pytest.fail("nothing is missing"))
    # of steps that were removed nothing can be written
    for name in names["x8"] | names["x512"]:
        written.storage.delete(name)
    for file in layout.list_level(written.storage, layout.ROLLUP, layout.SEALED):
        if file.last < 300:
            written.storage.delete(file.name)
    zoom.write_missing(written.storage, write)
    found = sorted(layout.list_level(written.storage, layout.ROLLUP, "x8"))
    assert found[0].first == 512 and not layout.list_level(written.storage, layout.ROLLUP, "x512")
    assert_same_bins(read_range(written.storage, 0, 2499, 50, NAMES), written.direct(0, 2499, 50))


def test_a_writer_ignores_what_it_knows_and_begins_afresh_with_an_attempt(tmp_path):
    storage = make_run(tmp_path / "run")
    writer = zoom_writer(storage)
    first = whole_rows(list(range(40)))
    writer.add(first)
    writer.add(first)
    writer.add(whole_rows([]))
    writer.add(whole_rows(list(range(20, 70)), attempt=1))
    files = sorted(layout.list_level(storage, layout.ROLLUP, "x8"))
    assert [(f.first, f.last, f.attempt) for f in files] == [(0, 31, 0), (20, 31, 1), (32, 63, 1)]


def test_steps_far_apart_make_no_useless_files(tmp_path):
    storage = make_run(tmp_path / "run")
    written = Written(storage, [whole_rows([step * 60 for step in range(60)])])
    store_attempt(storage, written.attempts[0], iter(lambda: 10, 0), iter(lambda: False, None))
    assert [len(layout.list_level(storage, layout.ROLLUP, name)) for name in ("x8", "x64", "x512")] == [0, 0, 1]
    assert_same_bins(read_range(storage, 0, 9999, 9, NAMES), written.direct(0, 9999, 9))


def test_a_file_that_cannot_be_written_is_only_missing(tmp_path):
    storage, table = make_run(tmp_path / "run"), whole_rows(list(range(300)))
    good = zoom_writer(storage)._write

    def write(level: str, first: int, last: int, attempt: int, rank: int, piece: pa.Table) -> None:
        if first == 64:
            raise OSError("no space left")
        good(level, first, last, attempt, rank, piece)

    writer = ZoomWriter(0, 0, write)
    for first in range(0, 300, 10):
        write_rows(storage, table.slice(first, 10))
        try:
            writer.add(table.slice(first, 10))
        except OSError:
            assert first in (90, 100)
    assert sorted(f.first for f in layout.list_level(storage, layout.ROLLUP, "x8")) == [
        0,
        32,
        96,
        128,
        160,
        192,
        224,
        256,
    ]
    assert_same_bins(read_range(storage, 0, 299, 40, NAMES), Written(storage, [table]).direct(0, 299, 40))
