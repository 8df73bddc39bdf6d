"""Where a run lies: the few operations that a store needs of a folder or of a bucket.

Names are relative to the run and use "/". A file appears under its name whole or not at all, and is never changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs

from mhpo_core.errors import StoreError

TEMPORARY = ".tmp"


class Storage(Protocol):
    """A run's files.

    Args:
        url: what a user calls it: a path, or s3://bucket/folder.
        local: the folder where there is one; None on a bucket.
    """

    url: str
    local: Path | None

    @property
    def filesystem(self) -> Any:
        """The pyarrow file system that `location` belongs to."""

    def location(self, name: str) -> str:
        """Where the file lies in `filesystem`."""

    def list(self, folder: str) -> dict[str, int]:
        """File name → bytes of the files directly in a folder, temporary ones too; empty where it does not exist."""

    def walk(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every file of the run."""

    def stamp(self, folder: str) -> int | None:
        """A number that changes when a file comes or goes; None where only listing tells."""

    def exists(self, name: str) -> bool:
        """True if the file is there."""

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError where it is gone."""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Bytes of a file from `start`, counted from the end if negative; fewer where the file ends."""

    def write(self, name: str, data: Any, *, fsync: bool) -> None:
        """Make a file of any bytes-like object; afterwards it is there whole, or OSError was raised and it is not.

        Args:
            fsync: reach the disk, file and folder, before returning. A bucket always does.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Make a file unless there is one of that name; True if this call made it."""

    def copy(self, name: str, target: str) -> None:
        """Give a file a second name; nothing happens where it is gone. On a disk it takes no second place."""

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where it is gone."""

    def free_bytes(self) -> int | None:
        """Space left for new files; None where nobody knows."""


class LocalStorage:
    """A run in a folder of this machine or of a network file system."""

    def __init__(self, folder: Path) -> None:
        # a training script may change its working directory later
        self.folder = folder.absolute()
        self.local: Path | None = self.folder
        self.url = str(folder)
        self._made: set[str] = set()

    @property
    def filesystem(self) -> Any:
        return pafs.LocalFileSystem()

    def location(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def list(self, folder: str) -> dict[str, int]:
        found = {}
        try:
            with os.scandir(self.location(folder)) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # gone since the listing
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            pass
        return found

    def walk(self) -> Iterator[tuple[str, int]]:
        for root, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(root, name)
                with contextlib.suppress(FileNotFoundError):
                    yield os.path.relpath(path, self.folder), os.lstat(path).st_size

    def stamp(self, folder: str) -> int | None:
        try:
            return os.stat(self.location(folder)).st_mtime_ns
        except FileNotFoundError:
            return 0

    def exists(self, name: str) -> bool:
        return os.path.isfile(self.location(name))

    def read(self, name: str) -> bytes:
        return Path(self.location(name)).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        with open(self.location(name), "rb") as file:
            if start < 0:
                start = max(0, file.seek(0, os.SEEK_END) + start)
            file.seek(start)
            return file.read(length)

    def write(self, name: str, data: Any, *, fsync: bool) -> None:
        self._make_folder(name)
        path = self.location(name)
        temporary = f"{path}.{os.getpid()}{TEMPORARY}"
        try:
            with open(temporary, "wb", buffering=0) as file:
                _write_all(file, memoryview(data))
                if fsync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if fsync:
            _fsync_folder(os.path.dirname(path))

    def create(self, name: str, data: bytes) -> bool:
        self._make_folder(name)
        path = self.location(name)
        temporary = f"{path}.{os.getpid()}{TEMPORARY}"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links: two processes at the same moment could both win
                if os.path.exists(path):
                    return False
                os.replace(temporary, path)
            return True
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def copy(self, name: str, target: str) -> None:
        self._make_folder(target)
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            try:
                os.link(self.location(name), self.location(target))
            except OSError as error:  # a file system without hard links
                if isinstance(error, FileNotFoundError | FileExistsError):
                    raise
                self.write(target, self.read(name), fsync=True)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.location(name))

    def free_bytes(self) -> int | None:
        place = self.folder
        while not place.exists():
            place = place.parent
        found = os.statvfs(place)
        return found.f_bavail * found.f_frsize

    def _make_folder(self, name: str) -> None:
        folder = os.path.dirname(name)
        if folder not in self._made:
            os.makedirs(self.location(folder), exist_ok=True)
            self._made.add(folder)


def _write_all(file: Any, data: memoryview) -> None:
    data = data.cast("B")
    while data:
        data = data[file.write(data) :]


def _fsync_folder(folder: str) -> None:
    """Make the new name durable; some file systems cannot open a folder for that and need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_storage(place: str | Path) -> Storage:
    """The storage of a path, or of a URL of an object store such as s3://bucket/folder.

    Raises:
        StoreError: the URL names an object store that cannot be used.
    """
    if "://" in str(place):
        from collectors.bucket import BucketStorage

        return BucketStorage(str(place))
    path = Path(place)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise StoreError(f"open_run: {str(path)!r} is not UTF-8, DuckDB cannot open its files. Rename it.") from None
    return LocalStorage(path)
