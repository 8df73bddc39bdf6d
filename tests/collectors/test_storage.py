"""A folder, a bucket and an fsspec file system do the same for a store."""

from __future__ import annotations

import os
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from collectors.storage import Storage, open_storage
from tests.collectors import s3

PLACES = ("folder", "s3", "fsspec")
NAMES = (
    "a b",
    "ü–日本",
    "#1",
    "what?",
    "100%",
    "%20",
    "a+b",
    "a&b=c;d",
    "'q' \"r\"",
    "<x>",
    "x.json.gz",
    "a,b:c@d~e!$()*",
)


@pytest.fixture(params=PLACES)
def storage(request, tmp_path):
    if request.param == "s3":
        with s3.bucket() as url:
            yield open_storage(url)
    elif request.param == "fsspec":
        yield open_storage(f"memory://{uuid.uuid4().hex}/run")
    else:
        yield open_storage(tmp_path / "run")


def put(storage: Storage, *names: str, data: bytes = b"data") -> None:
    for name in names:
        storage.write(name, data, fsync=False)


def test_what_was_written_is_read(storage):
    storage.write("tokens/hot/a.parquet", b"12345", fsync=True)
    assert storage.read("tokens/hot/a.parquet") == b"12345"
    assert storage.exists("tokens/hot/a.parquet")
    put(storage, "tokens/hot/a.parquet", data=b"other")
    assert storage.read("tokens/hot/a.parquet") == b"other"


@pytest.mark.parametrize(
    "data",
    [b"", bytearray(b"abc"), memoryview(b"abcdef")[2:], pa.py_buffer(b"abc"), np.arange(3, dtype=np.float64)],
    ids=lambda data: type(data).__name__,
)
def test_any_bytes_like_object_is_written(storage, data):
    storage.write("x/y", data, fsync=False)
    assert storage.read("x/y") == bytes(memoryview(data).cast("B"))
    assert storage.list("x") == {"y": memoryview(data).nbytes}


# below and above the size from which S3 gets an object in parts, and the size of a part
@pytest.mark.parametrize("size", [(5 << 20) - 1, 5 << 20, 10 << 20, 20_000_000])
def test_large_objects(storage, size):
    data = os.urandom(1 << 16) * (size >> 16) + bytes(size & 0xFFFF)
    storage.write("big", data, fsync=False)
    assert storage.read("big") == data
    assert storage.read_range("big", size - 7, 100) == data[-7:]
    assert storage.list("") == {"big": size}


@pytest.mark.parametrize(
    ("start", "length", "found"),
    [(0, 3, b"012"), (4, 100, b"456789"), (-4, 2, b"67"), (-100, 2, b"01"), (10, 5, b""), (99, 5, b""), (3, 0, b"")],
)
def test_a_range_is_what_the_file_has_of_it(storage, start, length, found):
    put(storage, "ten", data=b"0123456789")
    assert storage.read_range("ten", start, length) == found


def test_a_listing_has_the_files_directly_in_a_folder(storage):
    put(storage, "a/x", "a/b/y", "a/b/z.tmp", "ab/w", "v")
    assert storage.list("a") == {"x": 4}
    assert storage.list("a/b") == {"y": 4, "z.tmp": 4}
    assert storage.list("") == {"v": 4}
    assert storage.list("nothing") == storage.list("nothing/there") == {}
    assert storage.list("v") == {}
    assert dict(storage.walk()) == dict.fromkeys(("a/x", "a/b/y", "a/b/z.tmp", "ab/w", "v"), 4)


def test_a_run_that_is_not_there_is_empty(storage):
    assert storage.list("") == {}
    assert list(storage.walk()) == []
    assert not storage.exists("run.json")


def test_a_missing_file(storage):
    put(storage, "a/x")
    for missing in ("a/y", "a/x/y", "b/c", "y"):
        assert not storage.exists(missing)
    for missing in ("a/y", "b/c"):
        storage.delete(missing)
        storage.copy(missing, "a/z")
        with pytest.raises(FileNotFoundError, match=missing):
            storage.read(missing)
        with pytest.raises(FileNotFoundError, match=missing):
            storage.read_range(missing, 0, 1)
    assert not storage.exists("a")
    assert dict(storage.walk()) == {"a/x": 4}


def test_delete(storage):
    put(storage, "a/x", "a/y")
    storage.delete("a/x")
    assert storage.list("a") == {"y": 4}
    storage.delete("a/y")
    assert storage.list("a") == storage.list("") == dict(storage.walk()) == {}


def test_a_copy_outlives_the_file(storage):
    put(storage, "a/x")
    storage.copy("a/x", "new/folder/x")
    storage.copy("a/x", "new/folder/x")
    assert dict(storage.walk()) == {"a/x": 4, "new/folder/x": 4}
    storage.delete("a/x")
    assert storage.read("new/folder/x") == b"data"


def test_create_makes_a_file_once(storage):
    assert storage.create("attempts/a000", b"first")
    assert not storage.create("attempts/a000", b"second")
    assert storage.read("attempts/a000") == b"first"
    storage.delete("attempts/a000")
    assert storage.create("attempts/a000", b"third")


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_themselves(storage, name):
    put(storage, f"f/{name}", data=name.encode())
    assert storage.list("f") == {name: len(name.encode())}
    assert storage.exists(f"f/{name}")
    storage.copy(f"f/{name}", f"g {name}/{name}")
    storage.delete(f"f/{name}")
    assert storage.read(f"g {name}/{name}") == name.encode()
    assert storage.list(f"g {name}") == dict(storage.walk()).fromkeys([name], len(name.encode()))
    storage.delete(f"g {name}/{name}")
    assert list(storage.walk()) == []


def test_a_stamp_tells_what_came_or_went_or_nothing(storage):
    seen = {storage.stamp("a")}
    if seen == {None}:
        return
    for change in (lambda: put(storage, "a/x"), lambda: put(storage, "a/y"), lambda: storage.delete("a/x")):
        change()
        assert storage.stamp("a") not in seen
        seen.add(storage.stamp("a"))


def test_free_bytes(storage):
    assert (storage.free_bytes() or 1) > 0
    assert (storage.local is None) == (storage.free_bytes() is None)


def test_pyarrow_reads_from_a_location(storage):
    table = pa.table({"step": [1, 2, 3]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write("rollup/hot/a.parquet", sink.getvalue(), fsync=False)
    location = storage.location("rollup/hot/a.parquet")
    assert pq.read_table(location, filesystem=storage.filesystem).equals(table)
    assert pds.dataset([location], filesystem=storage.filesystem).to_table().equals(table)
