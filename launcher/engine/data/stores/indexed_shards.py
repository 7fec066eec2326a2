"""Shards with a table of offsets and an index.json, as MosaicML Streaming and LitData write them.

Both formats store in each file the number of samples, the offset of each sample and the end of the
last one as 32-bit integers, and then the samples.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launcher.engine.data.compressed import Compressed
from launcher.engine.data.data_files import DataFiles, digest_of
from launcher.engine.data.remote import RemoteCache, read_range, read_version
from launcher.errors import LauncherError, RecipeError, SampleError
from launcher.object_stores.locations import is_remote
from launcher.printable import error_line, printable_line, shortened

Decode = Callable[[bytes], Any]
"""Decodes the bytes of one value, or of one sample."""

_MAX_TABLE_BYTES = 64 << 20
"""Largest size of all tables of offsets that a process keeps."""


class Shard(NamedTuple):
    """A file of an index."""

    name: str
    """The name of the file in the folder."""

    num_bytes: int
    """The size of the file as it is stored, or the smallest size that it may have."""

    num_samples: int
    """The number of samples in it."""

    compressed: Compressed | None = None
    """How it is compressed."""


class IndexedShards:
    """A map-style data set of the samples in the files that an index names.

    Args:
        folder: Path or URL of the folder.
        index: The content of its index.json.
        shards: The files, in order.
        decoders: A function for each file, from the bytes of a sample to the sample.
        decode: A function of a sample; None returns the sample itself.
        cache: The cache of remote files.

    Raises:
        RecipeError: A file is missing, or is smaller than the index says.
    """

    def __init__(
        self,
        folder: Path | str,
        index: bytes,
        shards: Sequence[Shard],
        decoders: Sequence[Decode],
        decode: Callable[[Any], Any] | None,
        cache: RemoteCache,
    ) -> None:
        if not shards:
            raise RecipeError(f"The index of {_shown(folder)} names no files. Write it again.")
        self._files = DataFiles(
            [_join(folder, shard.name) for shard in shards],
            cache,
            compressed=[shard.compressed for shard in shards],
        )
        self._decoders, self._decode, self._digest = decoders, decode, digest_of(index)
        for file, shard in enumerate(shards):
            if (found := self._files.stored_size(file)) < shard.num_bytes:
                raise RecipeError(
                    f"{self._files.name(file)} has {found:,} bytes, and the index says "
                    f"{shard.num_bytes:,}. Copy the folder again."
                )
        self.chunks: list[int] = [shard.num_samples for shard in shards]
        """The number of samples in each file, in order."""
        self._sizes = np.array(self.chunks, np.int64)
        self._ends = np.cumsum(self._sizes)
        # The tables of larger sets are read entry by entry.
        num_bytes = 4 * (len(self) + len(shards))
        self._keeps_tables = num_bytes <= _MAX_TABLE_BYTES and sys.byteorder == "little"
        self._tables: dict[int, memoryview[int]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return several samples."""
        if len(indices) and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"samples {list(indices)} of {len(self)}")
        numbers = np.asarray(indices, np.int64)
        files = self._ends.searchsorted(numbers, side="right")
        places = numbers - (self._ends - self._sizes)[files]
        return list(map(self._sample, files.tolist(), places.tolist()))

    def _sample(self, file: int, place: int) -> Any:
        """Return a sample by its file, and its place in it.

        Raises:
            SampleError: The file is damaged.
        """
        table = self._tables.get(file)
        if table is None and self._keeps_tables:
            content = self._files.read(file, 4 * (self.chunks[file] + 1), 4)
            table = self._tables[file] = memoryview(content).cast("I")
        if table is None:
            start, stop = struct.unpack("<II", self._files.read(file, 8, 4 + 4 * place))
        else:
            start, stop = table[place], table[place + 1]
        if not 4 <= start <= stop <= self._files.size(file):
            raise SampleError(
                f"Sample {place} of {self._files.name(file)} is said to be at bytes {start:,} to "
                f"{stop:,}, and the file has {self._files.size(file):,}. Copy the file again."
            )
        content = self._files.read(file, stop - start, start)
        try:
            sample = self._decoders[file](content)
        except (LauncherError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  # damaged values raise anything
            raise SampleError(
                f"Sample {place} of {self._files.name(file)} cannot be decoded: "
                f"{shortened(error_line(error), 300)}. Copy the file again."
            ) from None
        return sample if self._decode is None else self._decode(sample)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}

    def fingerprint(self) -> str:
        """Return a digest of the index, which holds the sizes of all files."""
        return self._digest

    def file_of(self, index: int) -> str:
        """Return the path or URL of the file that has a sample."""
        return self._files.name(int(self._ends.searchsorted(index, side="right")))


def read_index(folder: Path | str, cache: RemoteCache) -> tuple[bytes, dict[str, Any]]:
    """Return the content of the index.json of a folder, as bytes and decoded.

    Raises:
        RecipeError: It is missing or is not a JSON object.
    """
    location = _join(folder, "index.json")
    if is_remote(location):
        content = read_range(str(location), 0, read_version(str(location), cache).size, cache)
    else:
        try:
            content = Path(location).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RecipeError(
                f"Cannot read {_shown(location)}: {reason}. Give the folder that holds it."
            ) from None
    try:
        index = json.loads(content)
        if not isinstance(index, dict):
            raise TypeError(f"it holds a {type(index).__name__}")  # noqa: TRY301
    except (ValueError, RecursionError, TypeError) as error:
        raise unreadable(folder, error) from None
    return content, index


def unreadable(folder: Path | str, error: Exception) -> RecipeError:
    """Return an error for an index.json of another format."""
    return RecipeError(
        f"The index.json of {_shown(folder)} cannot be read: {shortened(error_line(error), 300)}. "
        "Copy the folder again, or write it with a known version of its library."
    )


def splitter(sizes: Sequence[int | None]) -> Callable[[bytes], list[bytes]]:
    """Return a function that divides a sample into its values.

    It raises a ValueError if the sizes do not fit the content.

    Args:
        sizes: The size of each value. Those that are None stand in front of all values.
    """
    head = struct.Struct(f"<{sum(size is None for size in sizes)}I")
    is_plain = all(size is None for size in sizes)

    def split(content: bytes) -> list[bytes]:
        given: Iterable[int] = head.unpack_from(content)
        if not is_plain:
            unknown = iter(given)
            given = [next(unknown) if size is None else size for size in sizes]
        position, values = head.size, []
        for length in given:
            start, position = position, position + length
            values.append(content[start:position])
        if position != len(content):
            raise ValueError(f"its values have {position:,} bytes, and it has {len(content):,}")
        return values

    return split


def _join(folder: Path | str, name: str) -> Path | str:
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise RecipeError(
            f"The index of {_shown(folder)} names the file {printable_line(name)!r}, which is "
            "outside the folder. Write the index again."
        )
    if is_remote(folder):
        base, mark, query = str(folder).partition("?")
        return f"{base.rstrip('/')}/{name}{mark}{query}"
    return Path(str(folder).removeprefix("file://")) / name


def _shown(location: Path | str) -> str:
    return printable_line(str(location).partition("?")[0])
