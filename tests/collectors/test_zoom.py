"""Any zoom equals all steps read at once, whatever coarser levels there are; they only make it fast."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors import layout, rollup_files, zoom
from collectors.bin_tables import bins_of_steps
from collectors.bins import Bins, coarsen, concatenate, drop_to
from collectors.ranks import merge_ranks
from collectors.rollup_files import Listing
from collectors.rollup_reader import Reader
from collectors.storage import LocalStorage
from collectors.zoom import plan, read, read_range
from mhpo_core.errors import StoreError
from mhpo_core.metrics import METRICS
from tests.collectors.rollups import (
    NAMES,
    Counting,
    Written,
    assert_same_bins,
    long_run,
    make_run,
    store_attempt,
    whole_rows,
    write_rows,
)


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    """Windows of 32, 256 and 2048 steps, so that short runs fill them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (rollup_files, zoom):
            patch.setattr(module, "BINS_PER_FILE", 4)
        yield


@st.composite
def histories(draw) -> list[list[int]]:
    """Steps per attempt; a later attempt begins somewhere in the earlier ones or after them."""
    attempts: list[list[int]] = []
    for _ in range(draw(st.integers(1, 3))):
        known = [s for steps in attempts for s in steps]
        begin = draw(st.integers(0, max(known, default=0) + 3))
        wide = draw(st.sampled_from([1, 1, 1, 2, 40, 2**20]))
        n = draw(st.integers(1, 90)) * (4 if wide <= 2 else 1)
        seed = draw(st.integers(0, 2**16))
        gaps = np.random.default_rng(seed).integers(1, wide + 1, n)
        attempts.append((begin + np.cumsum(gaps) - gaps[0]).tolist())
    return attempts


@settings(max_examples=12, deadline=None)
@given(histories(), st.data())
def test_any_zoom_equals_all_steps_read_at_once(history, data):
    with tempfile.TemporaryDirectory() as folder:
        written = Written(make_run(Path(folder) / "run"), [whole_rows(s, attempt=a) for a, s in enumerate(history)])
        random = np.random.default_rng(data.draw(st.integers(0, 2**16)))
        for table in written.attempts:
            size = data.draw(st.sampled_from([3, 20, 80]))
            rate = data.draw(st.sampled_from([0.0, 0.2]))
            store_attempt(
                written.storage, table, iter(lambda s=size: int(random.integers(1, s + 1)), 0),
                iter(lambda r=rate: bool(random.random() < r), None),
            )  # fmt: skip
        damage(written.storage, random, data.draw(st.sampled_from([0.0, 0.3, 1.0])))
        newest = max(s for steps in history for s in steps)
        for _ in range(3):
            first = data.draw(st.just(0) | st.integers(0, newest))
            last = data.draw(st.just(2**60) | st.integers(first, newest + 5))
            max_points = data.draw(st.integers(1, 60))
            found = read_range(written.storage, first, last, max_points, NAMES)
            assert_same_bins(found, written.direct(first, last, max_points))
        base = data.draw(st.sampled_from([2, 3, 24]))
        listing, reader = Listing.of(written.storage), Reader(written.storage, NAMES)
        assert_same_bins(read(listing, reader, 0, newest, 20, base), written.direct(0, newest, 20, base))


def damage(storage: LocalStorage, random: np.random.Generator, share: float) -> None:
    """Delete, truncate or spoil some files of the coarser levels."""
    for level in layout.ZOOM.values():
        for file in layout.list_level(storage, layout.ROLLUP, level):
            if random.random() < share:
                path = Path(storage.location(file.name))
                content = path.read_bytes()
                kind = random.integers(0, 3)
                if kind == 0:
                    path.unlink()
                else:
                    path.write_bytes(content[:-9] if kind == 1 else content[:-9] + b"?" + content[-8:])


def test_a_long_run_is_read_from_its_coarsest_level(tmp_path):
    written = long_run(tmp_path / "run", 3000)
    for first, last, max_points, level in [(0, 2047, 4, "x512"), (0, 1023, 20, "x64"), (32, 63, 4, "x8")]:
        storage = Counting(tmp_path / "run")
        found = read_range(storage, first, last, max_points, NAMES)
        assert set(storage.levels()) == {level}
        assert_same_bins(found, written.direct(first, last, max_points))
    # both ends are made up from finer levels: 100 … 127 are in x8 and raw, the newest steps are in no window yet
    storage = Counting(tmp_path / "run")
    assert_same_bins(read_range(storage, 100, 2999, 60, NAMES), written.direct(100, 2999, 60))
    levels = storage.levels()
    assert levels.count("x64") == 11 and levels.count("x8") <= 8 and levels.count("sealed") <= 4


