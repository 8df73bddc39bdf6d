"""A run in a bucket of S3, of anything that speaks its protocol, or of another object store.

Credentials, endpoint and region come from the environment (the variables of the AWS tools), never from the URL.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from collectors.bucket_clients import (
    ATTEMPTS,
    FsspecHandler,
    endpoint,
    fsspec_client,
    google_client,
    one_line,
    s3_client,
    split_url,
)

# S3 takes no smaller part, so pyarrow sends anything below in one request
SMALLEST_PART = 5 << 20


class BucketStorage:
    """A run under a prefix of a bucket.

    Objects appear whole. Two things differ from a folder: `create` does not keep two writers apart that are at it in
    the same moment, and `copy` takes its place a second time. An object whose upload failed is not there, unless only
    the answer was lost: then it is there whole. Objects of 5 MiB and more are sent in parts; those of a failed upload
    stay in the bucket, invisible but paid for, until one of its lifecycle rules aborts incomplete uploads.

    A request that fails is sent three times; an endpoint that accepts connections and then says nothing holds a call
    for about half a minute, any other dead endpoint for about ten seconds. Every method raises OSError.

    Raises:
        StoreError: the URL is not that of an object store, or has credentials in it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.local: Path | None = None
        scheme, self._base = split_url(self.url)
        self._scheme = {"gcs": "gs"}.get(scheme, scheme)
        self._bucket = self._base.partition("/")[0]
        self._fsspec: Any = None
        self._bucket_seen = False
        if self._scheme == "s3":
            endpoint()
        elif self._scheme != "gs":
            self._fsspec, self._base = fsspec_client(self.url)

    @property
    def filesystem(self) -> Any:
        with self._errors(""):
            return self._filesystem

    def location(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    def list(self, folder: str) -> dict[str, int]:
        with self._errors(folder):
            return {info.base_name: info.size for info in self._files(folder, recursive=False)}

    def walk(self) -> Iterator[tuple[str, int]]:
        with self._errors(""):
            found = self._files("", recursive=True)
        start = len(self._base.strip("/")) + 1
        for info in found:
            yield info.path.strip("/")[start:], info.size

    def stamp(self, folder: str) -> int | None:
        return None

    def exists(self, name: str) -> bool:
        with self._errors(name):
            return self._is_file(name)

    def read(self, name: str) -> bytes:
        return self._read(name, 0, None)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        return self._read(name, start, length)

    def write(self, name: str, data: Any, *, fsync: bool) -> None:
        buffer = pa.py_buffer(data)
        with self._errors(name):
            if self._fsspec is not None:
                # its files commit what they have when closed after a failure
                self._fsspec.pipe_file(self.location(name), buffer.to_pybytes())
                return
            filesystem = self._filesystem if buffer.size < SMALLEST_PART else self._in_parts
            with filesystem.open_output_stream(self.location(name), compression=None) as stream:
                stream.write(buffer)

    def create(self, name: str, data: bytes) -> bool:
        """Make a file unless there is one of that name; True if it has this call's bytes afterwards.

        pyarrow has no conditional request, so this looks, writes and looks again. Of two calls with different bytes
        at least one returns True; both do if one looks before and writes after the other's whole call.
        """
        if self.exists(name):
            return False
        self.write(name, data, fsync=True)
        try:
            return self.read(name) == data
        except FileNotFoundError:
            return False

    def copy(self, name: str, target: str) -> None:
        with self._errors(name):
            try:
                self._filesystem.copy_file(self.location(name), self.location(target))
            except Exception:
                # the error of a missing object is not FileNotFoundError here
                if self._is_file(name):
                    raise

    def delete(self, name: str) -> None:
        with self._errors(name), contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self.location(name))

    def free_bytes(self) -> int | None:
        return None

    @cached_property
    def _filesystem(self) -> Any:
        # made at first use: it may have to ask the network for the region
        if self._fsspec is not None:
            return pafs.PyFileSystem(FsspecHandler(self._fsspec))
        if self._scheme == "gs":
            return google_client()
        return s3_client(self._bucket, one_request=True)

    @cached_property
    def _in_parts(self) -> Any:
        return s3_client(self._bucket, one_request=False) if self._scheme == "s3" else self._filesystem

    def _read(self, name: str, start: int, length: int | None) -> bytes:
        with self._errors(name):
            for attempt in range(1, ATTEMPTS):
                try:
                    return self._read_once(name, start, length)
                except OSError as error:
                    # the answer of a busy server does not fit where few bytes should go, so pyarrow gives up
                    if "response stream" not in str(error):
                        raise
                time.sleep(0.1 * 4**attempt)
            return self._read_once(name, start, length)

    def _read_once(self, name: str, start: int, length: int | None) -> bytes:
        with self._filesystem.open_input_file(self.location(name)) as file:
            size = file.size()
            begin = min(size, start) if start >= 0 else max(0, size + start)
            data: bytes = file.read_at(size - begin if length is None else length, begin)
            return data

    def _files(self, folder: str, *, recursive: bool) -> Sequence[Any]:
        selector = pafs.FileSelector(self.location(folder), recursive=recursive, allow_not_found=True)
        try:
            found = self._filesystem.get_file_info(selector)
        except NotADirectoryError:
            found = []
        if not found and self._scheme == "s3":
            self._see_bucket()
        # pyarrow leaves an empty object "folder/" where it deleted; it says that this is a folder
        return [info for info in found if info.type == pafs.FileType.File]

    def _see_bucket(self) -> None:
        """A listing of a bucket that does not exist is empty too: a typing error must not look like an empty run."""
        if not self._bucket_seen and self._filesystem.get_file_info(self._bucket).type == pafs.FileType.NotFound:
            raise OSError(f"there is no bucket {self._bucket!r}. Create it, or check the URL and AWS_ENDPOINT_URL.")
        self._bucket_seen = True

    def _is_file(self, name: str) -> bool:
        found: bool = self._filesystem.get_file_info(self.location(name)).type == pafs.FileType.File
        return found

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Whatever a client library raises, as one line of OSError."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except MemoryError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "No such object", where) from None
        except Exception as error:
            raise OSError(f"{where}: {one_line(error)}") from None
