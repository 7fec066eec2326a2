"""Samples in tar files, read in any order: what WebDataset streams, with a number for each sample.

A sample is the files of one tar that follow each other and share their name up to the first dot
(WebDataset's convention). Where each of them lies is looked up once and kept, so that a rank or a
worker reads just what it takes: each sample once, in the same order in any world, and a run goes on
to the sample, as with any data set that can be indexed.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.cache import cache_folder
from launcher.errors import RecipeError

_Index = dict[str, np.ndarray[Any, Any]]


class Shards:
    """Samples of uncompressed tar files, as a data set with a length.

    `shards[i]` is a dict of the sample's files, by what stands behind the first dot of their names,
    such as `jpg` and `cls`, and its `__key__`; or what `decode` makes of that.

    Args:
        files: The tar files, in their order.
        decode: Called with the dict of bytes; None leaves it.

    Raises:
        RecipeError: There are none, or one is no tar file, or compressed.
    """

    def __init__(
        self, files: Sequence[Path | str], decode: Callable[[dict[str, Any]], Any] | None = None
    ) -> None:
        if not files:
            raise RecipeError("Shards of no files: give some, as in sorted(folder.glob('*.tar')).")
        self._paths = [Path(file) for file in files]
        self._decode = decode
        self._shards = [_read_index(path) for path in self._paths]
        self._ends = np.cumsum([len(shard["starts"]) - 1 for shard in self._shards])
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(self._ends.searchsorted(index, side="right"))
        shard = self._shards[number]
        within = index - (int(self._ends[number - 1]) if number else 0)
        members = range(int(shard["starts"][within]), int(shard["starts"][within + 1]))
        sample: dict[str, Any] = {"__key__": str(shard["keys"][within])}
        for member in members:
            offset, size = int(shard["offsets"][member]), int(shard["sizes"][member])
            # pread: workers that are forked share the file and have no place in it of their own.
            content = os.pread(self._open(number), size, offset)
            if len(content) != size:
                raise OSError(f"{self._paths[number]} has become shorter")
            sample[str(shard["extensions"][member])] = content
        return sample if self._decode is None else self._decode(sample)

    def _open(self, number: int) -> int:
        if number not in self._files:
            self._files[number] = os.open(self._paths[number], os.O_RDONLY)
        return self._files[number]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def _read_index(path: Path) -> _Index:
    """Return where the files of a tar lie, from what was kept if it is still of this file."""
    try:
        status = path.stat()
    except OSError as error:
        raise RecipeError(f"Cannot read the shard {path}: {error.strerror}.") from None
    known = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    kept = cache_folder("shards") / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.npz"
    try:
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none, or a damaged one
        index = _make_index(path)
    _keep_index(kept, index)
    return index


def _make_index(path: Path) -> _Index:
    keys: list[str] = []
    starts: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    extensions: list[str] = []
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not keys or keys[-1] != key:
                    keys.append(key)
                    starts.append(len(offsets))
                    seen = set()
                if extension in seen:
                    raise RecipeError(f"The shard {path} has {member.name} twice in one sample.")
                seen.add(extension)
                offsets.append(member.offset_data)
                sizes.append(member.size)
                extensions.append(extension)
    except (tarfile.TarError, OSError) as error:
        raise RecipeError(
            f"{path} is no tar file that can be read from anywhere: {error}. Compressed ones have "
            "to be unpacked, `gunzip FILE.tar.gz`: their samples have no place of their own."
        ) from None
    return {
        "keys": np.array(keys, str),
        "starts": np.array([*starts, len(offsets)], np.int64),
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
        "extensions": np.array(extensions, str),
    }


def _keep_index(path: Path, index: _Index) -> None:
    """Keep an index for the next time; that it cannot be kept is no reason to fail."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with own.open("wb") as file:
            np.savez(file, **index)  # type: ignore[arg-type]
        own.replace(path)
    except OSError:
        own.unlink(missing_ok=True)