def test_the_number_of_files_does_not_grow_with_the_run(tmp_path):
    counts = []
    for n_steps in (2100, 4 * 2048 + 52):
        written = long_run(tmp_path / str(n_steps), n_steps)
        _, parts = plan(Listing.of(written.storage), 0, n_steps - 1, 20)
        counts.append(len(parts))
    assert counts[1] <= counts[0] + 3


def test_rows_that_were_removed_live_on_in_the_coarser_levels(tmp_path):
    written = long_run(tmp_path / "run", 1000)
    for file in layout.list_level(written.storage, layout.ROLLUP, layout.SEALED):
        if file.last < 600:
            written.storage.delete(file.name)
    assert_same_bins(read_range(written.storage, 0, 999, 50, NAMES), written.direct(0, 999, 50))
    narrow = read_range(written.storage, 40, 199, 1000, NAMES)
    assert narrow.width == 8, "rows of single steps are gone"
    assert_same_bins(narrow, coarsen(written.direct(40, 199, 1000), 8))
    assert read_range(written.storage, 700, 899, 1000, NAMES).width == 1
    for first, last in [(570, 600), (580, 650), (513, 700)]:
        found = read_range(written.storage, first, last, 1000, NAMES)
        wanted = coarsen(written.direct(-(-first // 8) * 8, last, 1000), 8)
        assert_same_bins(found, wanted)
    # without x8 there is x64
    for file in layout.list_level(written.storage, layout.ROLLUP, "x8"):
        written.storage.delete(file.name)
    assert_same_bins(read_range(written.storage, 64, 191, 1000, NAMES), coarsen(written.direct(64, 191, 1000), 64))


def test_an_attempt_whose_first_rows_were_removed_still_ends_the_one_before(tmp_path):
    storage = make_run(tmp_path / "run")
    written = Written(storage, [whole_rows(list(range(300))), whole_rows(list(range(96, 500)), attempt=1)])
    for table in written.attempts:
        store_attempt(storage, table, iter(lambda: 16, 0), iter(lambda: False, None))
    for file in layout.list_level(storage, layout.ROLLUP, layout.SEALED):
        if file.attempt == 1 and file.last < 200:
            storage.delete(file.name)
    assert_same_bins(read_range(storage, 0, 499, 40, NAMES), written.direct(0, 499, 40))


def test_ranks_of_a_step_are_one_step(tmp_path):
    storage = make_run(tmp_path / "run")
    tables = [whole_rows(list(range(40)), rank=rank, world_size=2, seed=rank) for rank in range(2)]
    # the files of the ranks begin and end at different steps, the newest steps are hot
    for first, last in [(0, 13), (13, 30)]:
        write_rows(storage, tables[0].slice(first, last - first))
    for first, last in [(0, 5), (5, 27)]:
        write_rows(storage, tables[1].slice(first, last - first))
    for table, begin in zip(tables, (30, 27), strict=True):
        for row in range(begin, 40):
            write_rows(storage, table.slice(row, 1))
    merged = bins_of_steps(merge_ranks(pa.concat_tables(tables)), NAMES)
    for first, last, max_points in [(0, 39, 100), (3, 33, 7), (12, 14, 5), (39, 50, 9)]:
        inside = merged.rows(slice(first, last + 1))
        assert_same_bins(read_range(storage, first, last, max_points, NAMES), drop_to(inside, max_points))


class Vanishing(LocalStorage):
    """Its first raw file is sealed under the reader's hands."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__(folder)
        self.times = times

    def read(self, name: str) -> bytes:
        if self.times:
            self.times -= 1
            raise FileNotFoundError(name)
        return super().read(name)


def test_a_file_that_is_gone_is_looked_for_again(tmp_path):
    written = long_run(tmp_path / "run", 20)
    assert_same_bins(read_range(Vanishing(tmp_path / "run", 2), 0, 19, 9, NAMES), written.direct(0, 19, 9))
    with pytest.raises(FileNotFoundError):
        read_range(Vanishing(tmp_path / "run", 99), 0, 19, 9, NAMES)


def test_an_unknown_metric_is_refused_and_all_are_read_without_a_choice(tmp_path):
    written = long_run(tmp_path / "run", 3)
    with pytest.raises(StoreError, match="no metric is called 'lost'"):
        read_range(written.storage, 0, 9, metrics=["loss", "lost"])
    assert read_range(written.storage, 0, 9).metrics.names == list(METRICS)


def test_a_run_without_a_step_has_no_bins(tmp_path):
    storage = make_run(tmp_path / "run")
    assert read_range(storage, 0, 2**40, 5, NAMES).size == 0
    written = long_run(tmp_path / "other", 9)
    assert read_range(written.storage, 100, 200, 5, NAMES).size == 0
    assert concatenate([Bins.empty(0, 1, NAMES)]).size == 0
