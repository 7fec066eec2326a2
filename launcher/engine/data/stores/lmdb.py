"""Values of an LMDB environment, read in any order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.data_files import DataFiles, digest_of
from launcher.engine.data.extras import import_extra
from launcher.engine.data.remote import DEFAULT_CACHE, RemoteCache
from launcher.engine.data.stores.even_blocks import block_sizes, spaced
from launcher.errors import RecipeError, SampleError
from launcher.object_stores.locations import is_remote
from launcher.printable import error_line, printable_line, shortened

_NUM_SAMPLED = 64
"""Number of values, evenly spaced, that are part of the fingerprint."""

_Decode = Callable[[bytes, bytes], Any]

_environments: dict[tuple[int, int], tuple[int, Any]] = {}
"""The process that opened an environment, and the environment, by the device and inode of its file.

A process may open each environment only once.
"""


class LMDBSamples:
    """A map-style data set of the values in an LMDB environment.

    `samples[i]` is the value of a key as bytes, or the result of `decode(key, value)`. Samples are
    numbered in the order of their keys, which are read once, when the data set is made; keys that
    begin and end with two underscores, such as `__len__`, are left out. The environment is only
    read, and must not be written while it is used: one that has changed is refused. Each process
    opens it by itself.

    Args:
        path: Path of the folder or of the file, or URL of the file data.mdb.
        decode: A function of the key and the value; None returns the value.
        cache: The cache of remote files.

    Raises:
        RecipeError: It is missing, damaged or no LMDB environment, or lmdb is not installed.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        decode: _Decode | None = None,
        cache: RemoteCache = DEFAULT_CACHE,
    ) -> None:
        import_extra("lmdb", "lmdb", "LMDB environments")
        if not is_remote(path):
            folder = Path(path)
            path = folder / "data.mdb" if folder.is_dir() else folder
        self._files = DataFiles([path], cache, noun="LMDB environment")
        self._decode, self._path = decode, os.fspath(self._files.locations[0])
        self._place: tuple[int, int] | None = None
        self._keys, self._ends, self._transaction = self._read_keys()
        sizes = np.unique(np.diff(self._ends))
        self._key_size = int(sizes[0]) if len(sizes) == 1 else None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def key(self, index: int) -> bytes:
        """Return the key of a sample."""
        return self._keys[int(self._ends[index]) : int(self._ends[index + 1])]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return several samples, read in one transaction."""
        if len(indices) and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"samples {list(indices)} of {len(self)}")
        keys = self._keys_of(indices)
        values = self._read(indices, keys)
        if self._decode is None:
            return values
        return list(map(self._decode, keys, values))

    @property
    def chunks(self) -> list[int]:
        """The number of samples in each block of 1,024 neighbouring keys, in order."""
        return block_sizes(len(self))

    def fingerprint(self) -> str:
        """Return a digest of the keys, of values evenly spaced, and of the last transaction."""
        chosen = spaced(len(self), _NUM_SAMPLED)
        values = self._read(chosen, [self.key(index) for index in chosen])
        return digest_of(self._keys, self._ends.tobytes(), str(self._transaction), *values)

    def file_of(self, index: int) -> str:
        """Return the path or URL of the environment, whatever the index."""
        return self._files.name(0)

    def _keys_of(self, indices: Sequence[int]) -> list[bytes]:
        """Return the keys of several samples."""
        keys, size = self._keys, self._key_size
        if size is not None:
            return [keys[size * index : size * index + size] for index in indices]
        numbers = np.asarray(indices, np.int64)
        stops = self._ends[numbers + 1].tolist()
        spans = zip(self._ends[numbers].tolist(), stops, strict=True)
        return [keys[start:stop] for start, stop in spans]

    def _read(self, indices: Sequence[int], keys: Sequence[bytes]) -> list[Any]:
        """Return the values of some keys.

        Raises:
            SampleError: One is missing, or is damaged.
        """
        import lmdb

        values: list[Any] = []
        with self._begin() as transaction:
            try:
                values.extend(map(transaction.get, keys))
                reason = "it is missing"
            except lmdb.Error as error:
                reason = error_line(error)
        # `all` is much faster than a search for None, and false where a value is empty.
        if len(values) == len(keys) and (all(values) or None not in values):
            return values
        place = values.index(None) if None in values else len(values)
        raise SampleError(
            f"Sample {indices[place]:,} (key {keys[place][:60]!r}) of {self._files.name(0)} cannot "
            f"be read: {reason}. Copy the environment again."
        )

    def _read_keys(self) -> tuple[bytes, NDArray[np.int64], int]:
        """Return all keys in one row, the end of each, and the number of the last transaction.

        Raises:
            RecipeError: The environment has named databases in place of samples, or is damaged.
        """
        import lmdb

        ends, keys = [0], []
        try:
            with self._environment().begin() as transaction:
                if transaction.stat()["entries"]:
                    for key in transaction.cursor().iternext(keys=True, values=False):
                        if not (key.startswith(b"__") and key.endswith(b"__")):
                            keys.append(key)
                            ends.append(ends[-1] + len(key))
                number = transaction.id()
        except lmdb.Error as error:
            raise self._unreadable(error) from None
        return b"".join(keys), np.array(ends, np.int64), number

    def _begin(self) -> Any:
        """Return a transaction, in which the environment is as it was at the start.

        Raises:
            RecipeError: It has changed.
        """
        import lmdb

        location, version = self._files.locations[0], self._files.version(0)
        is_same = True
        if isinstance(location, Path):
            # A file that became shorter must not be read: its memory map would end the process.
            try:
                is_same = os.stat(self._path).st_size == version.size  # noqa: PTH116  # faster
            except OSError as error:
                raise RecipeError(
                    f"Cannot read the LMDB environment {self._files.name(0)}: {error.strerror}."
                ) from None
        try:
            transaction = self._environment().begin() if is_same else None
        except lmdb.Error as error:
            raise self._unreadable(error) from None
        if transaction is None or transaction.id() != self._transaction:
            raise RecipeError(
                f"The LMDB environment {self._files.name(0)} changed during the run. Do not write "
                "to it during a run, and start the run again."
            )
        return transaction

    def _environment(self) -> Any:
        """Return the environment, as this process has opened it."""
        if self._place is None:
            status = os.fstat(self._files.descriptor(0))  # of the file that was found at the start
            self._place = status.st_dev, status.st_ino
        process, place = os.getpid(), self._place
        owner, environment = _environments.get(place, (None, None))
        if owner != process:
            if environment is not None:
                environment.close()  # this process's copy of the parent's memory map
            environment = self._open()
            _environments[place] = process, environment
        return environment

    def _open(self) -> Any:
        import lmdb

        # Through the descriptor, so that the file stays the same if its name goes away.
        path = f"/dev/fd/{self._files.descriptor(0)}"
        options = {"subdir": False, "readonly": True, "lock": False, "create": False}
        try:
            return lmdb.open(path, readahead=False, **options)
        except lmdb.Error as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> RecipeError:
        if "already open" in str(error):
            return RecipeError(
                f"The LMDB environment {self._files.name(0)} is open in this process. Close it, "
                "because a process can open it only once."
            )
        return RecipeError(
            f"{self._files.name(0)} cannot be read as an LMDB environment: "
            f"{shortened(printable_line(error_line(error)), 300)}. Give the folder or the file of "
            "an environment, and copy it again if it is damaged."
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_place": None}

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))
