"""Samples of MosaicML Streaming's format MDS, read in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.engine.data.compressed import Compressed, check_algorithm
from launcher.engine.data.remote import DEFAULT_CACHE, RemoteCache
from launcher.engine.data.stores.indexed_shards import (
    Decode,
    IndexedShards,
    Shard,
    read_index,
    splitter,
    unreadable,
)
from launcher.engine.data.stores.value_formats import mosaic_decoder
from launcher.errors import RecipeError
from launcher.object_stores.locations import is_remote


class MosaicShards(IndexedShards):
    """A map-style data set of the samples that MosaicML's MDSWriter has written.

    A sample is a dict from the name of a column to its value, or the result of `decode` for this
    dict. Images are images of Pillow, and arrays are numpy arrays. Files that are compressed with
    zstd, gz or bz2 are decompressed into the cache, each when its first sample is read.

    Args:
        folder: Path or URL of the folder with index.json.
        decode: A function of the dict of a sample; None returns the dict itself.
        allow_pickle: Whether columns of the encoding `pkl` are read, which runs their code.
        cache: The cache of remote and of decompressed files.

    Raises:
        RecipeError: A file is missing or damaged, or a column cannot be read.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        decode: Callable[[dict[str, Any]], Any] | None = None,
        allow_pickle: bool = False,
        cache: RemoteCache = DEFAULT_CACHE,
    ) -> None:
        content, index = read_index(folder, cache)
        shards: list[Shard] = []
        decoders: list[Decode] = []
        known: dict[str, Decode] = {}
        try:
            for shard in index["shards"]:
                if shard["format"] != "mds" or shard["version"] != 2:
                    raise RecipeError(
                        f"The index.json of {folder} names a file of the format "
                        f"{shard['format']!r}, version {shard['version']}; expected 'mds', 2. "
                        "Write it with MDSWriter."
                    )
                shards.append(_shard(folder, shard))
                columns = shard["column_names"], shard["column_encodings"], shard["column_sizes"]
                key = repr(columns)
                if key not in known:
                    known[key] = _decoder(*columns, allow_pickle=allow_pickle)
                decoders.append(known[key])
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(folder, error) from None
        super().__init__(folder, content, shards, decoders, decode, cache)


def _shard(folder: Path | str, shard: dict[str, Any]) -> Shard:
    """Return a file of an index.

    Raises:
        RecipeError: It is compressed in an unknown way.
    """
    raw = shard["raw_data"]
    name, num_bytes, samples = raw["basename"], int(raw["bytes"]), int(shard["samples"])
    if not shard["compression"]:
        return Shard(name, num_bytes, samples)
    # Its library leaves the decompressed file in the folder.
    if not is_remote(folder) and (Path(folder) / name).exists():
        return Shard(name, num_bytes, samples)
    algorithm = str(shard["compression"]).partition(":")[0]  # after the colon is the level
    check_algorithm(algorithm, f"The files of {folder}")
    packed, compressed = shard["zip_data"], Compressed(algorithm, num_bytes)
    return Shard(packed["basename"], int(packed["bytes"]), samples, compressed)


def _decoder(
    names: list[str], encodings: list[str], sizes: list[int | None], *, allow_pickle: bool
) -> Decode:
    decoders = [mosaic_decoder(encoding, allow_pickle=allow_pickle) for encoding in encodings]
    split = splitter([size or None for size in sizes])  # the writer treats 0 as unknown

    def read(content: bytes) -> dict[str, Any]:
        return {
            name: decode(value)
            for name, decode, value in zip(names, decoders, split(content), strict=True)
        }

    return read
