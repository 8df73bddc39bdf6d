"""A bucket that refuses, breaks or is silent costs an OSError of one line, soon, and leaves nothing half."""

from __future__ import annotations

import errno
import socket
import time

import pytest

from collectors import bucket_clients
from collectors.bucket import BucketStorage
from tests.collectors import s3
from tests.collectors.s3 import fails

LARGE = b"x" * (12 << 20)  # two parts


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


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize(
    ("data", "which"), [(b"small", "PUT"), (LARGE, "PUT"), (LARGE, "POST")], ids=["small", "part", "beginning"]
)
def test_a_failed_upload_leaves_nothing_visible(server, storage, data, status, which):
    # all attempts of one request, so that whatever pyarrow does after its failure would succeed
    attempts = {403: 1, 500: 3}[status]
    failed = []

    def refuse(request):
        if request.method == which and "partNumber=2" not in request.query and len(failed) < attempts:
            failed.append(request)
            return status
        return None

    server.before = refuse
    text = fails(storage.write, "a/b", data, fsync=True)
    assert text.startswith(f"{storage.url}/a/b: ") and len(failed) == attempts
    assert storage.list("a") == {} and server.keys(storage.url) == {"run/run.json"}
    storage.write("a/b", data, fsync=True)
    assert storage.read("a/b") == data


def test_a_failed_completion_of_an_upload_leaves_nothing_visible(server, storage):
    server.before = lambda request: 403 if request.method == "POST" and "uploadId" in request.query else None
    fails(storage.write, "a/b", LARGE, fsync=True)
    assert not storage.exists("a/b")


def test_a_server_that_recovers_is_asked_again(server, storage):
    for method, call in {
        "PUT": lambda: storage.write("a", b"1", fsync=True),
        "GET": lambda: storage.read("a"),
        "HEAD": lambda: storage.exists("a"),
        "DELETE": lambda: storage.delete("a"),
    }.items():
        statuses = [503 if method == "PUT" else 500]
        server.before = lambda r, m=method, s=statuses: s.pop() if s and r.method == m else None
        call()
        assert statuses == []


def test_errors_are_one_line_of_oserror_from_every_method(server, storage):
    server.before = lambda request: 403
    calls = {
        "list": ("a",), "exists": ("a",), "read": ("a",), "read_range": ("a", 0, 1), "create": ("a", b""),
        "copy": ("a", "b"), "delete": ("a",),
    }  # fmt: skip
    for method, arguments in calls.items():
        assert fails(getattr(storage, method), *arguments).startswith(f"{storage.url}/a: ")
    assert fails(lambda: list(storage.walk())).startswith(f"{storage.url}: ")
    assert fails(storage.write, "a", b"", fsync=True).startswith(f"{storage.url}/a: ")


def test_a_missing_object_has_its_errno(storage):
    with pytest.raises(FileNotFoundError) as caught:
        storage.read("a")
    assert caught.value.errno == errno.ENOENT and caught.value.filename == f"{storage.url}/a"


def test_credentials_are_those_of_the_environment(server, monkeypatch):
    url = server.new_bucket()
    with s3.keys_checked() as keys:
        for name, value in s3.Server().environment.items() | {("AWS_SESSION_TOKEN", "hidden-token")}:
            if name != "AWS_ENDPOINT_URL":
                monkeypatch.setenv(name, value)
        opened = BucketStorage(f"{url}/run")
        for call in (lambda: opened.write("a", b"1", fsync=True), lambda: opened.read("a"), lambda: opened.list("")):
            assert "hidden" not in fails(call)
        monkeypatch.delenv("AWS_SESSION_TOKEN")
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        BucketStorage(f"{url}/run").write("a", b"1", fsync=True)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        assert "wrong-secret" not in fails(BucketStorage(f"{url}/run").write, "a", b"1", fsync=True)


def test_a_secret_that_a_server_repeats_is_not_shown(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    with (
        pytest.raises(OSError, match=r"^s3://runs/run/a: no \*\*\* here$"),
        BucketStorage("s3://runs/run")._errors("a"),
    ):
        raise ValueError("no\nhidden  here")


@pytest.mark.parametrize("kind", ["refused", "unreachable", "unknown host", "silent"])
def test_a_dead_endpoint_fails_within_seconds(monkeypatch, kind):
    monkeypatch.setattr(bucket_clients, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(bucket_clients, "SILENT_SECONDS", 1)
    monkeypatch.setattr(bucket_clients, "ATTEMPTS", 2)
    with socket.socket() as held, socket.socket() as first, socket.socket() as second:
        held.bind((s3.HOST, 0))
        address = "no-such-host.invalid" if kind == "unknown host" else f"{s3.HOST}:{held.getsockname()[1]}"
        if kind == "silent":
            held.listen()
        if kind == "unreachable":  # its queue is full, so that it does not answer who knocks
            held.listen(0)
            for knock in (first, second):
                knock.setblocking(False)
                knock.connect_ex(held.getsockname())
        for name, value in (s3.Server().environment | {"AWS_ENDPOINT_URL": f"http://{address}"}).items():
            monkeypatch.setenv(name, value)
        opened = BucketStorage("s3://runs/run")
        start = time.monotonic()
        assert fails(opened.list, "a").startswith("s3://runs/run/a: ")
        if kind != "silent":
            fails(opened.write, "a", b"1", fsync=True)
        assert time.monotonic() - start < 15


def test_a_dead_google_fails_within_seconds(monkeypatch):
    monkeypatch.setattr(bucket_clients, "GOOGLE_SECONDS", 1)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    opened = BucketStorage("gs://runs/run")
    options = opened.filesystem.__reduce__()[1][0]
    assert (options["scheme"], options["endpoint_override"]) == ("http", "127.0.0.1:9")
    start = time.monotonic()
    assert fails(opened.list, "a").startswith("gs://runs/run/a: ")
    assert time.monotonic() - start < 15
