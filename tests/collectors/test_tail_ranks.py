"""The live reader over runs that several ranks write."""

from __future__ import annotations

import pyarrow as pa

from collectors.bin_tables import bins_of_steps
from collectors.bins import Bins
from collectors.ranks import merge_ranks
from collectors.state import RunState
from collectors.storage import LocalStorage
from collectors.tail import ALL_STEPS, RunTail
from collectors.window import Window
from tests.collectors.rollups import (
    NAMES,
    assert_same_bins,
    make_run,
    whole_rows,
    write_rows,
)


def merged_steps(tables: list[pa.Table], metrics: list[str]) -> Bins:
    return bins_of_steps(merge_ranks(pa.concat_tables(tables)), metrics)


class Running(RunTail):
    """A run whose state is what the test says."""

    name_of_state = "running"

    def __init__(self, storage: LocalStorage) -> None:
        super().__init__(storage, NAMES)
        self._states = self

    def read(self) -> RunState:
        return RunState(self.name_of_state, "", "")


def rank_tables(n_steps: int, world_size: int = 2) -> list[pa.Table]:
    return [whole_rows(list(range(n_steps)), rank=r, world_size=world_size, seed=r) for r in range(world_size)]


def check_ranks(tail: RunTail, tables: list[pa.Table]) -> None:
    wanted = Window(100, tail._reader.metrics)
    wanted.add(merged_steps(tables, tail._reader.metrics))
    assert_same_bins(tail.windows[ALL_STEPS].bins, wanted.bins)


def test_a_step_waits_for_all_its_ranks(tmp_path):
    storage = make_run(tmp_path / "run")
    zero, one = rank_tables(40)
    tail = Running(storage)
    write_rows(storage, zero.slice(0, 1))
    tail.poll()
    assert tail.n_steps == 0
    write_rows(storage, one.slice(0, 1))
    assert tail.poll() and tail.n_steps == 1
    check_ranks(tail, [zero.slice(0, 1), one.slice(0, 1)])
    # rank 1 falls behind: sixteen newer steps are enough
    for step in range(1, 18):
        write_rows(storage, zero.slice(step, 1))
        tail.poll()
        assert tail.n_steps == (2 if step == 17 else 1)
    check_ranks(tail, [zero.slice(0, 2), one.slice(0, 1)])
    # what was shown without it is made up for when it is there, however it is stored
    write_rows(storage, one.slice(1, 10))
    assert tail.poll() and tail.n_steps == 11
    check_ranks(tail, [zero.slice(0, 11), one.slice(0, 11)])
    for step in range(11, 18):
        write_rows(storage, one.slice(step, 1))
    tail.poll()
    check_ranks(tail, [zero.slice(0, 18), one.slice(0, 18)])
    opened = Running(storage)
    opened.poll()
    check_ranks(opened, [zero.slice(0, 18), one.slice(0, 18)])


def test_a_run_that_has_ended_waits_for_no_rank(tmp_path):
    storage = make_run(tmp_path / "run")
    zero, one = rank_tables(9)
    tail = Running(storage)
    for step in range(9):
        write_rows(storage, zero.slice(step, 1))
        if step < 5:
            write_rows(storage, one.slice(step, 1))
    tail.poll()
    assert tail.n_steps == 5
    tail.name_of_state = "killed"
    assert tail.poll() and tail.n_steps == 9
    check_ranks(tail, [zero, one.slice(0, 5)])
    assert not tail.poll()


def test_ranks_may_come_and_go_between_launches(tmp_path):
    storage = make_run(tmp_path / "run")
    alone, together = whole_rows(list(range(4)), world_size=1), rank_tables(12)
    tail = Running(storage)
    for step in range(4):
        write_rows(storage, alone.slice(step, 1))
    tail.poll()
    assert tail.n_steps == 4
    write_rows(storage, together[0].slice(4, 1))
    tail.poll()
    assert tail.n_steps == 4, "now there are two"
    write_rows(storage, together[1].slice(4, 1))
    tail.poll()
    assert tail.n_steps == 5
    write_rows(storage, whole_rows(list(range(6)), world_size=1).slice(5, 1))
    tail.poll()
    assert tail.n_steps == 6, "and one again"
