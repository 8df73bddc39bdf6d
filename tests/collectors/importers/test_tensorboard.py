"""TensorBoard: a file that its own writer wrote, and files put together here byte by byte."""

from __future__ import annotations

import json
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.importers import import_run
from collectors.importers.steps import Notes
from collectors.importers.tensorboard import FORMAT
from mhpo_core.errors import StoreError
from tests.collectors.importers.reading import DATA, read, refused, same

REAL = DATA / "tensorboard" / "events.out.tfevents.1700000000.host.1.0"


def crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 B.4 tells it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def inner(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def event(step: int, wall: float = 1.7e9, **values: float | bytes) -> bytes:
    """One event; bytes stand for a tensor."""
    summary = b""
    for tag, value in values.items():
        told = inner(8, value) if isinstance(value, bytes) else b"\x15" + struct.pack("<f", value)
        summary += inner(1, inner(1, tag.encode()) + told)
    number, count = b"", step & (2**64 - 1)
    while count > 127:
        number, count = number + bytes([count & 127 | 128]), count >> 7
    return record(b"\x09" + struct.pack("<d", wall) + b"\x10" + number + bytes([count]) + inner(5, summary))


VERSION = record(b"\x09" + struct.pack("<d", 1.7e9) + inner(3, b"brain.Event:2"))


def file(folder, *events: bytes, name="events.out.tfevents.1.h.1.0"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(VERSION + b"".join(events))
    return folder / name


def plain(steps):
    return [(s.step, s.metrics) for s in steps]


def test_the_checksum_is_that_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(b"\0" * 32) == 0x8A9136AA


@pytest.mark.parametrize("path", [REAL, REAL.parent])
def test_a_file_of_tensorboard_comes_back_number_by_number(path):
    steps, notes = read(FORMAT, path)
    assert [s.step for s in steps] == [1, 2, 3]
    for step, found in enumerate(steps, 1):
        expected = {
            "train/loss": struct.unpack("<f", struct.pack("<f", 0.5 / step))[0],
            "train/reward": math.nan if step == 2 else step * 0.25,
            "v2/scalar": step * 1.5,
            "t/double": 0.1 * step,
            "t/int64": -step,
            "t/int32": step * 1000,
            "t/content": step + 0.5,
        }
        assert same(found.metrics, expected | ({"late": step * 10.0} if step != 2 else {}))
        assert found.wall_time == 1700000000.5 + step and found.batch is None
    # a tensor of three numbers, a histogram and a text at each of three steps
    assert notes == ["A summary that is no scalar is left out, 9 times (first: step 1, 't/three')."]


TENSORS = {
    "float": (b"\x08\x01" + b"\x2d" + struct.pack("<f", 0.5), 0.5),  # float_val, not packed
    "double": (b"\x08\x02" + inner(6, struct.pack("<d", -0.1)), -0.1),
    "int32 below 0": (b"\x08\x03\x38" + b"\xfd" + b"\xff" * 8 + b"\x01", -3.0),
    "int64 content": (b"\x08\x09" + inner(4, struct.pack("<q", -7)), -7.0),
    "bool": (b"\x08\x0a\x58\x01", 1.0),
    "shape (1, 1)": (b"\x08\x01" + inner(2, inner(2, b"\x08\x01") * 2) + inner(5, struct.pack("<f", 2.0)), 2.0),
    "shape (3,) of one repeated value": (
        b"\x08\x01" + inner(2, inner(2, b"\x08\x03")) + inner(5, struct.pack("<f", 2.0)),
        None,
    ),
    "two values": (b"\x08\x01" + inner(5, struct.pack("<ff", 1, 2)), None),
    "text": (b"\x08\x07" + inner(8, b"hello"), None),
    "no value": (b"\x08\x01", None),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_of_one_number_is_a_scalar(tmp_path, kind):
    tensor, expected = TENSORS[kind]
    steps, notes = read(FORMAT, file(tmp_path, event(1, x=tensor, y=1.0)))
    assert plain(steps) == [(1, {"y": 1.0} | ({} if expected is None else {"x": expected}))]
    assert len(notes) == (expected is None)


def test_steps_rise_whatever_the_order_of_the_tags(tmp_path):
    by_tag = [event(n, a=n) for n in (1, 2, 10)] + [event(n, b=n) for n in (1, 10, 300)]
    steps, _ = read(FORMAT, file(tmp_path, *by_tag))
    assert plain(steps) == [(1, {"a": 1, "b": 1}), (2, {"a": 2}), (10, {"a": 10, "b": 10}), (300, {"b": 300})]


def test_a_tag_that_begins_later_does_not_move_the_first_steps(tmp_path):
    steps, _ = read(FORMAT, file(tmp_path, event(10, a=1), event(2, b=2), event(10, b=3)))
    assert plain(steps) == [(2, {"b": 2}), (10, {"a": 1, "b": 3})]


def test_a_rewind_is_another_attempt(tmp_path):
    events = [event(n, a=a) for n, a in ((1, 1), (2, 2), (3, 3), (2, 4), (3, 5), (4, 6))]
    expected = [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3}), (2, {"a": 4}), (3, {"a": 5}), (4, {"a": 6})]
    assert plain(read(FORMAT, file(tmp_path / "one", *events))[0]) == expected
    file(tmp_path / "two", *events[:3], name="events.out.tfevents.9.h.1.0")
    file(tmp_path / "two", *events[3:], name="events.out.tfevents.10.h.1.0")
    assert plain(read(FORMAT, tmp_path / "two")[0]) == expected


def test_writers_of_different_tags_are_merged_by_step(tmp_path):
    file(tmp_path, *(event(n, a=n) for n in (1, 2, 3)))
    file(tmp_path, *(event(n, b=n) for n in (2, 4)), name="events.out.tfevents.2.h.1.0")
    assert plain(read(FORMAT, tmp_path)[0]) == [(1, {"a": 1}), (2, {"a": 2, "b": 2}), (3, {"a": 3}), (4, {"b": 4})]


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(12, REAL.stat().st_size - 1))
def test_a_file_cut_anywhere_gives_no_wrong_number(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / REAL.name
    path.write_bytes(REAL.read_bytes()[:cut])
    whole = {s.step: {n: repr(v) for n, v in s.metrics.items()} for s in FORMAT.steps([REAL], Notes())}
    notes = Notes()
    try:
        for found in FORMAT.steps([path], notes):
            assert {n: repr(v) for n, v in found.metrics.items()}.items() <= whole[found.step].items()
    except Exception as error:
        assert "holds no scalar" in str(error)


def test_a_cut_record_and_damage_are_noted(tmp_path):
    path = file(tmp_path, event(1, a=1), event(2, a=2))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    steps, notes = read(FORMAT, path)
    assert plain(steps) == [(1, {"a": 1})] and notes == [
        f"The last record is cut off and is left out (first: {path.name})."
    ]
    at = len(VERSION) + len(event(1, a=1))
    path.write_bytes(data[:at] + b"\x07" + data[at + 1 :])
    steps, notes = read(FORMAT, path)
    assert plain(steps) == [(1, {"a": 1})] and notes == [
        f"An event file is damaged and is read up to there (first: byte {at} of {path.name})."
    ]
    path.write_bytes(VERSION + record(b"\x12\x7f") + event(1, a=1) + event(-1, a=1))
    steps, notes = read(FORMAT, path)
    assert plain(steps) == [(1, {"a": 1})] and [n.split(" (")[0] for n in notes] == [
        "A record is damaged and is left out",
        "A scalar of a step below 0 is left out",
    ]


def test_a_record_that_tells_a_huge_length_is_not_read(tmp_path):
    length = struct.pack("<Q", 1 << 60)
    path = file(tmp_path, event(1, a=1), length + masked(length) + b"x" * 100)
    steps, notes = read(FORMAT, path)
    assert plain(steps) == [(1, {"a": 1})] and notes[0].startswith("The last record is cut off")


def test_a_large_record_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("collectors.importers.tfevents._LARGEST", 500)
    steps, notes = read(FORMAT, file(tmp_path, record(b"\x22\xff\x07" + b"x" * 1023), event(1, a=1)))
    assert plain(steps) == [(1, {"a": 1})] and "64 MB" in notes[0]


def test_files_are_found_where_frameworks_put_them(tmp_path):
    written = file(tmp_path / "runs" / "Nov22_host", event(1, a=1))
    file(tmp_path / "runs" / "Nov22_host" / "1700000000.5", event(1, b=1))  # where add_hparams writes
    for path in (tmp_path, tmp_path / "runs", tmp_path / "runs" / "Nov22_host", written):
        assert FORMAT.find(path) == [written]
    assert FORMAT.find(tmp_path / "absent") == FORMAT.find(DATA / "verl") == []


def test_other_files_are_left_alone(tmp_path):
    for number, content in enumerate([b"", b"PAR1" * 9, VERSION[:11], b"\0" * 40]):
        (tmp_path / f"events.out.tfevents.{number}").write_bytes(content)
        assert FORMAT.find(tmp_path / f"events.out.tfevents.{number}") == []
    assert FORMAT.find(tmp_path) == []


def test_what_is_no_run_is_refused(tmp_path):
    two = [file(tmp_path / name, event(1, a=1)) for name in "ab"]
    assert FORMAT.find(tmp_path) == two
    refused(FORMAT, two, "event files of 2 runs: .*a, .*b. Give the folder of one")
    refused(FORMAT, [file(tmp_path / "c")], "holds no scalar")
    (tmp_path / "x").write_text("a text that is long enough")
    refused(FORMAT, [tmp_path / "x"], "is no event file")
    refused(FORMAT, [tmp_path / "absent"], "cannot be read")


def test_events_of_several_runs_beside_a_trainer_state_are_left_out_and_said(tmp_path):
    out = tmp_path / "out"
    for name, step in (("Nov22_a", 1), ("Nov23_b", 2)):
        file(out / "runs" / name, event(step, own=float(step)))
    (out / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": s, "loss": 0.5} for s in (1, 2)]}))
    done = import_run([out], tmp_path / "imported")
    assert (done.formats, done.steps) == (["trl-state"], 2)
    assert done.notes == [
        f"Left out are event files of 2 runs: {out / 'runs' / 'Nov22_a'}, {out / 'runs' / 'Nov23_b'}; give the folder "
        "of one of them as a further source."
    ]
    both = import_run([out / "trainer_state.json", out / "runs" / "Nov23_b"], tmp_path / "imported", name="both")
    assert (both.formats, both.unmapped, both.notes) == (["trl-state", "tensorboard"], ["own"], [])
    with pytest.raises(StoreError, match="event files of 2 runs: .*Nov22_a, .*Nov23_b. Give the folder of one"):
        import_run([out / "runs"], tmp_path / "imported")
