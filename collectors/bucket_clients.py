"""The client of an object store, as the environment says it should be; a URL names a bucket and a folder only."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from mhpo_core.errors import StoreError

CONNECT_SECONDS = 3.0
SILENT_SECONDS = 5.0  # a request whose server says nothing for longer is given up
ATTEMPTS = 3
GOOGLE_SECONDS = 10  # for all attempts of one request

# a reader would see their files grow, and a mount does all that a bucket is for
FILE_SYSTEMS = frozenset(
    ("file", "local", "asynclocal", "ftp", "sftp", "ssh", "smb", "hdfs", "arrow_hdfs", "webhdfs", "dbfs")
)
ALLOWED = "s3://bucket/folder, gs://bucket/folder or the URL of another object store that fsspec knows is allowed"


def split_url(url: str) -> tuple[str, str]:
    """Scheme, and bucket with folder.

    Raises:
        StoreError: there are credentials or settings in it, it has no bucket, or it is no object store.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise StoreError(
            f"open_run: a {scheme}:// URL has credentials or settings in it, a bucket and a folder are allowed. "
            "Set them in the environment, like AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL."
        )
    if scheme in FILE_SYSTEMS:
        raise StoreError(f"open_run: {url!r} is not in an object store, {ALLOWED}. Mount it and give its path.")
    if any(part in ("", ".", "..") for part in rest.split("/")):
        raise StoreError(f"open_run: {url!r} has an empty part or a dot as one, {ALLOWED}. Correct the URL.")
    return scheme, rest


def endpoint() -> tuple[str, str | None]:
    """Scheme and address of the S3 server; no address for that of AWS.

    Raises:
        StoreError: the environment names something else than an address.
    """
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not given:
        return "https", None
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
        raise StoreError(
            "open_run: AWS_ENDPOINT_URL is no address, http://host:port or https://host:port is allowed. Correct it."
        )
    return parts.scheme, parts.netloc + parts.path


def s3_client(bucket: str, *, one_request: bool) -> Any:
    """A client of S3.

    Args:
        bucket: asked for its region where the environment names none.
        one_request: send a small object in one request, when its stream is closed. A large one must not go through
            such a stream: closing it after a failure puts what it has under the object's name.

    Raises:
        OSError: the region is not known.
    """
    scheme, address = endpoint()
    setting = os.environ.get
    region = setting("AWS_REGION") or setting("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if address else pafs.resolve_s3_region(bucket)
    key, secret = setting("AWS_ACCESS_KEY_ID"), setting("AWS_SECRET_ACCESS_KEY")
    # without a pair of keys pyarrow asks what the AWS tools ask: profiles, roles, the machine's metadata
    keys = {"access_key": key, "secret_key": secret, "session_token": setting("AWS_SESSION_TOKEN")}
    return pafs.S3FileSystem(
        **(keys if key and secret else {}),
        region=region,
        scheme=scheme,
        endpoint_override=address,
        tls_ca_file_path=setting("AWS_CA_BUNDLE"),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENT_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=one_request,
    )


def google_client() -> Any:
    """A client of Google Cloud Storage, or of the emulator that STORAGE_EMULATOR_HOST names."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    options: dict[str, Any] = {"retry_time_limit": timedelta(seconds=GOOGLE_SECONDS)}
    if emulator:
        parts = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
        options |= {"anonymous": True, "scheme": parts.scheme, "endpoint_override": parts.netloc}
    return pafs.GcsFileSystem(**options)


def fsspec_client(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        StoreError: fsspec does not know it, or a package or a setting is missing.
    """
    import fsspec  # type: ignore[import-untyped]

    try:
        filesystem, base = fsspec.core.url_to_fs(url)
    except Exception as error:
        raise StoreError(f"open_run: {url!r}: {one_line(error)}. {ALLOWED}. Correct the URL.") from None
    return filesystem, base


class FsspecHandler(pafs.FSSpecHandler):  # type: ignore[misc]
    """fsspec remembers listings, which hides what others write, and its `copy` and `rm` take * and ? for patterns."""

    def get_file_info(self, paths: Any) -> Any:
        self.fs.invalidate_cache()
        return super().get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        self.fs.invalidate_cache()
        return super().get_file_info_selector(selector)

    def open_input_file(self, path: str) -> Any:
        self.fs.invalidate_cache()
        return super().open_input_file(path)

    def copy_file(self, src: str, dest: str) -> None:
        self.fs.cp_file(src, dest)

    def delete_file(self, path: str) -> None:
        self.fs.rm_file(path)


def one_line(error: Exception) -> str:
    """What an error says, in one line and without a secret."""
    text = " ".join(str(error).split()) or type(error).__name__
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        text = text.replace(os.environ.get(name) or "\0", "***")
    return text[:500]
