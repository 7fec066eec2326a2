"""The files of a data set, local or remote, read at any position by any process."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from launcher.engine.data.compressed import Compressed, decompress
from launcher.engine.data.remote import (
    DEFAULT_CACHE,
    RemoteCache,
    Version,
    download,
    read_range,
    read_version,
)
from launcher.errors import RecipeError, SampleError
from launcher.object_stores.locations import is_remote
from launcher.printable import printable_line
from launcher.regular_file import open_descriptor

_MAX_OPEN = 128
"""Largest number of files that a process holds open for one data set."""

_MIN_OPEN = 8
"""Files that each thread may hold open, however many threads there are."""

_RECHECK_SECONDS = 10.0
"""Time after which the cache is told that a remote file is still in use."""

_NUM_THREADS = 16
"""Number of remote files whose versions or contents are requested at once."""

_T = TypeVar("_T")


class DataFiles:
    """Files at paths or URLs, whose sizes are read at once and whose contents when needed.

    Reads have positions of their own, so forked workers can share the descriptors. A remote file is
    downloaded to the cache before its first read.

    Args:
        locations: The paths and URLs, in order.
        cache: The cache of remote files.
        noun: What a file is, for messages.
        compressed: How each file is compressed; None reads files as they are stored. The content of
            a compressed file is kept in the cache.

    Raises:
        RecipeError: There are no files, or one is missing or cannot be read.
        SampleError: A store did not answer.
    """

    def __init__(
        self,
        locations: Sequence[Path | str],
        cache: RemoteCache = DEFAULT_CACHE,
        *,
        noun: str = "data file",
        compressed: Sequence[Compressed | None] | None = None,
    ) -> None:
        if isinstance(locations, (str, Path)):
            locations = [locations]
        if not locations:
            raise RecipeError(
                "The data set got no files. Pass at least one, as in sorted(folder.glob('*'))."
            )
        self.cache, self._noun = cache, noun
        self.locations: list[Path | str] = [
            location if is_remote(location) else _local(location) for location in locations
        ]
        """The paths and URLs."""
        self._compressed = compressed or [None] * len(self.locations)
        self._versions = self.for_each(self._read_version)
        self._forget_open_files()

    def _forget_open_files(self) -> None:
        self._of_thread = threading.local()
        self._of_threads: list[OrderedDict[int, tuple[int, float]]] = []

    @property
    def _open(self) -> OrderedDict[int, tuple[int, float]]:
        """Return the files that this thread has open, the least recently used first.

        Each thread opens its own, because another one could close what it reads from.
        """
        files: OrderedDict[int, tuple[int, float]] | None
        files = getattr(self._of_thread, "files", None)
        if files is None:
            files = self._of_thread.files = OrderedDict()
            self._of_threads.append(files)
        return files

    def __len__(self) -> int:
        return len(self.locations)

    def name(self, number: int) -> str:
        """Return the path or URL of a file for messages."""
        return printable_line(str(self.locations[number]).partition("?")[0])

    def size(self, number: int) -> int:
        """Return the size of a file's content in bytes."""
        how = self._compressed[number]
        return self._versions[number].size if how is None else how.num_bytes

    def stored_size(self, number: int) -> int:
        """Return the size of a file as it is stored, in bytes."""
        return self._versions[number].size

    def is_remote(self, number: int) -> bool:
        """Return whether a file is remote."""
        return isinstance(self.locations[number], str)

    def version(self, number: int) -> Version:
        """Return the size and version of a file."""
        return self._versions[number]

    def for_each(self, function: Callable[[int], _T]) -> list[_T]:
        """Return the results of a function of a file's number, called in threads for URLs."""
        numbers = range(len(self.locations))
        if not any(self.is_remote(number) for number in numbers):
            return [function(number) for number in numbers]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return list(pool.map(function, numbers))

    def read(self, number: int, length: int, offset: int) -> bytes:
        """Return `length` bytes of a file at `offset`.

        Raises:
            SampleError: The file cannot be read, or ends before.
        """
        try:
            content = pread(self.descriptor(number), length, offset)
        except OSError as error:
            raise SampleError(
                f"Reading {length:,} bytes at byte {offset:,} of {self.name(number)} failed: "
                f"{error.strerror}."
            ) from None
        if len(content) != length:
            raise SampleError(
                f"{self.name(number)} is shorter than when the run started: reading {length:,} "
                f"bytes at byte {offset:,} gave {len(content):,}. The file changed or was cut off: "
                "copy it again."
            )
        return content

    def read_end(self, number: int, length: int) -> bytes:
        """Return up to `length` bytes at the end of a file, without downloading all of it."""
        total = self.size(number)
        start, location = max(total - length, 0), self.locations[number]
        if isinstance(location, str):
            return read_range(location, start, total, self.cache)
        return self.read(number, total - start, start)

    def descriptor(self, number: int) -> int:
        """Return a descriptor of the open file, which stays valid until the next call.

        Raises:
            RecipeError: The file is missing, or has changed.
            SampleError: The file cannot be downloaded.
        """
        files = self._open
        opened = files.get(number)
        if opened is not None:
            descriptor, checked = opened
            if not self._is_cached(number):
                if len(files) == _MAX_OPEN:
                    files.move_to_end(number)
                return descriptor
            now = time.monotonic()
            if now - checked < _RECHECK_SECONDS:
                return descriptor
            if os.fstat(descriptor).st_nlink:
                with contextlib.suppress(OSError):
                    os.utime(descriptor)
                files[number] = descriptor, now
                files.move_to_end(number)
                return descriptor
            # The cache removed it: closing it gives the space back.
            os.close(files.pop(number)[0])
        while len(files) >= max(_MAX_OPEN // len(self._of_threads), _MIN_OPEN):
            os.close(files.popitem(last=False)[1][0])
        files[number] = self._open_file(number), time.monotonic()
        return files[number][0]

    def local_path(self, number: int) -> Path:
        """Return a path under which this process can open a file now."""
        location, how = self.locations[number], self._compressed[number]
        if how is None:
            return location if isinstance(location, Path) else self._download(location, number)
        return decompress(
            functools.partial(self._open_stored, number),
            location,
            self.version(number).tag,
            how,
            self.cache,
        )

    def _is_cached(self, number: int) -> bool:
        """Return whether a file is read from the cache."""
        return self.is_remote(number) or self._compressed[number] is not None

    def _open_file(self, number: int) -> int:
        if self._compressed[number] is None:
            return self._open_stored(number)
        while True:
            try:
                return open_descriptor(self.local_path(number), os.O_RDONLY)
            except FileNotFoundError:  # another process made room for its own files
                continue

    def _open_stored(self, number: int) -> int:
        """Return a descriptor of a file as it is stored."""
        location = self.locations[number]
        if isinstance(location, Path):
            try:
                descriptor = open_descriptor(location, os.O_RDONLY)
            except OSError as error:
                raise self._open_error(location, error) from None
            found, expected = os.fstat(descriptor).st_size, self.stored_size(number)
            if found != expected:
                os.close(descriptor)
                raise RecipeError(
                    f"{self.name(number)} has {found:,} bytes, and had {expected:,} when the run "
                    "started. Do not change files during a run, and start it again."
                )
            return descriptor
        while True:
            try:
                return open_descriptor(self._download(location, number), os.O_RDONLY)
            except FileNotFoundError:  # another process made room for its own files
                continue

    def _download(self, url: str, number: int) -> Path:
        return download(url, self._versions[number], self.cache)

    def _read_version(self, number: int) -> Version:
        location = self.locations[number]
        if isinstance(location, str):
            return read_version(location, self.cache)
        try:
            status = location.stat()
        except (OSError, ValueError) as error:
            raise self._open_error(location, error) from None
        return Version(status.st_size, str(status.st_mtime_ns), "")

    def _open_error(self, path: Path, error: OSError | ValueError) -> RecipeError:
        reason = getattr(error, "strerror", None) or str(error)
        return RecipeError(f"Cannot read the {self._noun} {printable_line(str(path))}: {reason}.")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_of_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_open_files()

    def __del__(self) -> None:
        for files in getattr(self, "_of_threads", []):
            for descriptor, _ in files.values():
                os.close(descriptor)


def pread(descriptor: int, length: int, offset: int) -> bytes:
    """Return `length` bytes at `offset`, or fewer at the end of the file.

    A single pread may return fewer bytes; on Linux it returns at most 2 GiB.
    """
    content = os.pread(descriptor, length, offset)
    if len(content) == length or not content:
        return content
    pieces = [content]
    length, offset = length - len(content), offset + len(content)
    while length > 0 and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        length, offset = length - len(piece), offset + len(piece)
    return b"".join(pieces)


def digest_of(*parts: bytes | str) -> str:
    """Return a short digest of an index, which tells two data sets apart."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:32]


def _local(location: Path | str) -> Path:
    text = str(location)
    return Path(text.removeprefix("file://")) if text.startswith("file://") else Path(text)
