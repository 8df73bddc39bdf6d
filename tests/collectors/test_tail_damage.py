"""The live reader leaves out what is damaged, says so, and goes on."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pytest

from collectors import layout
from collectors.storage import LocalStorage
from collectors.tail import RunTail
from tests.collectors.rollups import (
    NAMES,
    Written,
    make_run,
    store_attempt,
    whole_rows,
    write_rows,
)
from tests.collectors.tails import check_windows, followed, settle, small_windows


@pytest.fixture
def small(monkeypatch):
    small_windows(monkeypatch)


def spoil(storage: LocalStorage, name: str, *, truncate: bool) -> bytes:
    path = Path(storage.location(name))
    content = path.read_bytes()
    path.write_bytes(content[:-10] if truncate else content[:50] + bytes([content[50] ^ 1]) + content[51:])
    return content


@pytest.mark.parametrize("truncate", [True, False])
def test_damaged_files_are_left_out_and_named(tmp_path, truncate):
    storage = make_run(tmp_path / "run")
    table = whole_rows(list(range(30)))
    names = [write_rows(storage, table.slice(first, 5)) for first in range(0, 25, 5)]
    names += [write_rows(storage, table.slice(row, 1)) for row in range(25, 30)]
    bad = [names[1], names[7]]
    for name in bad:
        spoil(storage, name, truncate=truncate)
    tail = followed(storage)
    left = [*range(5), *range(10, 27), 28, 29]
    check_windows(tail, Written(storage, [table.take(left)]))
    assert tail.damaged == sorted(bad) and not tail.poll()
    name = write_rows(storage, whole_rows([30]))
    spoil(storage, name, truncate=truncate)
    tail.poll()
    assert tail.n_steps == len(left) and tail.damaged == sorted([*bad, name])
    write_rows(storage, whole_rows([31]))
    assert tail.poll() and tail.n_steps == len(left) + 1 and tail.last.step == 31


def test_a_file_that_is_repaired_is_read(tmp_path):
    storage = make_run(tmp_path / "run")
    table = whole_rows(list(range(6)))
    names = [write_rows(storage, table.slice(row, 1)) for row in range(6)]
    content = spoil(storage, names[3], truncate=True)
    tail = followed(storage)
    settle(tmp_path / "run")
    assert tail.n_steps == 5 and not tail.poll()
    Path(storage.location(names[3])).write_bytes(content)
    settle(tmp_path / "run")
    assert tail.poll() and tail.damaged == []
    check_windows(tail, Written(storage, [table]))


def test_a_damaged_file_still_tells_where_an_attempt_began(tmp_path):
    storage = make_run(tmp_path / "run")
    first, second = whole_rows(list(range(10))), whole_rows(list(range(9, 14)), attempt=1)
    for row in range(10):
        write_rows(storage, first.slice(row, 1))
    tail = followed(storage)
    spoil(storage, write_rows(storage, second.slice(0, 1)), truncate=True)
    tail.poll()
    check_windows(tail, Written(storage, [first.slice(0, 9)]))
    write_rows(storage, second.slice(1, 1))
    for seen in (tail, followed(storage)):
        seen.poll()
        check_windows(seen, Written(storage, [pa.concat_tables([first.slice(0, 9), second.slice(1, 1)])]))


def test_a_damaged_coarser_file_costs_time_and_nothing_else(tmp_path, small):
    storage = make_run(tmp_path / "run")
    table = whole_rows(list(range(900)))
    store_attempt(storage, table, repeat(50), repeat(False))
    name = layout.list_level(storage, layout.ROLLUP, "x8")[3].name
    for file in layout.list_level(storage, layout.ROLLUP, "x64"):
        storage.delete(file.name)
    spoil(storage, name, truncate=False)
    tail = followed(storage)
    check_windows(tail, Written(storage, [table]))
    assert tail.damaged == [name]


class Failing(LocalStorage):
    """Cannot read some files, once or always."""

    error: Exception | None = None
    after, times = 0, 99

    def read(self, name: str) -> bytes:
        if self.error and self.times and name.startswith(layout.ROLLUP):
            self.after -= 1
            if self.after < 0:
                self.times -= 1
                raise self.error
        return super().read(name)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_read_that_fails_is_made_up_for_by_the_next(tmp_path, after):
    storage = Failing(make_run(tmp_path / "run").local)
    table = whole_rows(list(range(10)))
    tail = RunTail(storage, NAMES)
    for first in (0, 5):
        for row, size in ((0, 2), (2, 2), (4, 1)):
            write_rows(storage, table.slice(first + row, size))
        storage.error, storage.after = OSError("no answer"), after
        with pytest.raises(OSError, match="no answer"):
            tail.poll()
        storage.error = None
        assert tail.poll() and tail.n_steps == first + 5
        check_windows(tail, Written(storage, [table.slice(0, first + 5)]))


def test_a_file_that_is_removed_while_it_is_read_was_sealed(tmp_path):
    storage = Failing(make_run(tmp_path / "run").local)
    table = whole_rows(list(range(6)))
    tail = RunTail(storage, NAMES)
    for first in (0, 3):
        write_rows(storage, table.slice(first, 3))
        storage.error, storage.after, storage.times = FileNotFoundError("gone"), 0, 2
        assert tail.poll() and storage.times == 0
        check_windows(tail, Written(storage, [table.slice(0, first + 3)]))
    write_rows(storage, whole_rows([6]))
    storage.times = 99
    with pytest.raises(FileNotFoundError):
        tail.poll()
