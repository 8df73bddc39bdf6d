"""What is particular to a bucket: its URL, its environment, and several writers at once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow.fs as pafs
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from collectors.bucket import BucketStorage
from collectors.storage import open_storage
from mhpo_core.errors import StoreError
from tests.collectors import s3
from tests.collectors.s3 import fails


@pytest.fixture
def server():
    with s3.server() as served:
        yield served


@pytest.fixture
def storage(server):
    opened = BucketStorage(f"{server.new_bucket()}/run")
    opened.write("run.json", b"{}", fsync=False)
    server.requests.clear()
    return opened


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    head = "import contextlib, os, sys, threading, time\nfrom collectors.storage import open_storage\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_url_is_kept_and_nothing_is_local(server):
    url = f"{server.new_bucket()}/Läufe 1/run#2"
    opened = open_storage(f"{url}/")
    assert (opened.url, opened.local, opened.stamp(""), opened.free_bytes()) == (url, None, None, None)
    assert opened.location("a/b") == f"{opened.location('')}/a/b" == f"{url.removeprefix('s3://')}/a/b"
    assert s3.SECRET not in repr(vars(opened))


def test_a_run_may_be_a_whole_bucket(server):
    url = server.new_bucket()
    opened = BucketStorage(url)
    opened.write("run.json", b"{}", fsync=False)
    opened.write("a/b", b"1", fsync=False)
    assert opened.list("") == {"run.json": 2}
    assert dict(opened.walk()) == {"run.json": 2, "a/b": 1}
    assert server.keys(url) == {"run.json", "a/b"}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://", "empty part"),
        ("s3:///run", "empty part"),
        ("s3://runs//run", "empty part"),
        ("s3://runs/../run", "a dot"),
        ("s3://KEY:hidden@runs/run", "credentials"),
        ("s3://runs/run?secret_key=hidden", "credentials"),
        ("abfs://KEY:hidden@runs/run", "credentials"),
        ("file:///tmp/run", "Mount it"),
        ("sftp://host/run", "Mount it"),
        ("S4://runs/run", "not known"),
        ("abfs://runs/run", "adlfs"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_in_one_line(url, why):
    text = fails(open_storage, url, error=StoreError)
    assert why in text and "hidden" not in text and "KEY" not in text.replace("AWS_ACCESS_KEY_ID", "")
    assert "is allowed" in text or "are allowed" in text


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://localhost", "http://", "http://key:hidden@localhost"])
def test_an_endpoint_that_is_no_address_is_refused(monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    text = fails(BucketStorage, "s3://runs/run", error=StoreError)
    assert text.startswith("open_run: AWS_ENDPOINT_URL") and "hidden" not in text


def test_the_endpoint_of_s3_goes_before_that_of_all_services(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"] + "/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    BucketStorage(f"{server.new_bucket()}/run").write("run.json", b"{}", fsync=False)
    assert server.asked("PUT")[-1].endswith("/run/run.json")


def test_the_region_is_asked_for_where_nothing_says_it(server, monkeypatch):
    monkeypatch.delenv("AWS_REGION")
    assert BucketStorage("s3://runs/run").filesystem.region == "us-east-1"  # most servers with an address do not care
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    asked = []
    monkeypatch.setattr(pafs, "resolve_s3_region", lambda bucket: asked.append(bucket) or "eu-west-1")
    assert BucketStorage("s3://runs/run").filesystem.region == "eu-west-1"
    assert asked == ["runs"]
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-2")
    assert BucketStorage("s3://runs/run").filesystem.region == "eu-west-2"


def test_tokens_and_certificates_are_used_and_waiting_is_bounded(server, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/ours.pem")
    options = BucketStorage("s3://runs/run").filesystem.__reduce__()[1][0]
    assert (options["session_token"], options["tls_ca_file_path"]) == ("token", "/etc/ours.pem")
    assert (options["connect_timeout"], options["request_timeout"]) == (3, 5)


def test_a_small_object_is_one_request_and_leaves_nothing_else(server, storage):
    storage.write("a/small", b"x" * ((5 << 20) - 1), fsync=True)
    assert [(r.method, r.query) for r in server.requests] == [("PUT", "")]
    storage.delete("a/small")
    assert server.keys(storage.url) == {"run/run.json", "run/a/"}  # pyarrow's marker of a folder
    assert dict(storage.walk()) == storage.list("") == {"run.json": 2}
    assert storage.list("a") == {}


def test_a_missing_bucket_is_no_empty_run(server):
    opened = BucketStorage("s3://runs-mistyped/run")
    for call in (lambda: opened.list(""), lambda: list(opened.walk())):
        assert "there is no bucket 'runs-mistyped'" in fails(call)
    assert "NO_SUCH_BUCKET" in fails(opened.write, "a", b"1", fsync=True)
    empty = BucketStorage(f"{server.new_bucket()}/run")
    assert empty.list("") == empty.list("a") == {}
    assert len(server.asked("HEAD")) == 3  # the third for the empty bucket, once


def test_a_listing_of_more_than_a_page(server, storage):
    names = {f"s{number:09d}.parquet" for number in range(2100)}
    for name in names:
        server.put(f"{storage.url}/rollup/hot/{name}", b"x")
    assert storage.list("rollup/hot") == dict.fromkeys(names, 1)
    assert len(list(storage.walk())) == 2101


WRITE_MANY = """
storage = open_storage(sys.argv[1])
for number in range(25):
    storage.write(f"hot/{sys.argv[2]}-{number}", f"{sys.argv[2]}-{number}".encode() * 9999, fsync=True)
    assert f"{sys.argv[2]}-{number}" in storage.list("hot")
