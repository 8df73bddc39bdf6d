"""The protobuf wire format, by the examples of its documentation and against bytes put together by hand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors.importers import wire


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def test_the_examples_of_the_documentation():
    # protobuf.dev/programming-guides/encoding: Test1 { int32 a = 1; } a = 150; Test2 { string b = 2; } "testing"
    assert list(wire.fields(bytes.fromhex("089601"))) == [(1, wire.VARINT, 150)]
    assert list(wire.fields(bytes.fromhex("120774657374696e67"))) == [(2, wire.BYTES, b"testing")]
    # Test4 { repeated int32 e = 6 [packed] } 3, 270, 86942
    ((number, kind, value),) = wire.fields(bytes.fromhex("3206038e029ea705"))
    assert number == 6 and wire.varints(kind, value) == [3, 270, 86942]
    assert [wire.varints(kind, one) for _, kind, one in wire.fields(bytes.fromhex("28012803"))] == [[1], [3]]


def test_fixed_numbers_and_inner_messages():
    data = b"\x09" + struct.pack("<d", -0.1) + b"\x15" + struct.pack("<f", 0.5) + b"\x1a\x02\x08\x05" + b"\x1a\x00"
    found = list(wire.fields(data))
    assert [(number, kind) for number, kind, _ in found] == [(1, 1), (2, 5), (3, 2), (3, 2)]
    assert wire.reals(found[0][2], "d") == [-0.1] and wire.reals(found[1][2], "f") == [0.5]
    assert list(wire.messages(data, 3)) == [b"\x08\x05", b""] and list(wire.messages(data, 1)) == []


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 2**29 - 1))
def test_every_int64_comes_back(value, number):
    data = varint(number << 3) + varint(value & (2**64 - 1))
    ((found, kind, raw),) = wire.fields(data)
    assert (found, kind, wire.signed(raw)) == (number, wire.VARINT, value)


def test_a_32_bit_number_has_its_sign():
    assert wire.signed(0xFFFFFFFF, 32) == -1 and wire.signed(0x7FFFFFFF, 32) == 2**31 - 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("08", "end inside"),
        ("0896", "end inside"),
        ("1205746573", "5 bytes where 3"),
        ("0900000000", "8 bytes where 4"),
        ("0b", "wire type 3"),
        ("08ffffffffffffffffffff01", "more than 10"),
        ("12ffffffffffffffff7f00", "are left"),
    ],
)
def test_what_is_no_message_is_told(data, says):
    with pytest.raises(wire.WireError, match=says):
        list(wire.fields(bytes.fromhex(data)))


@given(st.binary(max_size=200))
def test_any_bytes_give_fields_or_a_wire_error(data):
    try:
        for _, kind, value in wire.fields(data):
            assert isinstance(value, int) == (kind == wire.VARINT)
    except wire.WireError:
        pass


def test_packed_numbers_that_do_not_divide_are_told():
    with pytest.raises(wire.WireError, match="8-byte"):
        wire.reals(b"\0" * 9, "d")
    with pytest.raises(wire.WireError):
        wire.reals(7, "f")
    assert wire.text(b"caf\xe9") == "caf\ufffd"
