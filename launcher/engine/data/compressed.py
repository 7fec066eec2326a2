"""Files that are stored compressed, and read from a copy in the cache that is not."""

from __future__ import annotations

import bz2
import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from launcher.engine.data.extras import import_extra
from launcher.engine.data.remote import RemoteCache, cached_file
from launcher.errors import RecipeError, SampleError
from launcher.printable import error_line, printable_line

ALGORITHMS = ("bz2", "gz", "zstd")
"""The names of the algorithms."""


class Compressed(NamedTuple):
    """How a file is compressed."""

    algorithm: str
    """One of `ALGORITHMS`."""

    num_bytes: int
    """The size of its content."""


def check_algorithm(algorithm: str, files: str) -> None:
    """Check that files can be decompressed.

    Args:
        algorithm: The name of the algorithm.
        files: What is compressed, for the message.

    Raises:
        RecipeError: The algorithm is unknown, or a package is missing.
    """
    if algorithm not in ALGORITHMS:
        raise RecipeError(
            f"{files} are compressed with {algorithm}, and the launcher reads "
            f"{', '.join(ALGORITHMS)}. Write them with one of these, or without compression."
        )
    if algorithm == "zstd":
        import_extra("zstandard", "zstd", "files that are compressed with zstd")


def decompress(
    open_source: Callable[[], int],
    location: Path | str,
    version: str,
    how: Compressed,
    cache: RemoteCache,
) -> Path:
    """Return the path of the content of a file in the cache, where it is kept.

    Args:
        open_source: Returns a descriptor of the compressed file.
        location: Its path or URL.
        version: A text that changes with it.
        how: How it is compressed.
        cache: The cache.

    Raises:
        RecipeError: The cache cannot hold the content.
        SampleError: The file is damaged.
    """

    def write(file: BinaryIO) -> None:
        try:
            with os.fdopen(open_source(), "rb") as stored:
                shutil.copyfileobj(_reader(stored, how.algorithm), file, 1 << 20)
        except OSError as error:
            if error.errno is not None:  # a disk, and not the content
                raise
            raise _damaged(location, error_line(error)) from None
        except Exception as error:  # noqa: BLE001  # each algorithm has errors of its own
            raise _damaged(location, error_line(error)) from None
        if file.tell() != how.num_bytes:
            found = f"it holds {file.tell():,} bytes instead of {how.num_bytes:,}"
            raise _damaged(location, found)

    return cached_file(
        location, f"{how.algorithm} {how.num_bytes} {version}", how.num_bytes, cache, write
    )


def _reader(stored: BinaryIO, algorithm: str) -> Any:
    if algorithm == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True)
    return gzip.GzipFile(fileobj=stored) if algorithm == "gz" else bz2.BZ2File(stored)


def _damaged(location: Path | str, reason: str) -> SampleError:
    name = printable_line(str(location).partition("?")[0])
    return SampleError(f"{name} cannot be decompressed: {reason}. Copy the file again.")
