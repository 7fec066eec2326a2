"""Files at URLs, read through fsspec and a bounded cache on the local disk.

All processes of a node share the cache. A file is downloaded once, under a lock, into a temporary
file that is renamed when it is complete; the least recently used files are removed to make room.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from launcher.errors import RecipeError, SampleError
from launcher.object_stores.locations import extra_of, open_file_system, shown_url
from launcher.object_stores.requests import RequestError, attempt
from launcher.printable import error_line
from launcher.quantities import size
from launcher.runs.cache import cache_folder

_BLOCK_BYTES = 16 << 20
"""Number of bytes of one request; an interrupted download is continued at a block."""

_TAGS = ("ETag", "etag", "md5Hash", "generation", "Last-Modified", "LastModified", "mtime")
"""What stores call the version of an object."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RemoteCache:
    """Where remote files are kept on the local disk, and how they are requested."""

    folder: Path | str | None = None
    """The folder of the cache; None means `launcher/remote` in the user's cache folder."""

    max_bytes: int = 100 << 30
    """Largest size of all files in the folder; the least recently used ones are removed."""

    attempts: int = 4
    """Number of attempts for each request that fails for a passing reason."""

    timeout_seconds: float = 60.0
    """Time without any data after which an attempt fails, over HTTP and with S3."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of fsspec's file system, such as `{"anon": True}` for public buckets on S3."""

    @property
    def path(self) -> Path:
        """The folder of the cache."""
        return cache_folder("remote") if self.folder is None else Path(self.folder)


DEFAULT_CACHE = RemoteCache()
"""The cache that data sets use unless they are given another one."""


class Version(NamedTuple):
    """What identifies the content of a remote file."""

    size: int
    """The size in bytes."""

    tag: str
    """The store's name of the version, such as the ETag; empty where the store has none."""

    md5: str
    """The MD5 of the content in hexadecimal digits; empty where the store does not tell it."""


def read_version(url: str, cache: RemoteCache = DEFAULT_CACHE) -> Version:
    """Return the size and version of a remote file.

    Raises:
        RecipeError: The file is missing or access is denied, or fsspec is not installed.
        SampleError: The store did not answer in several attempts.
    """
    info = _attempt(url, cache, lambda: _request(url, cache, "info"))
    if not isinstance(info.get("size"), int):
        raise RecipeError(
            f"The server does not tell the size of {shown_url(url)}, so the file cannot be read in "
            "parts. Use a server that answers HEAD requests with Content-Length."
        )
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    md5 = info.get("md5Hash") or info.get("Content-MD5") or ""
    try:
        md5 = base64.b64decode(md5, validate=True).hex()
    except (binascii.Error, ValueError):
        md5 = ""
    return Version(info["size"], tag, md5 if len(md5) == 32 else "")


def read_range(url: str, start: int, stop: int, cache: RemoteCache = DEFAULT_CACHE) -> bytes:
    """Return the bytes of a remote file from `start` up to, but not including, `stop`.

    Raises:
        RecipeError: The file is missing or access is denied.
        SampleError: The store did not send these bytes in several attempts.
    """

    def read() -> bytes:
        # By name: the second parameter of s3fs is the version.
        content: bytes = _request(url, cache, "cat_file", start=start, end=stop)
        if len(content) > stop - start:  # a server that ignores ranges sends the whole file
            content = content[start:stop]
        if len(content) != stop - start:
            raise OSError(f"{len(content):,} of {stop - start:,} bytes arrived")
        return content

    return _attempt(url, cache, read)


def download(url: str, version: Version, cache: RemoteCache = DEFAULT_CACHE) -> Path:
    """Return the path of a local copy of a remote file, which is downloaded if it is not cached.

    Another process may remove the copy at any time to make room: open it at once, and call this
    function again where it is missing. A file that is open can be read to its end.

    Args:
        url: The URL.
        version: The version that is expected.
        cache: The cache.

    Raises:
        RecipeError: The file changed, is larger than the cache, or the cache cannot be written.
        SampleError: The store did not send the file in several attempts.
    """
    return cached_file(
        url,
        f"{version.size}\n{version.tag}",
        version.size,
        cache,
        lambda file: _download(url, version, cache, file),
    )


def cached_file(
    location: Path | str,
    version: str,
    num_bytes: int,
    cache: RemoteCache,
    write: Callable[[BinaryIO], None],
) -> Path:
    """Return the path of a file in the cache, which is written if it is not there.

    Only complete files are in the cache, and only one process at a time writes a file. Another
    process may remove it at any time to make room.

    Args:
        location: The path or URL of what it is made from.
        version: A text that tells its content apart from other versions.
        num_bytes: Its size.
        cache: The cache.
        write: Writes the content.

    Raises:
        RecipeError: The file is larger than the cache, or the cache cannot be written.
    """
    identity = f"{location}\n{version}"
    digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    last = str(location).partition("?")[0].rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", last)[-80:]
    path = cache.path / f"{digest}-{name}.data"
    if _is_cached(path, num_bytes):
        return path
    if num_bytes > cache.max_bytes:
        raise RecipeError(
            f"{shown_url(str(location))} has {size(num_bytes)}, and the cache in {cache.path} "
            f"holds at most {size(cache.max_bytes)}. Set RemoteCache(max_bytes=...) to several "
            "times the size of a file."
        )
    try:
        cache.path.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not _is_cached(path, num_bytes):  # another process has written it meanwhile
                _fill(path, num_bytes, cache, write)
    except OSError as error:
        raise _cache_error(str(location), cache, error) from None
    return path


