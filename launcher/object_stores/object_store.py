"""The objects below one URL: read, written, listed and deleted in bounded attempts."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from launcher.errors import StoreError
from launcher.object_stores.locations import extra_of, open_file_system, shown_url
from launcher.object_stores.requests import RequestError, attempt
from launcher.regular_file import open_regular

_BLOCK_BYTES = 16 << 20
"""Number of bytes of one request to read; an interrupted download is continued at a block."""

_PART_BYTES = 32 << 20
"""Largest object that is written in one request."""

_PART = ".being-written"
"""End of the name of a file until it is complete, where a write is not atomic."""

_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "memory"})
"""Protocols of stores in which an object appears when all of it has been written."""

_TIMES = ("LastModified", "updated", "last_modified", "mtime", "created")
"""What file systems call the time at which an object was written."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """An object in a listing."""

    num_bytes: int
    """Its size."""

    modified: float | None
    """When it was written by the clock of the store, in seconds since 1970; None if unknown."""


class ObjectStore:
    """The objects whose URLs begin with one URL; names are what follows it.

    Args:
        url: The URL, such as `s3://bucket/runs/mine`.
        attempts: Largest number of attempts of a request.
        timeout_seconds: Time without any data after which a request fails, with S3 and over HTTP.
    """

    def __init__(self, url: str, *, attempts: int = 5, timeout_seconds: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self._attempts, self._timeout_seconds = attempts, timeout_seconds

    @property
    def shown(self) -> str:
        """The URL for messages."""
        return shown_url(self.url)

    def read(self, name: str, max_bytes: int = 1 << 28) -> bytes:
        """Return the content of an object.

        Raises:
            StoreError: It cannot be read, or is larger than `max_bytes`.
        """
        info = self._request("read", name, lambda system, path: system.info(path))
        num_bytes = int(info.get("size") or 0)
        if num_bytes > max_bytes:
            raise StoreError(f"{self.shown}/{name} has {num_bytes:,} bytes, which is too large.")
        content: bytes = self._request("read", name, lambda system, path: system.cat_file(path))
        return content

    def download(self, name: str, num_bytes: int, path: Path) -> str:
        """Write the first bytes of an object to a new file, and return their SHA-256.

        Args:
            name: The object.
            num_bytes: The number of bytes.
            path: The file, in a folder that exists.

        Raises:
            StoreError: The object cannot be read, or is shorter.
            OSError: The file exists, or cannot be written.
        """
        digest = hashlib.sha256()
        with path.open("xb") as file:
            for start in range(0, num_bytes, _BLOCK_BYTES):
                content = self.read_range(name, start, min(start + _BLOCK_BYTES, num_bytes))
                digest.update(content)
                file.write(content)
        return digest.hexdigest()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes of an object from `start` up to, but not including, `stop`.

        Raises:
            StoreError: They cannot be read.
        """
        if start == stop:
            return b""

        def read(system: Any, path: str) -> bytes:
            content: bytes = system.cat_file(path, start=start, end=stop)
            if len(content) != stop - start:
                raise OSError(f"{len(content):,} of {stop - start:,} bytes arrived")
            return content

        return self._request("read", name, read)

    def write(self, name: str, content: bytes) -> None:
        """Write an object, in place of one that has its name.

        Raises:
            StoreError: It cannot be written.
        """
        self._write(name, lambda system, path: system.pipe_file(path, content))

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless one has its name; return whether it was written.

        S3 and Google Cloud Storage decide this themselves. With other stores two processes can
        both succeed if they call this at the same moment.

        Raises:
            StoreError: It cannot be written.
        """

        def write(system: Any, path: str) -> None:
            if not _is_atomic(system):
                system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.pipe_file(path, content, mode="create")

        try:
            self._request("written", name, write)
        except StoreError as error:
            if error.kind != "exists":
                raise
            # An attempt whose answer was lost may have written it.
            return self.read(name) == content
        return True

    def upload(self, name: str, path: Path, num_bytes: int) -> None:
        """Write the first bytes of a file to an object.

        Args:
            name: The object.
            path: The file. More may be appended to it meanwhile.
            num_bytes: The number of bytes.

        Raises:
            StoreError: The object cannot be written.
            OSError: The file cannot be read, or is shorter.
        """
        if num_bytes <= _PART_BYTES:
            self.write(name, _first_bytes(path, num_bytes))
        elif path.suffix == ".safetensors":  # never appended to, and sent in several streams
            self._write(name, lambda system, target: system.put_file(str(path), target))
        else:
            self._write(name, lambda system, target: _copy(path, num_bytes, system, target))

    def delete(self, name: str) -> None:
        """Delete an object, which need not exist.

        Raises:
            StoreError: It cannot be deleted.
        """
        with contextlib.suppress(_MissingError):
            self._request("deleted", name, lambda system, path: system.rm_file(path))

    def list(self, below: str = "") -> dict[str, StoredObject]:
        """Return the objects whose names begin with a name and a slash, or all, by name.

        Raises:
            StoreError: The store denied access or did not answer.
        """
        prefix = f"{below}/" if below else ""

        def find(system: Any, path: str) -> dict[str, StoredObject]:
            system.invalidate_cache()
            found = system.find(path, detail=True)
            start = len(path.rstrip("/")) + 1
            return {
                prefix + name[start:]: StoredObject(
                    num_bytes=int(info.get("size") or 0), modified=_modified(info)
                )
                for name, info in found.items()
                if len(name) > start and not name.endswith(_PART)
            }

        try:
            return self._request("listed", below, find)
        except _MissingError:
            return {}

    def modified(self, name: str) -> float | None:
        """Return when an object was written by the clock of the store; None if it is unknown.

        Raises:
            StoreError: There is no such object, or the store did not answer.
        """

        def look(system: Any, path: str) -> float | None:
            system.invalidate_cache()
            return _modified(system.info(path))

        return self._request("read", name, look)

    def _write(self, name: str, write: Callable[[Any, str], object]) -> None:
        def request(system: Any, path: str) -> None:
            if _is_atomic(system):
                write(system, path)
                return
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(system, path + _PART)
            system.mv(path + _PART, path)

        self._request("written", name, request)

    def _request(self, verb: str, name: str, call: Callable[[Any, str], _T]) -> _T:
        url = f"{self.url}/{name}" if name else self.url

        def request() -> _T:
            system, path = open_file_system(self.url, {}, self._timeout_seconds)
            if hasattr(system, "retries"):  # of s3fs, beside those of `attempt`
                system.retries = 1
            return call(system, f"{path.rstrip('/')}/{name}" if name else path)

        try:
            return attempt(request, self._attempts)
        except RequestError as error:
            is_about_all = error.kind in ("package", "url") or name.startswith(".")
            _raise(self.url if is_about_all else url, verb, error, self._attempts)


def _is_atomic(system: Any) -> bool:
    """Return whether an object of a file system appears when all of it has been written."""
    names = system.protocol
    return not _ATOMIC.isdisjoint((names,) if isinstance(names, str) else names)


class _MissingError(StoreError):
    """There is no such object."""


def _raise(url: str, verb: str, error: RequestError, attempts: int) -> NoReturn:
    """Raise the error for a request that failed, which says what to do."""
    shown, reason = shown_url(url), error.reason
    if error.kind == "missing":
        what = "no object" if verb == "read" else "no bucket or folder for"
        raise _MissingError(f"There is {what} {shown} ({reason}). Check the URL.", "missing")
    text = {
        "package": f"{shown} needs a package that is not installed: {reason}. Install it with "
        f"`pip install 'gpu-launcher[{extra_of(url)}]'`.",
        "url": f"{shown} cannot be used: {reason}. Give a URL such as s3://bucket/runs/mine, "
        "gs://bucket/runs/mine or file:///shared/runs/mine.",
        "denied": f"{shown} cannot be {verb}: the store denied access ({reason}). Check the "
        "credentials of this machine: they must allow to list, read, write and delete objects.",
        "exists": f"{shown} exists already.",
        "unanswered": f"{shown} could not be {verb} in {attempts} attempts. The last one failed "
        f"with {reason}. Check the URL, the store and the network.",
    }[error.kind]
    raise StoreError(text, error.kind)


def _first_bytes(path: Path, num_bytes: int) -> bytes:
    with io.BufferedReader(open_regular(path)) as file:
        content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise OSError(f"{path} has become shorter while it was read")
    return content


def _copy(path: Path, num_bytes: int, system: Any, target: str) -> None:
    with open_regular(path) as source, system.open(target, "wb", block_size=_PART_BYTES) as file:
        while num_bytes > 0 and (block := source.read(min(_PART_BYTES, num_bytes))):
            file.write(block)
            num_bytes -= len(block)
        if num_bytes:
            raise OSError(f"{path} has become shorter while it was read")


def _modified(info: dict[str, Any]) -> float | None:
    """Return the time in the description of an object, in seconds since 1970."""
    value = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = dt.datetime.fromisoformat(value)
    if isinstance(value, dt.datetime):
        return value.timestamp()
    return float(value) if isinstance(value, (int, float)) else None
