"""The index of a tar in memory: as small as its numbers and names allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.data_files import digest_of

_ENCODING = ("utf-8", "surrogateescape")


class Member(NamedTuple):
    """A file of a sample."""

    extension: str
    """The part of its name after the first dot."""

    offset: int
    """The position of its content in the tar, in bytes."""

    size: int
    header: int
    """The CRC-32 of its header."""


class TarIndex:
    """The samples of one tar, whose numbers take as few bytes as the largest one needs.

    Args:
        arrays: Its arrays, as `launcher.engine.data.shards` reads and caches them.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.digest = digest_of(*(arrays[name].tobytes() for name in ("keys", "sizes", "headers")))
        """Changes with the names, the sizes or the headers of the files."""

        self._keys = np.char.encode(arrays["keys"], *_ENCODING)
        self._starts, self._offsets, self._sizes, self._headers = (
            _smallest(arrays[name]) for name in ("starts", "offsets", "sizes", "headers")
        )
        names, numbers = np.unique(arrays["extensions"], return_inverse=True)
        self._extensions: list[str] = names.tolist()
        self._extension_numbers = _smallest(numbers)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all arrays."""
        arrays = (self._keys, self._starts, self._offsets, self._sizes, self._headers)
        return sum(array.nbytes for array in arrays) + self._extension_numbers.nbytes

    def key(self, sample: int) -> str:
        """Return the key of a sample."""
        encoded: bytes = self._keys[sample]
        return encoded.decode(*_ENCODING)

    def members(self, sample: int) -> list[Member]:
        """Return the files of a sample, in the order of the tar."""
        start, stop = map(int, self._starts[sample : sample + 2])
        return [
            Member(
                self._extensions[self._extension_numbers[member]],
                int(self._offsets[member]),
                int(self._sizes[member]),
                int(self._headers[member]),
            )
            for member in range(start, stop)
        ]


def _smallest(values: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Return whole numbers of at least 0 in the smallest type that holds the largest of them."""
    return values.astype(np.min_scalar_type(int(values.max()) if len(values) else 0))
