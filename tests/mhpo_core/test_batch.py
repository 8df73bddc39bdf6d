"""The boundary check of a token batch: what it normalises, and every message it refuses with."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields, replace

import numpy as np
import pytest
import torch

from mhpo_core import MhpoError, Sequences, TokenBatch, concatenate
from mhpo_core.errors import BatchError

FIELDS = [f.name for f in fields(TokenBatch)]
REQUIRED = [f.name for f in fields(TokenBatch) if f.default is MISSING]
FLOATS = [n for n in FIELDS if n not in ("mask", "token_id")]


def arguments(**changes) -> dict:
    """A valid (2, 3) batch with every field, and these changed."""
    full = {name: torch.full((2, 3), -0.5) for name in FLOATS}
    full |= {"mask": torch.ones(2, 3, dtype=torch.bool), "token_id": torch.zeros(2, 3, dtype=torch.int64)}
    return full | changes


def refusal(**changes) -> str:
    with pytest.raises(BatchError) as error:
        TokenBatch(**arguments(**changes))
    assert isinstance(error.value, MhpoError) and isinstance(error.value, ValueError)
    return str(error.value)


def test_an_advantage_per_sequence_is_one_per_token():
    batch = TokenBatch(**arguments(advantage=torch.tensor([1.0, -2.0])))
    assert batch.advantage.tolist() == [[1.0] * 3, [-2.0] * 3]


def test_an_advantage_per_sequence_is_never_one_per_position():
    # (3,) is T, not B = 2: broadcasting it along the rows would be silent nonsense
    assert "advantage has shape (3,), allowed are (2, 3) or (2,)." in refusal(advantage=torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bool], ids=str)
def test_a_mask_of_zeros_and_ones_becomes_boolean(dtype):
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=dtype)
    assert TokenBatch(**arguments(mask=mask)).mask.tolist() == mask.bool().tolist()


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, math.nan])
def test_a_mask_with_other_values(value):
    mask = torch.ones(2, 3)
    mask[1, 2] = value
    assert "mask holds values other than 0 and 1" in refusal(mask=mask)


def test_a_mask_that_selects_nothing():
    assert "the mask selects no token, at least one must train" in refusal(mask=torch.zeros(2, 3))


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_no_tensor(name):
    for value in ([[1.0] * 3] * 2, np.ones((2, 3)), *([None] if name in REQUIRED else [])):
        assert f"{name} is a {type(value).__name__}, allowed is a torch.Tensor" in refusal(**{name: value})


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in REQUIRED])
def test_optional_fields_may_be_missing(name):
    assert getattr(TokenBatch(**arguments(**{name: None})), name) is None


@pytest.mark.parametrize("shape", [(2, 4), (3, 2), (2, 3, 1), (6,), ()])
@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("logp_new", "advantage")])
def test_a_field_of_another_shape(name, shape):
    message = refusal(**{name: torch.ones(shape, dtype=arguments()[name].dtype)})
    assert f"{name} has shape {shape}, but logp_new has (2, 3)." in message


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 1), (0, 3), (2, 0)])
def test_logp_new_must_be_a_filled_matrix(shape):
    assert f"logp_new has shape {shape}, allowed is a non-empty (B, T)" in refusal(logp_new=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_field_of_another_dtype(name, dtype):
    message = refusal(**{name: torch.ones(2, 3, dtype=dtype)})
    assert f"{name} has dtype {dtype}, allowed are floating-point dtypes. Convert it" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_token_ids_that_are_no_integers(dtype):
    assert f"token_id has dtype {dtype}, allowed are integer dtypes" in refusal(token_id=torch.ones(2, 3, dtype=dtype))


def test_tensors_on_two_devices():
    assert "tensors lie on ['cpu', 'meta'], allowed is one device" in refusal(logp_ref=torch.zeros(2, 3, device="meta"))


def test_nonfinite_trained_values_are_data():
    batch = TokenBatch(**arguments(logp_old=torch.tensor([[math.nan, math.inf, -math.inf]] * 2)))
    assert batch.logp_old[0].isnan().tolist() == [True, False, False] and batch.logp_old[1, 2] == -math.inf


def test_detach_keeps_every_value_and_drops_the_graph():
    batch = TokenBatch(**arguments(logp_new=torch.full((2, 3), -0.5, requires_grad=True)))
    detached = batch.detach()
    assert batch.logp_new.requires_grad and not detached.logp_new.requires_grad
    assert all(torch.equal(getattr(detached, name), getattr(batch, name)) for name in FIELDS)


class TestConcatenate:
    def test_pads_the_narrow_one_with_masked_positions(self, random_batch):
        wide, narrow = random_batch(1, 2, 5), random_batch(2, 3, 2)
        joined = concatenate([wide, narrow])
        assert joined.mask.tolist() == wide.mask.tolist() + [[*row, *[False] * 3] for row in narrow.mask.tolist()]
        for name in FIELDS:
            for part, rows, width in ((wide, slice(0, 2), 5), (narrow, slice(2, 5), 2)):
                found, expected = getattr(joined, name)[rows, :width], getattr(part, name)
                assert found.dtype == expected.dtype
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

    def test_one_batch_is_itself(self, random_batch):
        batch = random_batch(0)
        assert concatenate([batch]) is batch

    def test_an_absent_field_stays_absent(self, random_batch):
        bare = replace(random_batch(0), logp_ref=None)
        assert concatenate([bare, bare]).logp_ref is None

    def test_a_field_in_some_of_them(self, random_batch):
        batch = random_batch(0)
        with pytest.raises(BatchError, match="logp_ref is present in 2 of 3 micro-batches. Pass it in all"):
            concatenate([batch, replace(batch, logp_ref=None), batch])

    def test_none(self):
        with pytest.raises(BatchError, match="got no batch, at least one is needed"):
            concatenate([])


class TestSequences:
    @pytest.mark.parametrize("name", [f.name for f in fields(Sequences)])
    def test_each_field_has_one_entry_per_row(self, name):
        for value in ([1, 0, 1], torch.tensor([1, 0, 1])):
            Sequences(**{name: value}).require_length(3)
            with pytest.raises(BatchError, match=f"{name} has 3 entries for 4 sequences"):
                Sequences(**{name: value}).require_length(4)

    @pytest.mark.parametrize("value", [1.0, torch.tensor(1.0)], ids=["float", "scalar tensor"])
    def test_one_number_for_all_rows(self, value):
        message = f"reward is one {type(value).__name__} for 4 sequences, allowed is a sequence"
        with pytest.raises(BatchError, match=re.escape(message)):
            Sequences(reward=value).require_length(4)

    def test_all_fields_are_optional(self):
        Sequences().require_length(7)