def _is_cached(path: Path, num_bytes: int) -> bool:
    """Return whether a file is in the cache, and note that it is used."""
    try:
        if path.stat().st_size != num_bytes:
            return False
        os.utime(path)
    except OSError as error:
        # Some processes may only read a cache that others have filled.
        return error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and path.exists()
    return True


def _fill(
    path: Path, num_bytes: int, cache: RemoteCache, write: Callable[[BinaryIO], None]
) -> None:
    """Write a file of the cache under another name, and rename it when it is complete."""
    part = path.with_suffix(".part")
    with _locked(cache.path / "room.lock"):
        _make_room(cache, num_bytes, keep=part)
        with part.open("wb") as file:
            file.truncate(num_bytes)  # so that others count it while they make room
    try:
        with part.open("r+b") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _download(url: str, version: Version, cache: RemoteCache, file: BinaryIO) -> None:
    """Write the content of a URL to a file.

    Raises:
        RecipeError: The file at the URL has changed.
        SampleError: The store did not send it in several attempts, or sent something else.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    for start in range(0, version.size, _BLOCK_BYTES):
        stop = min(start + _BLOCK_BYTES, version.size)
        content = read_range(url, start, stop, cache)
        md5.update(content)
        file.write(content)
    if read_version(url, cache) != version:
        raise RecipeError(
            f"{shown_url(url)} is not the file that was found when the run started: its size or "
            "version has changed. Do not replace files during a run, and start it again."
        )
    if version.md5 and md5.hexdigest() != version.md5:
        raise SampleError(
            f"{shown_url(url)} arrived with the MD5 {md5.hexdigest()}, and its store says "
            f"{version.md5}. Start the run again; if it fails again, upload the file again."
        )


def _make_room(cache: RemoteCache, needed: int, keep: Path) -> None:
    """Remove the least recently used files until `needed` more bytes fit into the cache."""
    files = []
    for path in cache.path.iterdir():
        if path.suffix == ".data" or (path.suffix == ".part" and path != keep):
            with contextlib.suppress(OSError):  # removed meanwhile
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(num_bytes for _, num_bytes, _ in files)
    for _, num_bytes, path in sorted(files):
        if total + needed <= cache.max_bytes:
            return
        if path.suffix == ".part":
            lock = _try_lock(path.with_suffix(".lock"))
            if lock is None:
                continue  # a download in progress
            path.unlink(missing_ok=True)
            os.close(lock)
        else:
            path.unlink(missing_ok=True)
        total -= num_bytes


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Return the descriptor of a lock, or None if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _request(url: str, cache: RemoteCache, method: str, **arguments: Any) -> Any:
    """Call a method of fsspec's file system for a URL."""
    system, path = open_file_system(url, cache.options, cache.timeout_seconds)
    return getattr(system, method)(path, **arguments)


def _attempt(url: str, cache: RemoteCache, request: Callable[[], _T]) -> _T:
    """Return the result of a request, which is repeated if it fails for a passing reason.

    Raises:
        RecipeError: The file is missing or access is denied, or a package is not installed.
        SampleError: No attempt succeeded.
    """
    try:
        return attempt(request, cache.attempts)
    except RequestError as error:
        raise _error_of(url, cache, error) from None


def _error_of(url: str, cache: RemoteCache, error: RequestError) -> RecipeError | SampleError:
    """Return the error for a request that failed, which says what to do."""
    shown, reason = shown_url(url), error.reason
    if error.kind == "package":
        return RecipeError(
            f"Reading {shown} needs a package that is not installed: {reason}. Install it with "
            f"`pip install 'gpu-launcher[{extra_of(url)}]'`."
        )
    if error.kind == "url":
        return RecipeError(f"{shown} cannot be read: {reason}.")
    if error.kind == "denied":
        return RecipeError(
            f"Access to {shown} is denied ({reason}). Check the credentials of this node, and "
            "RemoteCache(options=...)."
        )
    if error.kind == "missing":
        return RecipeError(f"There is no file at {shown} ({reason}). Check the URL.")
    return SampleError(
        f"{shown} could not be read in {cache.attempts} attempts. The last one failed with "
        f"{reason}. Check the store and the network; the run can be resumed."
    )


def _cache_error(url: str, cache: RemoteCache, error: OSError) -> RecipeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Make room on its disk, or set RemoteCache(folder=..., max_bytes=...) to fit it"
    else:
        advice = "Set RemoteCache(folder=...) to a folder on a local disk that can be written"
    return RecipeError(
        f"The cache folder {cache.path} cannot hold {shown_url(url)}: "
        f"{error.strerror or error_line(error)}. {advice}."
    )