"""


def test_writers_in_threads_and_processes_see_all_objects(storage):
    others = [python(WRITE_MANY, storage.url, name) for name in ("left", "right")]

    def write(number: int) -> None:
        storage.write(f"hot/here-{number}", f"here-{number}".encode() * 9999, fsync=True)
        assert storage.read(f"hot/here-{number}")[:5] == b"here-"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(50)))
    assert [(other.communicate(timeout=120)[1], other.returncode) for other in others] == [("", 0)] * 2
    found = storage.list("hot")
    assert len(found) == 100
    for name in found:
        assert storage.read(f"hot/{name}") == name.encode() * 9999


def test_who_is_overwritten_did_not_create(server, storage):
    def other_writer(request):
        if request.method == "GET" and request.path.endswith("/attempts/a"):
            server.put(f"{storage.url}/attempts/a", b"theirs")

    server.before = other_writer
    assert not storage.create("attempts/a", b"mine!!")
    assert storage.read("attempts/a") == b"theirs"


ENDINGS = {
    "a thread that still writes": """
def write():
    with contextlib.suppress(OSError):
        while True:
            storage.write("big", bytes(12 << 20), fsync=True)
threading.Thread(target=write, daemon=True).start()
time.sleep(0.3)
""",
    "a last write": "import atexit; atexit.register(storage.write, 'last', b'1', fsync=True)",
    "a fork": """
child = os.fork()
storage.write(f"forked-{child == 0}", bytes(6 << 20), fsync=True)
if child:
    assert os.waitpid(child, 0)[1] == 0
""",
}


def test_an_interpreter_ends_in_silence(storage):
    opening = "storage = open_storage(sys.argv[1])\nstorage.write('a', b'1', fsync=True)\n"
    children = {name: python(opening + code, f"{storage.url}/{name}") for name, code in ENDINGS.items()}
    ended = {name: (*child.communicate(timeout=120), child.returncode) for name, child in children.items()}
    assert ended == dict.fromkeys(ENDINGS, ("", "", 0))
    assert storage.list("a last write") == {"a": 1, "last": 1}
    assert storage.list("a fork") == {"a": 1, "forked-True": 6 << 20, "forked-False": 6 << 20}


class Remembering(MemoryFileSystem):
    """Lists a folder once and answers from that, as the fsspec clients of object stores do."""

    protocol = "remembering"
    remembered: dict = {}

    def find(self, path, **options):
        if path not in self.remembered:
            self.remembered[path] = super().find(path, **options)
        return self.remembered[path]

    def info(self, path, **options):
        listing = self.remembered.get(path.rpartition("/")[0])
        if listing is not None and path not in listing:
            raise FileNotFoundError(path)
        return super().info(path, **options)

    isfile = AbstractFileSystem.isfile  # by info

    def invalidate_cache(self, path=None):
        self.remembered.clear()


@pytest.mark.parametrize("look", ["list", "walk", "exists", "read"])
def test_what_another_process_wrote_is_seen_through_fsspec(look):
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    ours = BucketStorage(f"remembering://runs/{look}")
    ours.write("a", b"1", fsync=True)
    assert ours.list("") == {"a": 1}
    MemoryFileSystem().pipe_file(ours.location("b"), b"2")
    assert {
        "list": lambda: ours.list("") == {"a": 1, "b": 1},
        "walk": lambda: dict(ours.walk()) == {"a": 1, "b": 1},
        "exists": lambda: ours.exists("b"),
        "read": lambda: ours.read("b") == b"2",
    }[look]()


def test_a_pattern_in_a_name_deletes_only_its_own_file():
    ours = BucketStorage("memory://patterns/run")
    for name in ("ab", "a*"):
        ours.write(name, b"1", fsync=True)
    ours.delete("a*")
    assert ours.list("") == {"ab": 1}
