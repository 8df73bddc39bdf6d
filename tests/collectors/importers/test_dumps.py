"""Arrays of tokens become a batch: what is kept, what is left out, and what is never made up."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.importers import dumps
from collectors.importers.dumps import batch_of, floats, groups, has_keys, number_in, numbered, token_row
from collectors.importers.steps import Notes

odd = st.one_of(
    st.none(), st.floats(), st.integers(-(10**400), 10**400), st.text(max_size=4), st.booleans(), st.just([1])
)


def test_files_come_by_number(tmp_path):
    for name in ("a10", "a9", "a010", "b1", "a", "xa1", "a1x"):
        (tmp_path / name).touch()
    assert [p.name for p in numbered(tmp_path, r"a([0-9]+)")] == ["a9", "a010", "a10"]
    assert numbered(tmp_path / "a9", r"a([0-9]+)") == [] == numbered(tmp_path / "none", r"a([0-9]+)")
    assert number_in("a010", r"a([0-9]+)") == 10 and number_in("b", r"a([0-9]+)") is None


def test_keys_of_a_line_that_is_longer_than_what_is_read(tmp_path):
    file = tmp_path / "a"
    file.write_text('{"one": 1, "two": "' + "x" * (2 << 20) + '", "three": 3}\n')
    assert has_keys(file, "one", "two") and not has_keys(file, "three")
    file.write_text('{"one": 1\n{"one": 1}\n')
    assert not has_keys(file, "one")
    file.write_text('{"one": {"two": 2}}')
    assert has_keys(file, "one") and not has_keys(file, "two")


def test_numbers_in_any_way_in_which_they_are_written():
    values, null = floats([1, "2.5", None, "NaN", "-Infinity", True, 10**400, [3]])
    assert str(values.tolist()) == "[1.0, 2.5, nan, nan, -inf, 1.0, inf, 3.0]" and null.tolist() == [
        i == 2 for i in range(8)
    ]
    for other in ("12", 5, None, {"a": 1}, [1, "x"], [[1, 2], [3, 4]], [{}]):
        assert floats(other) is None
    assert floats([])[0].shape == (0,)


def test_groups_are_numbered_as_they_appear():
    assert groups(["b", "a", "b"]) == [0, 1, 0] and groups(["b", "a"]) is None and groups([]) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(odd, max_size=5), st.lists(odd, max_size=5), st.lists(odd, max_size=5)), max_size=4))
def test_whatever_the_arrays_hold_a_batch_has_their_numbers_or_nothing(rows):
    read = [
        token_row({"mask": m, "logp_new": o, "logp_old": o, "advantage": a, "entropy": None}, Notes(), "")
        for m, o, a in rows
    ]
    batch = batch_of(read, Notes(), "")
    for index, ((mask, old, advantage), row) in enumerate(zip(rows, read, strict=True)):
        if row is None:
            assert batch is None or not batch.mask[index].any()
            continue
        expected = [
            (dumps.number(o), dumps.number(a)) for m, o, a in zip(mask, old, _each(advantage, len(mask)), strict=True)
            if None not in (m, o, a) and dumps.number(m) != 0 and not math.isnan(dumps.number(m))
        ]  # fmt: skip
        assert row["mask"].sum() == len(expected)
        if expected:
            got = batch.logp_old[index][batch.mask[index]].tolist(), batch.advantage[index][batch.mask[index]].tolist()
            for values, told in zip(got, zip(*expected, strict=True), strict=True):
                np.testing.assert_allclose(values, told, rtol=1e-6, atol=1e-37)


def _each(advantage: list, n: int) -> list:
    one = dumps.number(advantage)
    return advantage if one is None else [one] * n


def test_leading_and_trailing_prompt_tokens_take_no_room():
    def row(mask):
        values = list(range(len(mask)))
        return token_row({"mask": mask, "logp_new": values, "logp_old": values, "advantage": 1.0}, Notes(), "")

    batch = batch_of([row([0, 0, 1, 0, 1, 0]), None, row([1]), row([0])], Notes(), "")
    assert batch.mask.tolist() == [[True, False, True], [False] * 3, [True, False, False], [False] * 3]
    assert batch.logp_old[0].tolist() == [2.0, 3.0, 4.0] and batch.logp_old.dtype == torch.float32
    assert batch_of([None, row([0, 0])], Notes(), "") is None and batch_of([], Notes(), "") is None


def test_what_is_no_mask_and_no_token_id():
    given = {"mask": [math.nan, 1, True], "logp_new": [1.0] * 3, "logp_old": [1.0] * 3, "advantage": 0.0}
    assert token_row(given, Notes(), "")["mask"].tolist() == [False, True, True]
    for ids, taken in (([0, 1, 2**31 - 1], True), ([0, 1, 2**31], False), ([0, 1, -1], False), ([0, 1, 0.5], False)):
        assert ("token_id" in token_row(given | {"token_id": ids}, Notes(), "")) == taken


def test_a_step_that_would_be_mostly_padding_has_no_tokens(monkeypatch):
    monkeypatch.setattr(dumps, "LARGEST_BATCH", 11)
    long = {"mask": np.ones(3, bool), "logp_new": np.zeros(3), "logp_old": np.zeros(3), "advantage": np.zeros(3)}
    notes = Notes()
    assert batch_of([long, None, None, None], notes, "step 1") is None
    assert list(notes) == ["A step with more than 2²⁸ padded tokens has its tokens left out (first: step 1)."]
    assert batch_of([long, None, None], Notes(), "").n_sequences == 3
