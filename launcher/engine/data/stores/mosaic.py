"""Samples of MosaicML Streaming's format MDS, read in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class MosaicShards(IndexedShards):
    """A map-style data set of the samples that MosaicML's MDSWriter has written.

    A sample is a dict from the name of a column to its value, or the result of `decode` for this
    dict. Images are images of Pillow, and arrays are numpy arrays.

    Args:
        folder: Path or URL of the folder with index.json.
        decode: A function of the dict of a sample; None returns the dict itself.
        allow_pickle: Whether columns of the encoding `pkl` are read, which runs their code.
        cache: The cache of remote files.

    Raises:
        RecipeError: A file is missing, damaged or compressed, or a column cannot be read.
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
                if shard["compression"]:
                    raise RecipeError(
                        f"The files of {folder} are compressed with {shard['compression']}, so "
                        "single samples cannot be read. Write them with "
                        "MDSWriter(compression=None)."
                    )
                raw = shard["raw_data"]
                shards.append(Shard(raw["basename"], int(raw["bytes"]), int(shard["samples"])))
                columns = shard["column_names"], shard["column_encodings"], shard["column_sizes"]
                key = repr(columns)
                if key not in known:
                    known[key] = _decoder(*columns, allow_pickle=allow_pickle)
                decoders.append(known[key])
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(folder, error) from None
        super().__init__(folder, content, shards, decoders, decode, cache)


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
