"""An S3 server of this process for tests: moto behind a door that counts, fails or changes requests."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any
from unittest import mock

import pytest
from moto.core import DEFAULT_ACCOUNT_ID, enable_iam_authentication
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

HOST = "127.0.0.1"
SECRET = "not-to-be-shown-to-anyone"
CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
EVERYTHING = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'


@dataclass(frozen=True)
class Request:
    """What a client asked for.

    Args:
        method: GET, PUT, …
        path: /bucket/key, not quoted.
        query: as sent.
    """

    method: str
    path: str
    query: str


@dataclass
class Server:
    """A running server.

    Args:
        port: where it listens.
        requests: all requests so far.
        before: called for each request before it is served; the HTTP status that it returns is answered instead.
    """

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    before: Callable[[Request], int | None] = lambda request: None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the server."""
        return {
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.port}",
        }

    def new_bucket(self) -> str:
        """The URL of a bucket that is empty."""
        name = f"runs-{uuid.uuid4().hex[:8]}"
        connection = HTTPConnection(HOST, self.port, timeout=30)
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
        connection.close()
        return f"s3://{name}"

    def put(self, url: str, data: bytes) -> None:
        """Make an object behind the back of every client."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self._backend.put_object(bucket, key, data)

    def keys(self, url: str) -> set[str]:
        """All keys of a bucket, as they are."""
        return set(self._backend.buckets[url.removeprefix("s3://").partition("/")[0]].keys)

    def asked(self, *methods: str) -> list[str]:
        """The paths that were asked for with one of these methods, oldest first."""
        return [request.path for request in self.requests if request.method in methods]

    @property
    def _backend(self) -> Any:
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


class _Quiet(MotoRequestHandler):
    def log(self, *_: Any) -> None:
        """One line per request would drown the tests' output."""


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """Serve, with the environment of this process and its children set to use it."""
    served = Server()
    moto = DomainDispatcherApplication(create_backend_app)

    def door(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"].encode("latin-1").decode()
        request = Request(environ["REQUEST_METHOD"], path, environ["QUERY_STRING"])
        served.requests.append(request)
        status = served.before(request)
        if status is None:
            return moto(environ, start_response)
        body = f"<Error><Code>{CODES[status]}</Code><Message>injected</Message></Error>".encode()
        start_response(f"{status} injected", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    http = make_server(HOST, 0, door, threaded=True, request_handler=_Quiet)
    served.port = http.port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    try:
        with mock.patch.dict(os.environ, others | served.environment, clear=True):
            yield served
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
        s3_backends.reset()


@contextlib.contextmanager
def bucket(folder: str = "run") -> Iterator[str]:
    """The URL of a folder in a new bucket, for as long as its server runs."""
    with server() as served:
        yield f"{served.new_bucket()}/{folder}"


@contextlib.contextmanager
def keys_checked() -> Iterator[dict[str, str]]:
    """Let the servers refuse whoever has no keys; the environment of one who has."""
    iam = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    iam.create_user("aws", "somebody")
    key = iam.create_access_key("somebody")
    iam.put_user_policy("somebody", "everything", EVERYTHING)
    try:
        with enable_iam_authentication():
            yield {"AWS_ACCESS_KEY_ID": key.access_key_id, "AWS_SECRET_ACCESS_KEY": key.secret_access_key}
    finally:
        iam_backends.reset()


def fails(call: Callable[..., Any], *arguments: Any, error: type[Exception] = OSError, **options: Any) -> str:
    """The one line that the call fails with; no secret is in it."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and SECRET not in text
    return text
